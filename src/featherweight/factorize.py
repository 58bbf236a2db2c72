"""The verb `factorize`: every chosen layer becomes a product of thinner ordinary layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Interval, Len
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive, Share, checked
from featherweight.catalogue import Slot, fill
from featherweight.core.exchange import example_inputs, unexchangeable
from featherweight.core.fit import Optimizers
from featherweight.core.forms import mask_of
from featherweight.core.ledger import note, skip
from featherweight.core.surgery import WhereLinearOrConv2d, swap, targets
from featherweight.core.task import Task, check_needs
from featherweight.errors import CompressionError

Rank = Callable[[Tensor], int]
"""The rank of a matrix (rows, columns)."""

Factor = Callable[..., nn.Module]
"""`(layer, ranks, *, sweeps) -> nn.Module`, declared with `views`: layer -> the matrices whose ranks it takes."""


Part = Annotated[float, Interval(gt=0, le=1)]
"""A fraction of the full rank."""

Pair = Annotated[Sequence[Count], Len(2, 2)]
"""Ranks of (outputs, inputs)."""


@checked()
def factorize(
    model: nn.Module,
    task: Task,
    *,
    factor: Annotated[str, Slot("factor")] | Factor = "tucker2",
    rank: Annotated[str, Slot("rank")] | Rank | Count | Part | Pair = "vbmf",
    floor: Count = 8,
    weaken: Share = 0.0,
    sweeps: Annotated[int, Ge(0)] = 10,
    where: WhereLinearOrConv2d = None,
    epochs: Amount = 5,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Replaces layers by products of thinner ones, all at once, then fine-tunes the whole network.

    A layer stays as it is, and is reported, where its factors would need as many parameters or multiplications.

    Args:
        factor: how a layer is taken apart (slot `factor`).
        rank: a rule for ranks (slot `rank`: vbmf, vbmf_grid, energy), a fraction of the full rank, one rank for all, or
            the pair (outputs, inputs).
        floor: ranks that a rule or fraction chooses are at least this.
        weaken: moves a chosen rank R towards the full one F by this fraction, R + weaken (F - R).
        sweeps: rounds of alternating refinement after the closed form.
        where: which layers.
        epochs: of fine-tuning; 0 needs no training data.
        lr: learning rate of fine-tuning.
        optimizer: of fine-tuning, as in `fit`.

    Raises:
        BadOption: a rank or fraction outside its range.
        MissingNeed: fine-tuning without labelled training data.
        CompressionError: no layer was replaced.
    """
    make, choose = fill("factor", factor), _ranks(rank, floor, weaken)
    if epochs:
        check_needs({"labels", "train"}, task, "fine-tuning")
    replaced: dict[str, tuple[int, ...]] = {}
    reasons: dict[str, str] = {}
    layers = targets(model, where)
    inputs = example_inputs(model, task, list(layers))
    for path, layer in layers.items():
        views = unexchangeable(model, layer, inputs.get(path)) or make.__ingredient__[1]["views"](layer)  # type: ignore[attr-defined]
        if isinstance(views, str):
            reasons[path] = views
            continue
        ranks = tuple(choose(view, i) for i, view in enumerate(views))
        new = make(layer, ranks, sweeps=sweeps)
        before, after = (cost(m, inputs[path]) for m in (layer, new))
        if after[0] >= before[0] or after[1] >= before[1]:
            reasons[path] = f"ranks {ranks} would need {after[0]:,} parameters and {after[1]:,} MACs, it has " + (
                f"{before[0]:,} and {before[1]:,}"
            )
            continue
        if mask_of(layer) is not None:
            note(f"the factors of {path} are dense: its pruned weights are zeros no more")
        swap(model, path, new)
        replaced[path] = ranks
    for path, reason in reasons.items():
        skip(path, reason)
    if not replaced:
        why = "; ".join(f"{path}: {reason}" for path, reason in list(reasons.items())[:3])
        raise CompressionError(f"no layer was factorized ({why}): pass a lower rank=, floor= or weaken=")
    note("ranks: " + ", ".join(f"{path} {' x '.join(map(str, ranks))}" for path, ranks in replaced.items()))
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="fine-tune") if epochs else model


def _ranks(rank: Any, floor: int, weaken: float) -> Callable[[Tensor, int], int]:
    """(matrix, index of the matrix) -> its rank, at least 1 and at most the full one."""

    def relaxed(value: int, full: int) -> int:
        value = max(value, floor)
        return math.ceil(value + weaken * (full - value) - 1e-9)

    if isinstance(rank, str) or callable(rank):
        rule = fill("rank", rank)
        return lambda matrix, i: _within(relaxed(rule(matrix), min(matrix.shape)), matrix)
    if isinstance(rank, float):
        return lambda matrix, i: _within(relaxed(round(rank * min(matrix.shape)), min(matrix.shape)), matrix)
    fixed = [rank, rank] if isinstance(rank, int) else rank
    return lambda matrix, i: _within(fixed[i], matrix)


def _within(rank: int, matrix: Tensor) -> int:
    return max(1, min(rank, *matrix.shape))


def cost(module: nn.Module, example: Tensor) -> tuple[int, int]:
    """Parameters, and multiply-accumulates on one sample, of ungrouped linear and convolution layers in a row."""
    macs = 0

    def count(layer: nn.Linear | nn.Conv2d, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal macs
        macs += output.numel() // len(layer.weight) * layer.weight.numel() // len(example)

    leaves = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [leaf.register_forward_hook(count) for leaf in leaves]
    try:
        with torch.no_grad():
            module(example)
    finally:
        for handle in handles:
            handle.remove()
    return sum(leaf.weight.numel() + (0 if leaf.bias is None else leaf.bias.numel()) for leaf in leaves), macs
