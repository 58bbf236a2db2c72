"""The verb `distill`: a student learns what a frozen teacher computes, beside the labels or in place of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Positive, checked
from featherweight.catalogue import Slot, fill
from featherweight.core.fit import Optimizers
from featherweight.core.surgery import taps
from featherweight.core.task import Batch, Task, device_of, eval_mode, prediction, run, to_device
from featherweight.errors import BadOption, MissingNeed

Taps = Mapping[str, Tensor]
"""Outputs of layers by path; the logits under ""."""

Match = Callable[[Taps, Taps, Batch, float], Tensor]
"""`(student's taps, teacher's taps, batch, progress) -> loss`; a module's parameters train along and are dropped."""


def learns(options: Mapping[str, Any]) -> None:
    """Refuses a loss without terms."""
    if options["labels"] == 0 and options["weight"] == 0:
        raise BadOption("labels=0 and weight=0 leave nothing to learn from: raise one of them")


@checked(learns)
def distill(
    model: nn.Module,
    task: Task,
    *,
    match: Annotated[str, Slot("match")] | Match = "softened",
    pairs: Sequence[tuple[str, str]] = (),
    labels: Amount = 0.1,
    weight: Amount | Callable[[float], float] = 0.9,
    whole: bool = True,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    params: Iterable[nn.Parameter] | None = None,
) -> nn.Module:
    """Trains `model`, the student, on `labels * task.loss + weight * match(student, teacher)`.

    The teacher is `task.teacher`, in evaluation mode and without gradients.

    Args:
        match: what is compared and how (slot `match`).
        pairs: (student's layer, teacher's layer) whose outputs `match` looks at, beside the logits.
        labels: weight of the task's own loss; 0 leaves it out.
        weight: weight of the match, a number or progress -> number; 0 leaves it out.
        whole: False runs both networks only as far as the paired layers: there are no logits, and nothing above them
            changes, running statistics included.
        epochs: passes over the training data.
        lr: learning rate.
        optimizer: as in `fit`.
        params: parameters of the student that are trained; all of them when left out.

    Raises:
        MissingNeed: the task has no teacher.
        BadOption: both weights are 0, or the teacher is the student.
    """
    teacher, compare = teacher_of(model, task), fill("match", match)
    share = weight if callable(weight) else _constant(weight)
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]

    def step(student: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        terms = {}
        seen, output, target = tapped(student, model, task, batch, ours, whole)
        if labels:
            terms["labels"] = labels * task.loss(output, target)
        if weight != 0:
            with eval_mode(teacher):
                shown, _, _ = tapped(teacher, teacher, task, batch, theirs, whole)
            terms["match"] = share(progress) * compare(seen, to_device(shown, device_of(model)), batch, progress)
        return terms

    trained = list(model.parameters() if params is None else params)
    trained += list(compare.parameters()) if isinstance(compare, nn.Module) else []
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, step=step, params=trained, label="distill")


def teacher_of(model: nn.Module, task: Task) -> nn.Module:
    """The task's teacher.

    Raises:
        MissingNeed: there is none.
        BadOption: it is the student itself.
    """
    if task.teacher is None:
        raise MissingNeed("distillation needs a teacher, which this task does not have: pass Task(teacher=...)")
    if task.teacher is model:
        raise BadOption("the teacher is the very model that is trained: pass Task(teacher=copy.deepcopy(model))")
    return task.teacher


def tapped(
    called: nn.Module, model: nn.Module, task: Task, batch: Batch, paths: Sequence[str], whole: bool = True
) -> tuple[dict[str, Tensor], Any, Any]:
    """Runs `called` (the model, possibly wrapped): its taps, its output, the batch's target.

    The taps are the outputs of the layers at `paths`, and the logits under "". If the network is not run as a `whole`,
    but only until the last of these layers, there are no logits, and output and target are None.
    """
    with taps(model, paths) as seen, _until(model, seen, paths, stop=not whole):
        try:
            output, target = run(called, task, batch)
            return {**seen, "": prediction(output)}, output, target
        except _Reached:
            return dict(seen), None, None


def _constant(value: float) -> Callable[[float], float]:
    return lambda progress: value


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
