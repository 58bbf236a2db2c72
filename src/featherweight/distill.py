"""The verb `distill`: a student learns what a frozen teacher computes, beside the labels or in place of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, final

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, File, Positive, checked
from featherweight.catalogue import Slot, fill
from featherweight.core.features import INPUT, Taps, is_map, matched, outputs, same_size
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note, show
from featherweight.core.settings import name_of, with_settings
from featherweight.core.surgery import taps
from featherweight.core.task import Batch, Task, device_of, eval_mode, first, loss_of, prediction, run, to_device
from featherweight.core.taught import teacher_of
from featherweight.core.teacher_cache import cached
from featherweight.errors import BadData, BadOption, UnknownName

Match = Callable[[Taps, Taps, Batch, float], Tensor]
"""`(student's taps, teacher's taps, batch, progress) -> loss`; a module's parameters train along and are dropped.

An ingredient says beside its formula what it looks at: `where` (see `core.features.Places`), `same` ("channels" or
"size" of paired features must agree), `inputs` (it differentiates by the network's input), `samples` (how many of them
a batch must have).
"""

Adapter = Callable[[Tensor, Tensor], nn.Module]
"""`(student's features, teacher's features) -> module` that turns the first into the shape of the second, (batch,
channels, ...)."""

Weight = float | Callable[[float], float]
"""A number, or progress -> number."""


@dataclass(frozen=True)
class Term:
    """One thing that the student learns from its teacher.

    Args:
        match: what is compared and how.
        weight: of the term.
        pairs: (student's layer, teacher's layer); found where the match says if left out.
        limited: the norm of the term's gradient is at most that of the labels' loss, parameter by parameter.
    """

    match: Match | str
    weight: Weight = 1.0
    pairs: Sequence[tuple[str, str]] | None = None
    limited: bool = False


def learns(options: Mapping[str, Any]) -> None:
    """Refuses a loss without terms."""
    if not any(options[name] for name in ("labels", "weight", "soft")):
        raise BadOption("labels=0 and weight=0 leave nothing to learn from: raise one of them")


@checked(learns)
def distill(
    model: nn.Module,
    task: Task,
    *,
    match: Annotated[str, Slot("match")] | Match = "softened",
    pairs: Sequence[tuple[str, str]] | None = None,
    labels: Amount = 0.1,
    weight: Amount | Callable[[float], float] = 0.9,
    soft: Amount = 0.0,
    temperature: Positive = 4.0,
    adapter: Annotated[str, Slot("adapter")] | Adapter = "one_by_one_match",
    settings: Mapping[str, Any] | None = None,
    whole: bool = True,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    params: Iterable[nn.Parameter] | None = None,
    teacher_cache: File | None = None,
) -> nn.Module:
    """Trains `model`, the student, on `labels * task.loss + weight * match(student, teacher)`.

    The teacher is `task.teacher`, in evaluation mode; nothing changes it.

    Args:
        match: what is compared and how (slot `match`).
        pairs: (student's layer, teacher's layer) whose outputs `match` looks at, beside the logits; found when left
            out: the last layer before the logits, or the last maps of each size, as `match` needs them.
        labels: weight of the task's own loss; 0 leaves it out.
        weight: weight of the match, a number or progress -> number; 0 leaves it out.
        soft: weight of the teacher's softened probabilities (`kd`'s term) beside the match; 0 leaves it out.
        temperature: of this term.
        adapter: joins features of unequal widths where `match` needs equal ones; trained along, then dropped.
        settings: options of `match`, such as {"neighbours": 5}.
        whole: False runs both networks only as far as the paired layers: there are no logits, and nothing above them
            changes, running statistics included.
        epochs: passes over the training data.
        lr: learning rate.
        optimizer: as in `fit`.
        params: parameters of the student that are trained; all of them when left out.
        teacher_cache: folder in which the teacher's outputs for every training batch are kept, and read in later
            passes and runs; for data in a fixed order without random augmentation. The student is the same.

    Raises:
        MissingNeed: the task has no teacher.
        BadOption: all weights are 0, the teacher is the student, or its features cannot be compared with the student's;
            with `teacher_cache`, the match differentiates the teacher, or the teacher is random.
        UnknownName: a pair names a layer that is not there.
        BadData: a batch has too few samples for the comparison; `teacher_cache` is of another teacher or other data.
    """
    formula = with_settings(fill("match", match), settings or {})
    terms = {name_of(formula): Term(formula, weight, pairs)} if callable(weight) or weight else {}
    if soft:
        terms["softened"] = Term(partial(fill("match", "softened"), temperature=temperature), soft, ())
    return learn(
        model,
        task,
        terms,
        labels=labels,
        adapter=adapter,
        whole=whole,
        epochs=epochs,
        lr=lr,
        optimizer=optimizer,
        params=params,
        teacher_cache=teacher_cache,
    )


def learn(
    model: nn.Module,
    task: Task,
    terms: Mapping[str, Term],
    *,
    labels: float = 1.0,
    adapter: str | Adapter = "one_by_one_match",
    whole: bool = True,
    epochs: float,
    lr: float,
    optimizer: Optimizers = None,
    params: Iterable[nn.Parameter] | None = None,
    teacher_cache: File | None = None,
) -> nn.Module:
    """`distill` with any number of terms: trains `model` on `labels * task.loss` and their sum; see there."""
    teacher = teacher_of(model, task)
    joined = {
        name: Joined.of(name, term, model, task, teacher, fill("adapter", adapter)) for name, term in terms.items()
    }
    added = [p for one in joined.values() for p in one.parameters()]
    if added:
        note(f"adapters have {sum(p.numel() for p in added):,} parameters, in training only")
    if terms:
        show("distill", {name: one.told() for name, one in joined.items()})
    ours = list(dict.fromkeys(a for one in joined.values() for a, _ in one.pairs))
    theirs = list(dict.fromkeys(b for one in joined.values() for _, b in one.pairs))
    inputs = any(one.inputs for one in joined.values())
    trained = list(model.parameters() if params is None else params)

    def asked(batch: Batch) -> Taps:
        with unchanged(teacher) if inputs else eval_mode(teacher):
            return tapped(teacher, teacher, task.of_teacher(), batch, theirs, whole, inputs)[0]

    ask = answering(asked)
    if joined and teacher_cache is not None and epochs:
        if inputs:
            raise BadOption("what differentiates the teacher by its input cannot be kept: leave teacher_cache out")
        ask = cached(teacher_cache, teacher, task.of_teacher(), [*theirs, *([""] if whole else [])], ask)

    def step(student: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        losses = {}
        seen, output, target = tapped(student, model, task, batch, ours, whole, inputs)
        if labels:
            losses["labels"] = labels * loss_of(task, output, target)
        if joined:
            shown = to_device(ask(batch), device_of(model))
        for name, one in joined.items():
            loss = one(seen, shown, batch, progress)
            loss = limited(loss, losses["labels"], trained) if one.limited else loss
            losses[name] = one.weight(progress) * loss
        return losses

    return task.fit(
        model, task, epochs=epochs, lr=lr, optimizer=optimizer, step=step, params=trained + added, label="distill"
    )


def answering(ask: Callable[[Batch], Taps]) -> Callable[[Batch], Taps]:
    """Asks the teacher, and looks at its first answer, before anything has been learned from it.

    Raises:
        BadData: it cannot read the batch, or what it puts out is not finite.
    """
    worked = False

    def asked(batch: Batch) -> Taps:
        nonlocal worked
        if worked:
            return ask(batch)
        try:
            shown = ask(batch)
        except (RuntimeError, TypeError, IndexError) as error:
            raise BadData(
                f"the teacher fails on the student's batches ({str(error).splitlines()[0]}): pass a teacher that takes "
                "them, or Task(teacher_split=...) with what it takes"
            ) from error
        for path, value in shown.items():
            if not torch.isfinite(value).all():
                what = f"the teacher's layer {path} puts" if path else "the teacher puts"
                raise BadData(
                    f"{what} out values that are not finite on the first training batch: look at the teacher's weights "
                    "and at the data"
                )
        worked = True
        return shown

    return asked


@final
class Joined(nn.Module):
    """A term ready to be computed: its layers found, their shapes joined by adapters, its batches large enough.

    Args:
        name: how the term is called in messages.
        match, weight, limited: of the term.
        pairs: (student's layer, teacher's layer).
        adapters: student's layer -> what its features go through, by number.
    """

    def __init__(
        self, name: str, term: Term, match: Match, pairs: Sequence[tuple[str, str]], adapters: Mapping[int, nn.Module]
    ) -> None:
        super().__init__()
        facts = facts_of(match)
        self.name, self.match, self.pairs, self.limited = name, match, list(pairs), term.limited
        self.share = term.weight
        self.inputs, self.samples, self.same = facts.get("inputs"), facts.get("samples", 1), facts.get("same", "")
        self.adapters = nn.ModuleDict({str(index): adapter for index, adapter in adapters.items()})
        self.worked = False

    @classmethod
    def of(cls, name: str, term: Term, model: nn.Module, task: Task, teacher: nn.Module, adapter: Adapter) -> Joined:
        """Finds the layers and makes the adapters, from one batch.

        Raises:
            BadOption, UnknownName: as `distill`.
        """
        match = fill("match", term.match)
        facts = facts_of(match)
        where, same, pairs = facts.get("where", "logits"), facts.get("same", ""), term.pairs
        if (pairs is None and where != "logits") or (pairs and same):
            batch = first(task.calibrating(), "training")
        if pairs is None:
            pairs = matched(model, teacher, task, batch, where) if where != "logits" else []
            for a, b in pairs:
                note(f"{name} compares the student's layer {a} with the teacher's layer {b}")
        elif where != "logits" and not pairs:
            raise BadOption(
                f"{name} compares layers, and pairs= names none: leave it out, or pass (student's, teacher's)"
            )
        named(model, [a for a, _ in pairs], "student")
        named(teacher, [b for _, b in pairs], "teacher")
        adapters = {}
        if pairs and same:
            with eval_mode(model), eval_mode(teacher):
                ours = tapped(model, model, task, batch, [a for a, _ in pairs], whole=False)[0]
                theirs = tapped(teacher, teacher, task.of_teacher(), batch, [b for _, b in pairs], whole=False)[0]
            for index, (a, b) in enumerate(pairs):
                s, t = ours[a], to_device(theirs[b], device_of(model))
                if s.dim() != t.dim():
                    raise BadOption(
                        f"the student's layer {a} puts out {tuple(s.shape)}, the teacher's layer {b} {tuple(t.shape)}: "
                        "pass pairs= that are both maps, or both vectors"
                    )
                if same == "channels" and width(s) != width(t):
                    adapters[index] = adapter(s, t).to(s)
                    note(f"the {width(s)} channels of {a} reach the {width(t)} of {b} through {adapters[index]}")
                if same == "size" and s.shape[2:] != t.shape[2:]:
                    note(f"the larger of the maps {a} and {b}, {_sides(s)} and {_sides(t)}, is pooled to the smaller")
        return cls(name, term, match, pairs, adapters).to(device_of(model))

    def weight(self, progress: float) -> float:
        return self.share(progress) if callable(self.share) else self.share

    def forward(self, seen: Taps, shown: Taps, batch: Batch, progress: float) -> Tensor:
        # modules look their layers up by name, formulas take them in the order of the pairs
        ours, theirs = dict(seen), dict(shown)
        if not isinstance(self.match, nn.Module):
            extra = [{key: taps[key] for key in ("", INPUT) if key in taps} for taps in (seen, shown)]
            ours = extra[0] | {f"{i}": self.adapted(i, seen[a]) for i, (a, _) in enumerate(self.pairs)}
            theirs = extra[1] | {f"{i}": shown[b] for i, (_, b) in enumerate(self.pairs)}
            if self.same == "size":
                for key in [k for k in ours if k not in ("", INPUT)]:
                    if is_map(tuple(ours[key].shape)) or is_map(tuple(theirs[key].shape)):
                        ours[key], theirs[key] = same_size(ours[key], theirs[key])
        some = next(iter(ours.values()))
        if len(some) < self.samples:
            if not self.worked:
                raise BadData(
                    f"{self.name} compares the samples of a batch and needs at least {self.samples}, not {len(some)}: "
                    "pass larger training batches"
                )
            note(f"{self.name} left out a batch of {len(some)} samples: it needs {self.samples}")
            return some.sum() * 0
        self.worked = True
        try:
            return self.match(ours, theirs, batch, progress)
        except RuntimeError as error:
            unlike = [(a, seen[a], b, shown[b]) for a, b in self.pairs if seen[a].shape != shown[b].shape]
            if not unlike:
                raise
            a, s, b, t = unlike[0]
            raise BadOption(
                f"{self.name} cannot compare the student's layer {a}, {tuple(s.shape)}, with the teacher's layer {b}, "
                f"{tuple(t.shape)}, and no adapter joins them: pass pairs= of like shapes, or choose rkd"
            ) from error

    def adapted(self, index: int, features: Tensor) -> Tensor:
        return self.adapters[str(index)](features) if str(index) in self.adapters else features

    def told(self) -> dict[str, Any]:
        """What a report shows of it."""
        count = sum(p.numel() for p in self.parameters())
        return {"layers": [list(pair) for pair in self.pairs], "training_only_parameters": count}


def facts_of(match: Match) -> Mapping[str, Any]:
    """What an ingredient says beside its formula, also of a `partial` of it; a module of its own says nothing."""
    while isinstance(match, partial):
        match = match.func
    return getattr(match, "__ingredient__", ("match", {}))[1]


def width(features: Tensor) -> int:
    """The number of channels of maps, of features of tokens and vectors."""
    return features.shape[1] if features.dim() == 4 else features.shape[-1]


def _sides(features: Tensor) -> str:
    return "x".join(map(str, features.shape[2:]))


def named(model: nn.Module, paths: Iterable[str], whose: str) -> None:
    """Refuses paths that are no layers.

    Raises:
        UnknownName: the nearest paths are named.
    """
    try:
        with taps(model, list(paths)):
            pass
    except UnknownName as error:
        raise UnknownName(str(error).replace("layer", f"layer of the {whose}", 1)) from None


def limited(loss: Tensor, by: Tensor, params: Sequence[nn.Parameter]) -> Tensor:
    """The value of `loss`, with a gradient that has, parameter by parameter, at most the norm of that of `by`."""
    ours = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    most = torch.autograd.grad(by, params, retain_graph=True, allow_unused=True)
    total = loss.detach()
    for param, grad, bound in zip(params, ours, most, strict=True):
        if grad is not None:
            most_norm = bound.norm() if bound is not None else grad.new_zeros(())
            linear = (param * grad * (most_norm / grad.norm().clamp_min(1e-12)).clamp_max(1)).sum()
            total = total + linear - linear.detach()
    return total


@contextmanager
def unchanged(teacher: nn.Module) -> Iterator[nn.Module]:
    """The teacher in evaluation mode, its parameters constants; what depends on its input has a gradient."""
    free = [p for p in teacher.parameters() if p.requires_grad]
    with eval_mode(teacher), torch.enable_grad():
        for param in free:
            param.requires_grad_(False)
        try:
            yield teacher
        finally:
            for param in free:
                param.requires_grad_(True)


def tapped(
    called: nn.Module,
    model: nn.Module,
    task: Task,
    batch: Batch,
    paths: Sequence[str],
    whole: bool = True,
    inputs: bool | None = False,
) -> tuple[dict[str, Tensor], Any, Any]:
    """Runs `called` (the model, possibly wrapped): its taps, its output, the batch's target.

    The taps are the outputs of the layers at `paths`, and the logits under "". If the network is not run as a `whole`,
    but only until the last of these layers, there are no logits, and output and target are None. With `inputs` the
    network's input is under "<input>", and has a gradient.

    Raises:
        BadOption: with `inputs`, the network's input has no gradient; or a layer was not called.
    """
    if inputs:
        leaf, task = differentiable(task, to_device(batch, device_of(model)))
        seen, output, target = tapped(called, model, task, batch, paths, whole)
        return {**seen, INPUT: leaf}, output, target
    with taps(model, paths) as seen, _until(model, seen, paths, stop=not whole):
        try:
            output, target = run(called, task, batch)
        except _Reached:
            return dict(seen), None, None
    for path in paths:
        if path not in seen:
            raise BadOption(
                f"layer {path} is there, but the network does not call it: pass pairs= of layers that it does, such as "
                f"{', '.join(list(outputs(model, task, batch))[-3:])}"
            )
    return {**seen, "": prediction(output)}, output, target


def differentiable(task: Task, batch: Batch) -> tuple[Tensor, Task]:
    """The first input of a batch with real numbers, as a tensor with a gradient, and a task whose batches hold it.

    Raises:
        BadOption: there is none.
    """
    args, kwargs, target = task.split(batch)
    given = [*args, *kwargs.values()]
    at = next((i for i, v in enumerate(given) if isinstance(v, Tensor) and v.is_floating_point()), None)
    if at is not None:
        leaf = given[at].detach().clone().requires_grad_(True)
        held = [leaf if index == at else value for index, value in enumerate(given)]
        call = tuple(held[: len(args)]), dict(zip(kwargs, held[len(args) :], strict=True)), target
        return leaf, replace(task, split=lambda batch: call)
    raise BadOption(
        "the gradient by the input needs inputs of real numbers, which these batches do not have: choose kd"
    )


class _Reached(Exception):
    pass


@contextmanager
def _until(model: nn.Module, seen: Mapping[str, Tensor], paths: Sequence[str], *, stop: bool) -> Iterator[None]:
    """Ends a forward pass as soon as all the layers at `paths` have been seen, if it is to stop there."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if all(path in seen for path in paths):
            raise _Reached

    handles = [model.get_submodule(path).register_forward_hook(hook) for path in paths] if stop else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def below(model: nn.Module, task: Task, batch: Batch, path: str) -> list[nn.Parameter]:
    """The parameters that the output of the layer at `path` depends on: those of the layers up to it.

    Raises:
        BadOption: there are none.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.enable_grad():
            value = tapped(model, model, task, batch, [path], whole=False)[0][path]
            grads = torch.autograd.grad(value.sum(), params, allow_unused=True) if value.requires_grad else []
    finally:
        for module, training in modes.items():
            module.training = training
    found = [p for p, grad in zip(params, grads, strict=bool(grads)) if grad is not None]
    if not found:
        raise BadOption(
            f"the output of layer {path} depends on no parameter: choose a layer behind one that has weights"
        )
    return found
