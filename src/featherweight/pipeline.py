"""`compress`: methods in order, measured after each, until the budget holds; rolled back where the guard breaks."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight import allowed, anatomy, budget, catalogue, export, recipe_text
from featherweight import report as pages
from featherweight.catalogue import Entry
from featherweight.checkpoint import Checkpoints
from featherweight.coding import SaveReport, load, save
from featherweight.core import ledger, measuring, processes, progress, tracking
from featherweight.core.agree import answer, compared
from featherweight.core.cost import cost, raw_bytes
from featherweight.core.digests import digest, fingerprint, raw
from featherweight.core.examine import examine
from featherweight.core.forms import bake
from featherweight.core.surgery import find_layers
from featherweight.core.task import (
    Score,
    Task,
    check_needs,
    drop,
    evaluate,
    first,
    paired_drop,
    run,
)
from featherweight.core.taught import under_teacher
from featherweight.core.wiring import recalling, wire
from featherweight.errors import BadData, BadOption, BadRecipe, CompressionError, FeatherweightError, within
from featherweight.figures import figures_of, latency, paired_test, rows, stopwatch
from featherweight.outputs import FRESH, prepare, take_over, write_json
from featherweight.provenance import environment, identity, seed_everything, threads_of, versions
from featherweight.recipe_model import check_settings

Step = str | tuple[str, Mapping[str, Any]] | Callable[..., nn.Module]

AIMED_AT = ("macs", "params", "latency")  # what methods with a budget of their own can reach by themselves
WEIGHED = {"size": "B", "drop": "pt"}  # what methods that choose how much they lose can reach: the option `within`
ONNX_GAP = 0.02  # of the metric, by which an exported file may differ from its module
TRAINS_A_STUDENT = "kd"  # the chain, where a student is given and no method
LATENCY_SECONDS = 2.0  # for each pair that is timed; half of it for the profile of layers and for their sensitivity

# The (earlier, later) effects where the later method would lose what the earlier one achieved. Other orders keep it:
# masks and codebooks stay attached while a later method trains, zeros are masked again after channels were removed.
LOSES: dict[tuple[str, str], str] = {
    ("weights", "factors"): "factors of a sparse weight are dense",
    ("bits", "channels"): "training for the removal moves the weights off their grid",
    ("bits", "factors"): "factors of a quantized weight are not quantized",
    ("bits", "bits"): "the second grid replaces the first",
}


@dataclass(frozen=True)
class Result:
    """What `compress` hands back: the smaller network, baked, and a report in which every figure was measured."""

    model: nn.Module
    report: dict[str, Any] = field(repr=False)
    example_inputs: Any = field(repr=False)

    @property
    def reached(self) -> bool:
        """Whether the budget holds (True without one)."""
        return bool(self.report["budget"]["reached"])

    @property
    def recipe(self) -> str:
        """The run as a recipe in YAML: `fw.run` of it gives the same bytes, given the same model and task.

        Raises:
            BadRecipe: the chain holds what only Python can say.
        """
        made = self.report["reproduce"]
        if made["recipe"] is None:
            raise BadRecipe(f"there is no recipe of this run: {made['why']}")
        return recipe_text.dump(made["recipe"])

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Writes model.fw, model.onnx (where the model can be exported), report.json and its page into a folder."""
        out = prepare(Path(directory))
        provenance = {key: self.report[key] for key in ("featherweight", "source", "chain", "seed")}
        provenance["metric"] = {"name": self.report["result"]["metric_detail"]["name"], "valid": self.report["valid"]}
        inputs, coder = self.example_inputs, self.report["coder"]
        save(self.model, out / "model.fw", example_inputs=inputs, coder=coder, provenance=provenance)
        if self.report["onnx"]["written"]:
            export.onnx(self.model, out / "model.onnx", example_inputs=inputs)
        write_json(out / "report.json", self.report)
        self.report_html(out / "report.html")
        return out

    def report_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the report as one HTML page, which opens without a network, and returns its path."""
        return pages.write(pages.page(self.report), path)


def compress(
    model: nn.Module,
    task: Task,
    method: Step | Sequence[Step] | None = None,
    *,
    until: str | None = None,
    guard: str | None = None,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    resume: bool = False,
    strict: bool = False,
    measure: bool = True,
    onnx: bool = True,
    student: nn.Module | None = None,
    teacher_share: float | None = None,
    without_class: bool = False,
    threads: int | None = None,
    tracker: tracking.Tracker | None = None,
    tracker_dir: str | os.PathLike[str] | None = None,
    show: bool = False,
    **options: Any,
) -> Result:
    """Chains methods until the budget holds and measures the result. The caller's model is never changed.

    Of several processes (`accelerate launch`) all train together, see `fit`; the main one alone measures sizes and
    times and writes files, into a folder that the others can read, and all get its report.

    Args:
        model: the trained network; it is also the teacher of methods that want one, unless the task names another.
        task: data, loss and metric.
        method: an id of the catalogue with `options`, a function `(model, task, **options) -> model`, or a chain of
            ids, `(id, options)` pairs and functions. With a student it may be left out, and is "kd".
        until: stop as soon as this holds, such as "size<=0.1x, latency<=5ms"; the whole chain runs without it.
        guard: roll a method back that breaks this, such as "drop<=0.5pt" (points of the metric on `task.valid`).
        out: folder for model.fw, model.onnx, report.json, report.html and the checkpoints of finished methods.
        seed: every method starts from a seed made of this and its place in the chain.
        resume: go on from the last finished method of the same run in `out`.
        strict: the guard must hold at the upper end of the 95 % interval of the drop, not only at the point estimate.
        measure: also count cost and bytes and time latency; without it only the metric is measured.
        onnx: also write and check the ONNX file.
        student: the network that gets smaller or is trained in place of the model, which is then only the teacher.
        teacher_share: share of the teacher (the task's, or else the model as it was) in the loss of every training of
            methods that have no teacher of their own; none when left out.
        without_class: compress the network's graph in place of its class (see `featherweight.wire`): channels can go
            where the class's own code would not follow, and the result needs no class.
        threads: threads of PyTorch, on which the bytes of a result depend; as many as there are when left out.
        tracker: log every step's losses and every method's figures with "tensorboard", "wandb", "mlflow" or another of
            Accelerate's trackers, by name or as an object.
        tracker_dir: folder of trackers that write files; `tracking` in `out` when left out.
        show: show progress on standard error.

    Raises:
        FeatherweightError: anything that is wrong with the call, in one sentence; nothing has been written then.
    """
    settings: dict[str, Any] = {"until": until, "guard": guard, "strict": strict, "seed": seed, "threads": threads}
    settings |= {
        "measure": measure,
        "onnx": onnx,
        "out": out,
        "teacher_share": teacher_share,
        "without_class": without_class,
        "resume": resume,
        "tracker_dir": tracker_dir,
    }
    check_settings(settings)
    method = _method(method, student)
    logs = tracker_dir if tracker_dir is not None or out is None else Path(out) / "tracking"
    with within("tracker"):
        trackers = None if tracker is None else tracking.check_tracker(tracker, logs)
    with progress.showing(show and processes.is_main()), threads_of(threads):
        if trackers and out is not None and processes.is_main():
            prepare(Path(out))  # before anything is logged there
        session = _Session(
            model,
            task,
            check(model, task, method, student=student, **options),
            limits=budget.parse(until),
            guards=budget.parse(guard),
            seed=seed,
            strict=strict,
            measure=measure,
            write_onnx=onnx,
            student=student,
            teacher_share=teacher_share or 0.0,
            without_class=without_class,
        )
        with (
            stopwatch(seconds=LATENCY_SECONDS) as timed,
            measuring.timing(timed),
            recalling(),
            tracking.tracking(trackers, logs, session.told()),
        ):
            return session.run(None if out is None else Path(out), resume)


def _method(method: Step | Sequence[Step] | None, student: nn.Module | None) -> Step | Sequence[Step]:
    """What was asked for; a student alone asks to be trained."""
    if method is None and student is None:
        raise BadOption("there is no method: name at least one, such as 'magnitude_iterative', or pass student=")
    return TRAINS_A_STUDENT if method is None else method


def check(
    model: nn.Module, task: Task, method: Step | Sequence[Step], *, student: nn.Module | None = None, **options: Any
) -> list[tuple[Entry, dict[str, Any]]]:
    """Refuses what `compress` would refuse of a chain, and returns it as (entry, options).

    Raises:
        FeatherweightError: in one sentence, `place` set where it lies in the chain.
    """
    chain = _chain(method, options)
    for network in (model, student) if student is not None else (model,):
        _check(network, task, chain)
    _check_layers(model if student is None else student, task.teacher or model, chain)
    return chain


def _chain(method: Any, options: Mapping[str, Any]) -> list[tuple[Entry, dict[str, Any]]]:
    """The chain as (entry, options), every name and option checked."""
    several = isinstance(method, list) or (isinstance(method, tuple) and not _is_pair(method))
    if several and options:
        raise BadOption(f"options {sorted(options)} beside a chain: put them into its (id, options) pairs")
    steps = list(method) if several else [(method, options)] if not _is_pair(method) else [method]
    if not steps:
        raise BadOption("the chain is empty: name at least one method, such as 'magnitude_iterative'")
    chain = []
    for index, step in enumerate(steps):
        name, given = step if isinstance(step, tuple) else (step, {})
        with within("chain", index):
            with within("method"):
                entry = _entry(name)
            with within("options"):
                catalogue.check_options(entry, given)
        chain.append((entry, dict(given)))
    for later, (entry, _) in enumerate(chain):
        for earlier, _ in chain[:later]:
            for (had, gets), why in LOSES.items():
                if had in earlier.shrinks and gets in entry.shrinks:
                    cure = "choose one of them" if had == gets else "put it first"
                    with within("chain", later):
                        raise BadOption(f"{entry.id} after {earlier.id} would lose what that achieved ({why}): {cure}")
    return chain


def _is_pair(method: Any) -> bool:
    return isinstance(method, tuple) and len(method) == 2 and isinstance(method[1], Mapping)


def _entry(name: Any) -> Entry:
    if isinstance(name, Entry):
        return name
    if callable(name) and not hasattr(name, "__entry__"):
        called = getattr(name, "__name__", type(name).__name__)
        return Entry(id=called, family="user", paper="", function=name)
    return name.__entry__ if callable(name) else catalogue.entry(str(name), kind="method")


def _check(model: nn.Module, task: Task, chain: list[tuple[Entry, dict[str, Any]]]) -> None:
    """Everything that can be refused before any work is done."""
    if not isinstance(task, Task):
        raise BadOption(f"the task is a {type(task).__name__}: pass a featherweight.Task")
    if not isinstance(model, nn.Module):
        raise BadOption(f"the model is a {type(model).__name__}: pass a torch.nn.Module")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BadData(f"{name} holds NaN or infinite values: train or load the model again before compressing it")
    for entry, _ in chain:
        # the original stands in for a teacher, so that need is always met in a chain
        check_needs(entry.needs - {"teacher"}, task, entry.id)
    probe = copy.deepcopy(model).eval()
    for name, batches in (("validation", task.valid), ("training", task.train), ("test", task.test)):
        if batches is not None:
            _probe(probe, task, first(batches, name), name)


def _check_layers(model: nn.Module, teacher: nn.Module, chain: list[tuple[Entry, dict[str, Any]]]) -> None:
    """Refuses layer patterns that match nothing, as far as it can be known: an earlier method may change the layers."""
    for index, (entry, given) in enumerate(chain):
        with within("chain", index, "options"):
            find_layers(model, teacher, allowed.hints(entry.function), {**entry.defaults, **given})
        if entry.family == "user" or "factors" in entry.shrinks:
            if later := ", ".join(one.id for one, _ in chain[index + 1 :]):
                progress.say(f"{entry.id} may change layers: those that {later} works on are looked up when it starts")
            return


def _probe(model: nn.Module, task: Task, batch: Any, name: str) -> None:
    """Runs model, loss and metric on one batch, so that data that do not fit are refused before any work."""
    shapes = [tuple(v.shape) for v in _tensors(batch)]
    try:
        with torch.no_grad():
            output, target = run(model, task, batch)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = str(error).split("\n")[0]
        raise BadData(f"the model does not run on a {name} batch of shapes {shapes}: {reason}") from error
    try:
        with torch.no_grad():
            if name == "training" and target is not None:
                task.loss(output, target)
            elif name != "training" and task.evaluate is None and task.metric.per_sample is not None:
                task.metric.per_sample(output, target)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        told = "no labels" if target is None else "these labels"
        what = "loss" if name == "training" else f"metric {task.metric.name!r}"
        reason = str(error).split("\n")[0]
        raise BadData(f"the {what} does not take a {name} batch of shapes {shapes} with {told}: {reason}") from error


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if hasattr(value, "values") else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


@dataclass
class _State:
    """What a run has reached: the current model with its forms, and the records of the stages so far."""

    model: nn.Module
    stages: list[dict[str, Any]]
    done: bool = False


class _Session:
    """One call of `compress`: what does not change while it runs, and its steps."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        chain: list[tuple[Entry, dict[str, Any]]],
        *,
        limits: tuple[budget.Limit, ...],
        guards: tuple[budget.Limit, ...],
        seed: int,
        strict: bool,
        measure: bool,
        write_onnx: bool,
        student: nn.Module | None,
        teacher_share: float,
        without_class: bool,
    ) -> None:
        self.original = copy.deepcopy(model).eval().requires_grad_(False)
        subject = model if student is None else student
        self.named = type(subject).__name__
        self.template = (wire(subject, task.inputs()) if without_class else copy.deepcopy(subject)).eval()
        self.without_class = without_class
        self.task = task if task.teacher is not None else replace(task, teacher=self.original)
        self.chain, self.limits, self.guards = chain, limits, guards
        self.seed, self.strict, self.measure, self.write_onnx = seed, strict, measure, write_onnx
        self.student, self.teacher_share = student is not None, teacher_share
        self.inputs = task.inputs()
        self.coder = next((entry.coder for entry, _ in reversed(chain) if entry.coder), None)

    def run(self, out: Path | None, resume: bool) -> Result:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            self.scratch = Path(scratch)
            folder = processes.main_only(lambda: self.scratch if out is None else prepare(out))
            self.checkpoints = Checkpoints(folder / "stages", self.keys())
            progress.say("measuring the original")
            start = time.perf_counter()
            self.before = processes.from_main(evaluate(self.original, self.task, "valid", "evaluate the original"))
            self.evaluation_seconds = time.perf_counter() - start
            self.remarks = examine(self.template, self.inputs)
            for remark in self.remarks:
                progress.say(f"note: {remark}")
            if self.strict and self.guards and self.before.per_sample is None:
                raise BadOption(f"strict needs an interval, and {self.before.name} has none: give it per_sample=...")
            self.base = processes.main_only(lambda: self._figures(self.original, raw_bytes(self.original)))
            state = self._resumed(resume)
            while len(state.stages) < len(self.chain) and not state.done:
                state = self._stage(state, len(state.stages))
                record = {"stages": state.stages, "done": state.done, "base": self.base, "step": tracking.step()}
                processes.main_only(partial(self.checkpoints.store, len(state.stages) - 1, state.model, record))
            final = bake(self._model(state, self._nearest(state.stages))).eval()
            report = processes.main_only(lambda: self._finish(state, final, folder, started))
            return Result(final, report, self.inputs)

    def _nearest(self, stages: list[dict[str, Any]]) -> int | None:
        """The place of the stage to hand back: the last that was kept or, with a budget, the nearest to it."""
        kept = [index for index, stage in enumerate(stages) if not stage["rolled_back"]]
        return min(reversed(kept), key=lambda index: self._excess(stages[index]), default=None)

    # --- one stage ----------------------------------------------------------------------------------------------------

    def _stage(self, state: _State, index: int) -> _State:
        """Runs the method at place `index` on a copy, measures what came out, and keeps it or rolls it back."""
        entry, options = self.chain[index]
        progress.say(f"[{index + 1}/{len(self.chain)}] {entry.id} {_named(options)}".rstrip())
        started = time.perf_counter()
        seed_everything(self.seed, index)
        candidate = copy.deepcopy(state.model)
        before = fingerprint(candidate)
        with ledger.recording() as remarks:
            task = self._taught(entry, options)
            with measuring.weighing(lambda one: self._save(one, self.scratch / "weighed.fw", 0.0).bytes):
                candidate = entry(candidate, task, **{**self._budgeted(entry, options), **options})
            if not isinstance(candidate, nn.Module):
                raise CompressionError(f"{entry.id} returned a {type(candidate).__name__}: a method returns the model")
            candidate.eval()
            if fingerprint(candidate) == before:
                skipped = "; ".join(f"{p}: {why}" for p, why in list(remarks.skipped.items())[:3])
                raise CompressionError(f"{entry.id} changed nothing" + (f" ({skipped})" if skipped else ""))
            seconds = time.perf_counter() - started
            baked = bake(copy.deepcopy(candidate))
            after = processes.from_main(evaluate(baked, self.task, "valid", f"evaluate {entry.id}"))
            file = self.checkpoints.file(index, "fw")
            reached = processes.main_only(lambda: self._figures(baked, self._save(baked, file, after.value).bytes))
        reached["drop"] = 100 * drop(self.before, after)
        record = {
            "method": entry.id,
            "options": {key: catalogue.plain(value) for key, value in options.items()},
            "seconds": seconds,
            "metric": after.value,
            "metric_told": str(after),
            "metric_detail": _told(after)["metric_detail"],
            "paired_interval": _percent(paired_drop(self.before, after, self.task.metric)),
            **reached,
            "skipped": remarks.skipped,
            "notes": remarks.notes,
            "tables": remarks.tables,
            "rolled_back": False,
        }
        broken = self._broken(reached, after)
        figures = {"metric": after.value, **reached, "rolled_back": bool(broken), "seconds": seconds}
        tracking.record({f"ledger/{name}": value for name, value in figures.items()})
        if broken:
            progress.say(f"    rolled back: {broken}")
            record |= {"rolled_back": True, "why": broken}
            return _State(state.model, [*state.stages, record])
        done = bool(self.limits) and all(limit.holds(reached, self.base) for limit in self.limits)
        told = ", ".join(limit.told(reached, self.base) for limit in self.limits)
        progress.say(f"    {after}" + (f"; {told}" if told else ""))
        return _State(candidate, [*state.stages, record], done)

    def _taught(self, entry: Entry, options: Mapping[str, Any]) -> Task:
        """The task for a method: with a teacher in every training, if that was asked for and it has none of its own."""
        own = (
            "teacher" in entry.needs
            or entry.family == "distill"
            or bool({**entry.defaults, **options}.get("teacher_share"))
        )
        if own or not self.teacher_share:
            return self.task
        ledger.note(f"every training has a teacher, with {self.teacher_share:.0%} of the loss")
        return under_teacher(self.task, self.teacher_share)

    def _budgeted(self, entry: Entry, options: Mapping[str, Any]) -> dict[str, Any]:
        """The budget of the whole run, for a method that can aim at one and was told nothing else to aim at."""
        taken = {option.name for option in entry.options()}
        if "within" in taken:
            aims = [(one.quantity, one.allowed(self.base)) for one in self.limits if one.quantity in WEIGHED]
            if not aims or options.keys() & {"within", "loss"}:
                return {}
            quantity, most = min(aims, key=lambda aim: (list(WEIGHED).index(aim[0]), aim[1]))  # it takes a single one
            return {"within": f"{quantity}<={most:.12g}{WEIGHED[quantity]}"}
        told = [limit.text for limit in self.limits if limit.quantity in AIMED_AT]
        if "budget" not in taken or not told or options.keys() & {"budget", "prune_ratio", "sparsity"}:
            return {}
        if "grain" in taken and (options.get("grain") or entry.defaults.get("grain")) != "filter":
            return {}
        return {"budget": ", ".join(told)}

    def _broken(self, reached: Mapping[str, float], after: Score) -> str:
        """Which guard does not hold, or an empty string."""
        figures = dict(reached)
        interval = paired_drop(self.before, after, self.task.metric)
        if self.strict and interval is not None:
            figures["drop"] = 100 * interval[1]
        return ", ".join(g.told(figures, self.base) for g in self.guards if not g.holds(figures, self.base))

    def _excess(self, stage: Mapping[str, Any]) -> float:
        """How far a stage is from the budget: what was reached divided by what is allowed, of the limit that binds."""
        return max((limit.excess(stage, self.base) for limit in self.limits), default=0.0)

    def _save(self, model: nn.Module, path: Path, valid: float) -> SaveReport:
        """Writes a file with its provenance: a stage's file is, byte for byte, what the result's would be."""
        provenance = {**self.header(), "metric": {"name": self.task.metric.name, "valid": valid}}
        path.parent.mkdir(exist_ok=True)
        return save(model, path, example_inputs=self.inputs, coder=self.coder, provenance=provenance)

    def header(self) -> dict[str, Any]:
        """What was asked for: tool, source, chain and seed."""
        return {
            "featherweight": version("featherweight"),
            "source": {"sha256": digest(self.template), "model": self.named},
            "chain": [[e.id, {k: catalogue.plain(v) for k, v in o.items()}] for e, o in self.chain],
            "seed": self.seed,
        }

    def told(self) -> dict[str, Any]:
        """What was asked for, for trackers: plain words and numbers only."""
        texts = {"until": self.limits, "guard": self.guards}
        chain = "; ".join(f"{entry.id} {_named(options)}".rstrip() for entry, options in self.chain)
        limits = {name: ", ".join(limit.text for limit in held) for name, held in texts.items()}
        asked = {"seed": self.seed, "strict": self.strict, "teacher_share": self.teacher_share}
        return {"chain": chain, **limits, **asked}

    def reproduce(self) -> dict[str, Any]:
        """A recipe of this run, what `fw.run` needs beside it, and why there is none where that is so."""
        own = [entry.id for entry, _ in self.chain if entry.family == "user"]
        own += [
            f"{e.id}({key}=)" for e, options in self.chain for key, value in options.items() if not _is_plain(value)
        ]
        if own:
            return {"recipe": None, "needs": [], "why": f"only Python can say {', '.join(own)}"}
        steps = [{"method": e.id, **({"options": recipe_text.plain(o)} if o else {})} for e, o in self.chain]
        found: dict[str, Any] = {"chain": steps}
        for name, limits in (("until", self.limits), ("guard", self.guards)):
            found |= {name: ", ".join(limit.text for limit in limits)} if limits else {}
        found |= {"strict": True} if self.strict else {}
        found |= {"teacher_share": self.teacher_share} if self.teacher_share else {}
        found |= {"without_class": True} if self.without_class else {}
        found |= {"seed": self.seed, "threads": torch.get_num_threads()}
        found |= {name: False for name, held in (("measure", self.measure), ("onnx", self.write_onnx)) if not held}
        return {"recipe": found, "needs": ["model", "task", *(["student"] if self.student else [])], "why": ""}

    def _figures(self, model: nn.Module, size: int) -> dict[str, float]:
        """The figures that budgets are about, as far as they are wanted; `size` in bytes, as measured on the file."""
        wanted = {limit.quantity for limit in (*self.limits, *self.guards)}
        found: dict[str, float] = {"size": size}
        if self.measure or wanted & {"params", "macs", "nonzeros"}:
            counted = cost(model, self.inputs)
            found |= {"params": counted.params, "nonzeros": counted.nonzeros, "macs": counted.macs}
        if "latency" in wanted:
            found["latency"] = self._latency(model)
        return found

    def _latency(self, model: nn.Module) -> float:
        """Milliseconds in ONNX Runtime, batch 1, one thread: the original's, times the ratio measured beside it."""
        reference, result = self.scratch / "original.onnx", self.scratch / "candidate.onnx"
        if not reference.exists():
            export.onnx(self.original, reference, example_inputs=self.inputs)
        export.onnx(model, result, example_inputs=self.inputs)
        files = {"original": reference, "result": result}
        before, after = latency(
            self.original, model, self.inputs, files, batches=(1,), runtimes=("onnxruntime",), seconds=LATENCY_SECONDS
        )
        return self.base["latency"] * after.ratio if hasattr(self, "base") else before.median

    # --- resume -------------------------------------------------------------------------------------------------------

    def keys(self) -> list[str]:
        """For each place in the chain, what the state after it depends on: weights, data, seed, budget, methods."""
        texts = [limit.text for limit in (*self.guards, *self.limits)]
        used = [self.task.loss, self.task.metric.name, self.task.fit, self.task.evaluate, self.task.teacher_split]
        nets = [digest(net) for net in (self.template, self.original, self.task.teacher) if net is not None]
        start = [
            *nets,
            self._data(),
            self.seed,
            self.strict,
            self.teacher_share,
            texts,
            [identity(u) for u in used],
            versions(),
        ]
        chain = [[identity(e.function), e.id, {k: identity(v) for k, v in o.items()}] for e, o in self.chain]
        made = [json.dumps([start, chain[: index + 1]], sort_keys=True) for index in range(len(chain))]
        return [hashlib.sha256(text.encode()).hexdigest() for text in made]

    def _data(self) -> str:
        """SHA-256 over the first batch of every split, seeded because training data may shuffle."""
        found = hashlib.sha256()
        for name in ("valid", "train", "calibration", "test"):
            seed_everything(self.seed, -2)
            batches = getattr(self.task, name)
            for tensor in _tensors(first(batches, name)) if batches is not None else []:
                found.update(f"{name} {tuple(tensor.shape)}".encode())
                found.update(raw(tensor))
        return found.hexdigest()

    def _resumed(self, resume: bool) -> _State:
        found = self.checkpoints.latest(self._fresh) if resume else None
        processes.wait()  # until all have looked
        if found is None:
            processes.main_only(self.checkpoints.clear)
            return _State(self._fresh(), [])
        index, model, record = found
        progress.say(f"resuming after {index + 1} of {len(self.chain)} methods")
        tracking.resume_at(record["step"])
        self.base = record["base"]  # a latency is compared with the original's of the run that it was measured in
        return _State(model, record["stages"], record["done"])

    def _fresh(self) -> nn.Module:
        return copy.deepcopy(self.template)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _finish(self, state: _State, final: nn.Module, folder: Path, started: float) -> dict[str, Any]:
        """Writes the files beside those of an earlier run, reads them back, measures what was read, replaces them."""
        nearest = self._nearest(state.stages)
        accepted = None if nearest is None else state.stages[nearest]
        split = "test" if self.task.test is not None and self.task.evaluate is None else "valid"
        report = {**self.header(), **self._verdict(state.stages, accepted), "split": split, "remarks": self.remarks}
        valid = self.before.value if accepted is None else accepted["metric"]
        report["valid"] = valid
        report["base"] = {**_told(self.before), **self.base}
        fresh = folder / FRESH
        fresh.mkdir(exist_ok=True)
        saved = self._save(final, fresh / "model.fw", valid)
        reloaded = load(fresh / "model.fw", into=self._fresh()).eval()
        report["file"] = self._opened(saved, reloaded, fresh / "model.fw")
        original = evaluate(self.original, self.task, split, "test the original")
        reached = evaluate(reloaded, self.task, split, "test the file")
        report["original"] = {**_told(original), "bytes": raw_bytes(self.original)}
        report["result"] = {**_told(reached), "bytes": saved.bytes}
        report["drop"] = {
            "points": 100 * drop(original, reached),
            "paired_interval": _percent(paired_drop(original, reached, self.task.metric)),
            "paired_test": paired_test(original, reached),
        }
        files = self._exported(report, final, fresh / "model.onnx", valid)
        if self.measure:
            self._measured(report, final, saved, files)
        report["seconds"] = time.perf_counter() - started
        write_json(fresh / "report.json", report)
        pages.write(pages.page(report), fresh / "report.html")
        take_over(fresh, folder)
        return report

    def _opened(self, saved: SaveReport, reloaded: nn.Module, path: Path) -> dict[str, Any]:
        """Whether the file opens without the model's class, and how far what it then computes is from the model."""
        if not saved.class_free:
            return {"class_free": False, "why": saved.why_not}
        try:
            largest, wrong = compared(answer(reloaded.cpu(), self.inputs), answer(load(path), self.inputs))
        except FeatherweightError as error:
            wrong = str(error)
        return {"class_free": False, "why": wrong} if wrong else {"class_free": True, "largest_difference": largest}

    def _model(self, state: _State, index: int | None) -> nn.Module:
        """A copy of the model after the stage at a place of the chain."""
        later = [] if index is None else state.stages[index + 1 :]
        if index is None or all(stage["rolled_back"] for stage in later):
            return copy.deepcopy(state.model)
        held = self.checkpoints.read(index, self._fresh)
        if held is None:
            raise BadData(f"the checkpoint of stage {index + 1} is gone: run the chain again without resume")
        return held[0]

    def _verdict(self, stages: list[dict[str, Any]], accepted: dict[str, Any] | None) -> dict[str, Any]:
        """What came of the chain and the budget."""
        missed = [limit for limit in self.limits if accepted is None or not limit.holds(accepted, self.base)]
        binds = [limit.told(accepted, self.base) for limit in missed] if accepted else ["every method was rolled back"]
        return {
            "budget": {
                "until": [limit.text for limit in self.limits],
                "guard": [g.text for g in self.guards],
                "strict": self.strict,
                "reached": not missed,
                "binds": binds if missed else [],
                "limits": [
                    self._limit(limit, accepted, guard)
                    for limits, guard in ((self.limits, False), (self.guards, True))
                    for limit in limits
                ],
            },
            "accepted": None if accepted is None else stages.index(accepted),
            "coder": self.coder,
            "stages": stages,
            "layers": [],
            "environment": environment(),
            "reproduce": self.reproduce(),
        }

    def _limit(self, limit: budget.Limit, accepted: dict[str, Any] | None, guard: bool) -> dict[str, Any]:
        """A limit of the budget or the guard in base units, beside what was reached on the validation data."""
        return {
            "text": limit.text,
            "quantity": limit.quantity,
            "guard": guard,
            "allowed": limit.allowed(self.base),
            "reached": None if accepted is None else accepted[limit.quantity],
            "holds": accepted is not None and limit.holds(accepted, self.base),
        }

    def _measured(self, report: dict[str, Any], final: nn.Module, saved: Any, files: dict[str, Path]) -> None:
        after, before = figures_of(final, self.inputs, saved), cost(self.original, self.inputs)
        report["original"] |= {"params": before.params, "macs": before.macs, "nonzeros": before.nonzeros}
        report["result"] |= {k: after[k] for k in ("params", "macs", "nonzeros")} | {
            "size": after["bytes"],
            "macs_note": after["macs_note"],
        }
        was = rows(self.original, before)
        reasons = {path: why for stage in report["stages"] for path, why in stage["skipped"].items()}
        report["layers"] = [
            {**row, "original": was.get(row["path"]), "left_alone": reasons.get(row["path"])} for row in after["layers"]
        ]
        anatomy.describe(
            report,
            self.original,
            final,
            was,
            inputs=self.inputs,
            task=self.task,
            before=self.before,
            seconds=LATENCY_SECONDS / 2,
            once=self.evaluation_seconds,
        )
        timed = latency(self.original, final, self.inputs, files, seconds=LATENCY_SECONDS)
        report["latency"] = [asdict(row) for row in timed]
        runtime = "onnxruntime" if files else "torch"
        for row in timed:
            if row.batch == 1 and row.runtime == runtime:
                report[row.name] |= {"latency": row.median, "latency_runtime": runtime}

    def _exported(self, report: dict[str, Any], final: nn.Module, path: Path, valid: float) -> dict[str, Path]:
        """Writes model.onnx and measures the metric on it; a model that cannot be exported is told so in the report."""
        if not self.write_onnx:
            report["onnx"] = {"written": False, "why": "not asked for"}
            return {}
        try:
            told = export.onnx(final, path, example_inputs=self.inputs)
            reference = self.scratch / "original.onnx"
            export.onnx(self.original, reference, example_inputs=self.inputs)
        except FeatherweightError as error:
            progress.say(f"no ONNX file: {error}")
            report["onnx"] = {"written": False, "why": str(error)}
            return {}
        # a procedure of the user's own takes modules, not sessions
        own = self.task.evaluate is not None
        score = None if own else evaluate(export.session(path), self.task, "valid", "evaluate the ONNX file").value
        if score is not None and abs(score - valid) > ONNX_GAP:
            path.unlink()
            why = f"its {self.task.metric.name} is {score:.4f}, that of the module {valid:.4f}"
            report["onnx"] = {"written": False, "why": f"the ONNX file disagrees with the module: {why}"}
            return {}
        report["onnx"] = {
            "written": True,
            **{key: value for key, value in told.facts().items() if key != "path"},
            "metric_valid": score,
            "metric_valid_of_the_module": valid,
        }
        return {"original": reference, "result": path}


def _told(score: Score) -> dict[str, Any]:
    detail = {k: v for k, v in vars(score).items() if k not in ("per_sample", "targets", "value")}
    return {"metric": score.value, "metric_detail": detail, "params": None, "macs": None, "latency": None}


def _is_plain(value: Any) -> bool:
    """Whether a recipe can say it."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


def _percent(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else [100 * interval[0], 100 * interval[1]]


def _named(options: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={catalogue.plain(value)}" for key, value in options.items())
