"""Layers one after the other in a single pass: each may change before it runs, and what follows sees the change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.core.ledger import note
from featherweight.core.study import sample_dim
from featherweight.core.task import Batch, Task, eval_mode, run
from featherweight.errors import BadData

Change: TypeAlias = Callable[[str, nn.Module, Tensor], None]
"""(path, layer, its input as the changed network brings it) -> None; may change the layer."""


SAMPLES = 1024  # of one pass: their activations are in memory at the same time


def joined(task: Task, count: int, samples: int = SAMPLES) -> Batch:
    """At most `count` calibration batches as one, so that a single pass shows all of their (first `samples`) samples.

    Tensors are joined along their first dimension. Batches whose other sizes are not those of the first are left out,
    and that is noted.

    Raises:
        BadData: there are none.
    """
    batches = list(islice(task.calibrating(), count))
    if not batches:
        raise BadData("the calibration data are empty: at least one batch is needed")
    like = [batch for batch in batches if _alike(batch, batches[0])]
    if len(like) < len(batches):
        note(f"{len(batches) - len(like)} calibration batches are of another shape than the first, and were left out")
    flat = [pytree.tree_flatten(batch)[0] for batch in like]
    spec = pytree.tree_flatten(like[0])[1]
    leaves = [
        torch.cat(parts)[:samples] if _batched(parts[0]) else parts[0] for parts in map(list, zip(*flat, strict=True))
    ]
    return pytree.tree_unflatten(leaves, spec)


def _batched(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _alike(batch: Batch, other: Batch) -> bool:
    mine, theirs = (pytree.tree_flatten(one) for one in (batch, other))
    shapes = [[tuple(v.shape[1:]) for v in leaves if _batched(v)] for leaves in (mine[0], theirs[0])]
    return mine[1] == theirs[1] and shapes[0] == shapes[1]


def walk(model: nn.Module, task: Task, batch: Batch, paths: Iterable[str], change: Change) -> list[str]:
    """Runs one batch; before each of the layers runs for the first time, `change` sees it and its input.

    The input is as the layer itself sees it, behind a grid that stands on it. Returns the layers that do not run.
    """
    left = dict.fromkeys(paths)

    def before(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path in left:
                del left[path]
                change(path, module, _input(args, kwargs))

        return hook

    handles = [
        model.get_submodule(path).register_forward_pre_hook(before(path), with_kwargs=True) for path in list(left)
    ]
    try:
        with eval_mode(model):
            run(model, task, batch)
    finally:
        for handle in handles:
            handle.remove()
    return list(left)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer was called with, by place or by the name that layers of torch give it."""
    value: Tensor = args[0] if args else kwargs["input"]
    return value


def beside(
    model: nn.Module,
    original: nn.Module,
    task: Task,
    batch: Batch,
    paths: Iterable[str],
    change: Callable[[str, nn.Module, Tensor, Tensor], None],
) -> list[str]:
    """`walk`, with the original network in the same pass: every sample goes through both.

    Before a layer runs for the first time, `change(path, layer, theirs, ours)` sees the inputs of both networks. The
    batch is given twice, and the first half of what each of these layers puts out is the original layer's. Where no
    dimension of a layer's input counts the samples, or the layer does not run, it is left as it is and returned.
    """
    paths, samples = list(paths), len(pytree.tree_flatten(batch)[0][0])
    double = pytree.tree_map(lambda value: torch.cat([value, value]) if _batched(value) else value, batch)
    seen: dict[str, int] = {}

    def halves(path: str, layer: nn.Module, value: Tensor) -> None:
        channel = value.dim() - (1 if isinstance(layer, nn.Linear) else layer.weight.dim() - 1)  # type: ignore[operator]
        dim = sample_dim(value.shape, channel, 2 * samples)
        if dim is not None:
            seen[path] = dim
            theirs, ours = value.chunk(2, dim)
            change(path, layer, theirs, ours)

    def behind(path: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if path not in seen:
                return None
            theirs, ours = _input(args, kwargs).chunk(2, seen[path])[0], output.chunk(2, seen[path])[1]
            return torch.cat([plain(original.get_submodule(path), theirs), ours], seen[path])

        return hook

    handles = [model.get_submodule(path).register_forward_hook(behind(path), with_kwargs=True) for path in paths]
    try:
        walk(model, task, double, paths, halves)
    finally:
        for handle in handles:
            handle.remove()
    return [path for path in paths if path not in seen]


def plain(layer: nn.Module, value: Tensor) -> Tensor:
    """What a layer computes of its input, without the grids on its input and output."""
    found: Tensor = layer.forward(value)
    return found


def inputs_and_outputs(
    model: nn.Module, task: Task, batch: Batch, paths: Sequence[str], see: Callable[[str, Tensor, Tensor], None]
) -> None:
    """Shows `see(path, input, output)` every chosen layer of a network that stays as it is; the first call of each."""
    walk(model, task, batch, paths, lambda path, layer, value: see(path, value, plain(layer, value)))


def by_channel(layer: nn.Module, value: Tensor) -> Tensor:
    """A layer's output as (channels, everything else)."""
    channel = value.dim() - 1 if isinstance(layer, nn.Linear) else value.dim() - layer.weight.dim() + 1  # type: ignore[operator]
    return value.movedim(channel, 0).flatten(1)
