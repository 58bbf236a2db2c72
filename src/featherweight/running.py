"""`run`: a recipe, from a file or from Python, carried out from its sources to the files of the result."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featherweight import catalogue, outputs, pipeline, provenance, recipe_text, sources
from featherweight.core import processes, progress
from featherweight.core.task import Task
from featherweight.errors import BadOption, BadRecipe, FeatherweightError, within
from featherweight.recipe_model import Recipe, Settings, Step, problems
from featherweight.recipe_text import Marks

TRAIN_EPOCHS = 10  # of a zoo network that comes without weights
TRAIN_LR = 2e-3
ORIGINAL = "original"  # the teacher that is the model itself, as it was
TEACHER_SHARE = 0.9  # of every loss, where a teacher is named


def run(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    *,
    model: str | nn.Module | None = None,
    task: Task | None = None,
    student: str | nn.Module | None = None,
    show: bool = False,
    **settings: Any,
) -> pipeline.Result:
    """Carries out a recipe: builds or loads the network, trains it first where it has no weights, compresses it.

    Args:
        recipe: a YAML file, or the same keys as a mapping.
        model: a network in place of the recipe's `model`, as a module or as a word.
        task: data, loss and metric in place of the recipe's `data`.
        student: a network in place of the recipe's `student`, as a module or as a word.
        show: show progress on standard error.
        settings: keys that stand above the recipe's, such as `seed=1` or `out="runs/b"`.

    Raises:
        FeatherweightError: what is wrong with the recipe, with its line; nothing has been written then.
    """
    words = {"model": model, "student": student}
    held = {name: value for name, value in words.items() if isinstance(value, nn.Module)}
    over = {**settings, **{name: value for name, value in words.items() if value is not None and name not in held}}
    given = {*held, *(["data"] if task is not None else [])}
    asked, marks = load(recipe, over, given)
    with progress.showing(show and processes.is_main()), marks.located(flags=frozenset(over)):
        result = _carried_out(asked, held, task, show)
    # with its sources, so that `verify` and `bench` can build the network again
    told = {**asked.dump(given), "seed": asked.seed, "threads": result.report["environment"]["torch_threads"]}
    needs = sorted("task" if name == "data" else name for name in given)
    result.report["reproduce"] = {"recipe": told, "needs": needs, "why": ""}
    if asked.out is not None and processes.is_main():
        outputs.write_json(Path(asked.out) / "report.json", result.report)
        result.report_html(Path(asked.out) / "report.html")
    return result


def load(
    recipe: str | os.PathLike[str] | Mapping[str, Any], over: Mapping[str, Any], given: Iterable[str] = ()
) -> tuple[Recipe, Marks]:
    """The recipe with the keys of `over` above its own, and where its keys stand.

    `given` are keys that come as Python objects and need no words.

    Raises:
        FeatherweightError: everything that is wrong with it, before any work, with lines where it is a file.
    """
    data, marks = (dict(recipe), Marks()) if isinstance(recipe, Mapping) else recipe_text.read(recipe)
    data = {**data, **over}
    if "chain" not in data and (data.get("student") is not None or "student" in given):
        data["chain"] = [pipeline.TRAINS_A_STUDENT]
    stand_ins = {name: f"(a Python object, {name})" for name in given}
    found = list(problems(Recipe, {**data, **stand_ins}))
    if not any(problem.place[:1] == ("chain",) for problem in found):
        found += _of_the_chain(data["chain"]) if "chain" in data else []
    if found:
        raise _together(found, marks, frozenset(over))
    return Recipe.model_validate({**data, **stand_ins}), marks


def _of_the_chain(chain: Any) -> list[FeatherweightError]:
    """What is wrong with the methods and their options."""
    found: list[FeatherweightError] = []
    steps = Recipe.model_validate({"model": "", "data": "", "chain": chain}).chain
    for index, step in enumerate(steps):
        if sources.is_function(step.method):
            continue  # the user's code runs only when everything else is right
        try:
            with within("chain", index, "method"):
                entry = catalogue.entry(step.method, "method")
        except FeatherweightError as error:
            found.append(error)
            continue
        wrong = len(found)
        for name, value in step.options.items():  # each by itself, so that all are told
            found += _refused(index, partial(catalogue.check_option, entry, name, value))
        if len(found) == wrong:
            found += _refused(index, partial(catalogue.check_options, entry, step.options))
    return found


def _refused(index: int, check: Callable[[], None]) -> list[FeatherweightError]:
    try:
        with within("chain", index, "options"):
            check()
    except FeatherweightError as error:
        return [error]
    return []


def _together(found: list[FeatherweightError], marks: Marks, flags: frozenset[str]) -> FeatherweightError:
    """One error of several, in the order in which they stand in the text."""
    told: list[FeatherweightError] = []
    for problem in sorted(found, key=lambda one: marks.line(one.place)):
        try:
            with marks.located(flags=flags):
                raise problem
        except FeatherweightError as error:
            told.append(error)
    if len(told) == 1:
        return told[0]
    return BadRecipe(f"{len(told)} things are wrong:\n" + "\n".join(f"  {one}" for one in told))


def _carried_out(asked: Recipe, held: Mapping[str, nn.Module], task: Task | None, show: bool) -> pipeline.Result:
    """The run itself: everything is built, then checked, then the network trained where it must be, then compressed."""
    out = None if asked.out is None else Path(asked.out)
    provenance.seed_everything(asked.seed, -1)
    model = held.get("model") or _network(asked.model, asked.weights, "model", "weights")
    made = torch.get_rng_state()
    student = held.get("student")
    if student is None and asked.student is not None:
        student = _network(asked.student, asked.student_weights, "student", "student_weights")
    if task is None:
        with within("data"):
            task = sources.task(asked.data, batch_size=asked.batch_size)
    if asked.teacher == ORIGINAL:
        task = replace(task, teacher=None)  # `compress` then takes the model
        if asked.teacher_weights is not None:
            raise BadOption("teacher_weights= are of a network that is named: teacher=original has those of the model")
    elif asked.teacher is not None:
        teacher = _network(asked.teacher, asked.teacher_weights, "teacher", "teacher_weights")
        task = replace(task, teacher=teacher.requires_grad_(False))
    chain = [_step(index, step) for index, step in enumerate(asked.chain)]
    with progress.showing(False):  # what there is to say, `compress` says
        pipeline.check(model, task, chain, student=student)
    if out is not None:
        processes.main_only(partial(outputs.prepare, out))
    torch.set_rng_state(made)  # training goes on from where building the network ended, whatever was looked at since
    if "model" not in held:
        with provenance.threads_of(asked.threads):
            _train(model, asked, task, out)
    elif asked.weights is not None or asked.train:
        raise BadOption("weights= and train= are for a network that is named: the model was given as a module")
    settings = asked.model_dump(include=set(Settings.model_fields))
    if asked.teacher is not None and asked.teacher_share is None:
        settings["teacher_share"] = TEACHER_SHARE
    return pipeline.compress(model, task, chain, student=student, show=show, **settings)


def _network(spec: str, weights: str | None, name: str, weights_name: str) -> nn.Module:
    """A network by word, with its weights; what is wrong is told with its key."""
    with within(name):
        network = sources.network(spec)
    if weights is not None:
        with within(weights_name):
            sources.load_weights(network, weights)
    return network.eval()


def _step(index: int, step: Step) -> Any:
    """A step for `compress`: an id or the user's function, with its options."""
    with within("chain", index, "method"):
        method = sources.function(step.method) if sources.is_function(step.method) else step.method
    return method, step.options


def _train(model: nn.Module, asked: Recipe, task: Task, out: Path | None) -> None:
    """Trains a network that has no weights; they are kept beside the results, to resume and to verify."""
    untrained = asked.weights is None and not sources.is_trained(asked.model)
    epochs = asked.train if asked.train is not None else TRAIN_EPOCHS if untrained else 0
    kept = None if out is None else out / "original.safetensors"
    if epochs == 0:
        if kept is not None and processes.is_main():
            kept.unlink(missing_ok=True)  # of an earlier run that trained
        return
    threads = asked.threads if asked.threads is not None else torch.get_num_threads()
    told = [asked.model, asked.weights, epochs, asked.data, asked.batch_size, asked.seed, threads]
    made = json.dumps([*told, provenance.versions()])
    if asked.resume and kept is not None and sources.made_how(kept) == made:
        sources.load_weights(model, kept)
        return
    progress.say(f"training {asked.model} for {epochs} epochs first")
    task.fit(model, task, epochs=epochs, lr=TRAIN_LR, label="train")
    if kept is not None:
        processes.main_only(partial(sources.save_weights, model, kept, made))
