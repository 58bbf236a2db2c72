"""Layers exchanged for structured ones: which may be, which would get no smaller, and what is said about each."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

from torch import Tensor, nn

from featherweight.core.forms import ACTIVATIONS, activation_form, mask_of, owners
from featherweight.core.ledger import note, skip
from featherweight.core.structured import from_dense
from featherweight.core.structures import made
from featherweight.core.surgery import Where, altered, swap, taps, targets
from featherweight.core.task import Task, device_of, eval_mode, to_device
from featherweight.errors import CompressionError

LINEAR_OR_CONV2D = (nn.Linear, nn.Conv2d)
Choose = Callable[[int, int, int], tuple[Any, ...]]
"""(number of the layer, rows, columns of its weight as a matrix) -> the structure's word and settings."""


def impose(
    model: nn.Module,
    task: Task,
    where: Where,
    choose: Choose,
    types: tuple[type[nn.Module], ...] = LINEAR_OR_CONV2D,
    steps: int = 0,
) -> None:
    """Exchanges chosen layers of these types for structured ones that start near to them, in place.

    A layer stays as it is, and that is reported, where the structure needs as many parameters as its weight has.

    Args:
        steps: of L-BFGS towards each weight, for structures whose projection is not the nearest.

    Raises:
        BadOption, UnknownName: `where` chooses no layer.
        CompressionError: no layer was exchanged.
    """
    layers = targets(model, where, types)
    inputs = example_inputs(model, task, list(layers))
    reasons: dict[str, str] = {}
    for number, (path, layer) in enumerate(layers.items()):
        reasons[path] = unexchangeable(model, layer, inputs.get(path))
        reasons[path] = reasons[path] or _exchanged(model, path, layer, choose(number, *_sizes(layer)), steps)
        if reasons[path]:
            skip(path, reasons[path])
    if all(reasons.values()):
        why = "; ".join(f"{path}: {reason}" for path, reason in list(reasons.items())[:3])
        raise CompressionError(f"no layer would get smaller ({why}): choose other layers or a smaller structure")


def _sizes(layer: nn.Module) -> tuple[int, int]:
    weight = cast(Tensor, layer.weight)
    return len(weight), weight.numel() // len(weight)


def _exchanged(model: nn.Module, path: str, layer: nn.Module, told: tuple[Any, ...], steps: int) -> str:
    """Exchanges one layer; why not, where it stays."""
    weight = cast(Tensor, layer.weight).detach()
    rows, columns = _sizes(layer)
    size = made(told, rows, columns).size
    if size >= weight.numel():
        return f"a {told[0]} matrix of {rows} x {columns} needs {size} parameters, no fewer than now"
    new = from_dense(layer, told, steps)
    if mask_of(layer) is not None:
        note(f"the weight of {path} is shared: its pruned weights are zeros no more")
    lost = float((weight - new.dense().detach()).norm() / weight.norm().clamp(min=1e-30))
    note(f"{path}: {size} of {weight.numel()} parameters, {lost:.0%} of the weight off before training")
    swap(model, path, new)
    return ""


def unexchangeable(model: nn.Module, layer: nn.Module, seen: Tensor | None, tied: Collection[nn.Module] = ()) -> str:
    """Why a layer cannot be exchanged, whatever for; empty if it can.

    Args:
        seen: its example input, None if it was not called.
        tied: layers with the same weight that are exchanged with it.
    """
    if seen is None:
        return "the model did not call it on its example inputs, or reads its weight directly"
    if any(owner is not layer and owner not in tied for owner, _ in owners(model, layer, "weight")):
        return "its weight is shared with another layer"
    if reason := next(filter(None, map(altered, (layer, *tied))), ""):
        return reason
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.sparse or layer.scale_grad_by_freq):
        return "its rows are renormalised, or their gradients sparse or scaled: build the embedding without that"
    if any(activation_form(layer, at) is not None for at in ACTIVATIONS):
        return "its activations are quantized: exchange layers before that"
    return ""


def example_inputs(model: nn.Module, task: Task, paths: list[str]) -> dict[str, Tensor]:
    """The example input of each layer, for those that are called."""
    args, kwargs = to_device(task.inputs(), device_of(model))
    with eval_mode(model), taps(model, paths, at="input") as seen:
        model(*args, **kwargs)
    return {path: value for path, value in seen.items() if isinstance(value, Tensor)}
