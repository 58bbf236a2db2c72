"""Channels that have become constant: what they bring the layers that read them moves there, before they are removed.

A filter whose weights are all zero puts out its bias, a batch norm whose scale is zero its shift; behind the activation
that is a constant, and `W[:, c].sum() * constant` of it reaches every reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.core.channels import Channels, remove_channels
from featherweight.core.fold import norms_behind
from featherweight.core.ledger import note, skip
from featherweight.core.surgery import WEIGHTED, altered
from featherweight.core.task import Task, eval_mode, run


def remove_constants(model: nn.Module, task: Task, channels: Channels, doomed: Tensor, *, batches: int = 8) -> None:
    """Removes channels, in place, and adds what layers read from them to their biases, or to their batch norms' means.

    The channels' values are their means over calibration batches, so they need not be constant; if they are, then
    removing them changes nothing, except that a convolution pads with zeros in place of the constant. The model holds
    no forms on weights.

    Args:
        channels: of this model as it is.
        doomed: numbers of the channels, the most expendable first.
        batches: calibration batches that are looked at.

    Raises:
        MissingNeed: the task has neither calibration nor training data.
        CompressionError: the smaller model does not compute what masking does; the model is as it was.
    """
    gone = torch.zeros(channels.count + 1, dtype=torch.bool)  # the last is for -1
    gone[channels.legal(doomed)] = True
    norms, shifts = norms_behind(model, task.inputs()), {}
    for path, (mean, deviation) in _input_means(model, task, _reading(model, channels, gone), batches).items():
        lost, layer = gone[channels.inputs[path]].to(mean.device), model.get_submodule(path)
        outputs = channels.outputs.get(path)
        left = slice(None) if outputs is None else ~gone[outputs].to(mean.device)
        shifts[path] = _read(layer, torch.where(lost, mean, 0.0))[left]
        if (_read(layer, torch.where(lost, deviation, 0.0)).abs() > 1e-3 * (1 + mean.abs().max())).any():
            note(f"{path}: removed channels that it reads are no constants: their means stay, what varies is lost")
    remove_channels(model, doomed, channels=channels)
    for path, shift in shifts.items():
        _shift(model, path, shift, norms)


def _reading(model: nn.Module, channels: Channels, gone: Tensor) -> list[str]:
    """The layers that read channels that go, and stay; those that cannot be told what they lose are skipped."""
    paths, own = [], {path for path, _ in model.named_modules()}  # a layer that has several paths is there once
    for path, ids in channels.inputs.items():
        weighted = isinstance(model.get_submodule(path), WEIGHTED) and path in own
        if weighted and gone[ids].any() and not (path in channels.outputs and gone[channels.outputs[path]].all()):
            if reason := _refusal(model.get_submodule(path)):
                skip(path, f"what it reads from removed channels is lost: {reason}")
            else:
                paths.append(path)
    return paths


def _refusal(layer: nn.Module) -> str:
    if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return f"a {type(layer).__name__} does not read a constant alike everywhere"
    return altered(layer)


def _input_means(model: nn.Module, task: Task, paths: list[str], batches: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and deviation of every input channel of the layers over all of their calls, in float64."""
    sums: dict[str, list[Any]] = {}

    def see(path: str, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = args[0] if args else kwargs["input"]
        last = isinstance(layer, nn.Linear)
        along = x.dim() - 1 if last else x.dim() - layer.weight.dim() + 1  # type: ignore[operator]
        flat = x.detach().double().movedim(along, 0).flatten(1)
        held = sums.setdefault(path, [0, 0.0, 0.0])
        held[0] += flat.shape[1]
        held[1] = held[1] + flat.sum(1)
        held[2] = held[2] + flat.square().sum(1)

    handles = [model.get_submodule(p).register_forward_pre_hook(partial(see, p), with_kwargs=True) for p in paths]
    try:
        with eval_mode(model):
            for batch in islice(task.calibrating() if paths else (), batches):
                run(model, task, batch)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for path, (n, total, squares) in sums.items():
        mean = total / n
        found[path] = mean, (squares / n - mean.square()).clamp_min(0).sqrt()
    return found


def _read(layer: nn.Module, constants: Tensor) -> Tensor:
    """What a layer makes of inputs that are the same everywhere (in,): one value for each output, in float64."""
    weight: Tensor = layer.weight.detach().double()  # type: ignore[operator]
    groups = int(getattr(layer, "groups", 1))
    each = constants.view(groups, -1).repeat_interleave(len(weight) // groups, 0)
    return (weight.flatten(2).sum(2) * each).sum(1) if weight.dim() > 2 else weight @ constants


@torch.no_grad()
def _shift(model: nn.Module, path: str, by: Tensor, norms: Mapping[str, str]) -> None:
    layer: Any = model.get_submodule(path)
    if not by.any():
        return
    if layer.bias is None and path in norms:
        mean = model.get_submodule(norms[path]).running_mean
        assert isinstance(mean, Tensor)
        mean.sub_(by.to(mean))
    elif layer.bias is None:
        layer.bias = nn.Parameter(by.to(layer.weight))
        layer._fw_swapped = True  # the container rebuilds this layer with the bias that its class does not give it
    else:
        layer.bias.add_(by.to(layer.bias))
