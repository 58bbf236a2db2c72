"""Reduce and reuse: filters of low variance go, and their outputs are put together again from those that stay.

Adam Polyak, Lior Wolf, "Channel-level acceleration of deep face representations", IEEE Access 3, 2015, the second of
its two methods: a layer keeps the filters whose outputs vary most, and a 1x1 convolution behind it, found by least
squares, `A = Y Y_K^T (Y_K Y_K^T + eps I)^-1`, gives all outputs from the computed ones, so that nothing else changes
its shape.

Departs from the paper: A has an intercept and is fitted to the outputs of the original network, near the matrix that
hands on what was kept; the ridge eps is a share of the outputs' mean square; a layer of which this saves no
multiplications (`|K| N_out >= k^2 N_in (N_out - |K|)`) is left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.flow import follow
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.layerwise import called, unfit
from featherweight.core.ledger import note, skip
from featherweight.core.reconstruct import Moments, augmented, layer_rows, put
from featherweight.core.select import lowest
from featherweight.core.site import PerLayer, per_layer
from featherweight.core.surgery import WhereWeighted, swap
from featherweight.core.task import Task
from featherweight.core.widths import fewer
from featherweight.errors import CompressionError


@recipe(
    paper="Polyak and Wolf, IEEE Access 2015",
    family="prune",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"calibration_batches": 2, "finetune": 1, "round_to": 1, "prune_ratio": 0.75},
)
def reduce_and_reuse(
    model: nn.Module,
    task: Task,
    *,
    prune_ratio: PerLayer[Fraction] = 0.5,
    ridge: Amount = 1e-4,
    positions: Count = 10,
    calibration_batches: Count = 16,
    round_to: Count = 16,
    finetune: Amount = 4,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    where: WhereWeighted = None,
) -> nn.Module:
    """Replaces layers, from the first, by one with fewer filters and one that makes all outputs from theirs.

    Args:
        prune_ratio: fraction of the filters that goes, of every layer; or layer patterns with a fraction each.
        ridge: pull towards handing on what was kept, as a share of the outputs' mean square; 0 is plain least squares.
        positions: output positions drawn from every sample.
        calibration_batches: how many batches of the calibration (or training) data the sums are over.
        round_to: wider layers keep a multiple of this many filters; 1 removes exactly the fraction.
        finetune: passes at the end.
        lr: learning rate of the fine-tuning.
        optimizer: its optimizer, as in `fit`.
        where: which layers; all linear and convolution layers but those that put out the network's outputs when left
            out.

    Raises:
        UnknownName: a pattern matches nothing.
        CompressionError: there is no layer of which it pays.
    """
    found, goals = per_layer(model, "prune_ratio", prune_ratio, where)
    masked, original = masked_names(model), copy.deepcopy(model)
    bake(model)
    order, done = called(model, task), []
    last = set() if where is not None or isinstance(prune_ratio, Mapping) else heads(model, task, list(found))
    for path in sorted(found, key=lambda path: order.index(path) if path in order else -1):
        layer: Any = model.get_submodule(path)
        filters = len(layer.weight)
        kept = fewer(filters, goals[path], round_to)
        if path in last:
            skip(path, "its outputs are the network's, and each of them counts: choose it by where to reduce it too")
            continue
        if why := unfit(model, path, order) or no_gain(layer, kept):
            skip(path, why)
            continue
        data = islice(task.calibrating(), calibration_batches)
        weight = augmented(layer)
        rows = layer_rows(model, path, task, data, positions=positions, original=original)
        moments = Moments.of((x @ weight[:, :-1].mT + weight[:, -1], y) for x, y in rows)
        keep = most_varied(moments, kept)
        swap(model, path, nn.Sequential(*split(layer, keep, reused(moments, keep, ridge))))
        done.append(path)
        note(f"{path}: {kept} of {filters} filters kept, the others made from them")
    if not done:
        raise CompressionError(
            "of no layer does it pay to make filters from others: raise prune_ratio, or choose a method that masks "
            "weights, such as magnitude_iterative"
        )
    mask_zeros(model, [(f"{path}.0" if path in done else path, name) for path, name in masked])
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def heads(model: nn.Module, task: Task, paths: list[str]) -> set[str]:
    """The layers whose outputs are outputs of the network."""
    flow = follow(model, task.inputs(), {path: model.get_submodule(path) for path in paths})
    return {step.layer for step in flow.steps if step.layer is not None and set(step.makes) & flow.outputs}


def no_gain(layer: Any, kept: int) -> str:
    """Why a layer is better left alone; empty if it is not."""
    filters, columns = len(layer.weight), layer.weight[0].numel()
    added, saved = kept * filters, columns * (filters - kept)
    return f"making its outputs from {kept} adds {added} multiplications, and saves {saved}" if added >= saved else ""


def most_varied(moments: Moments, kept: int) -> Tensor:
    """Numbers of the filters (kept,) whose outputs vary most, ascending; of equal ones the later."""
    mean = moments.xx[-1, :-1] / moments.n
    variance = (moments.xx.diagonal()[:-1] / moments.n - mean.square()).clamp_min(0)
    gone = lowest({"": variance}, (len(variance) - kept) / len(variance))[""]
    return (~gone).nonzero().flatten()


def reused(moments: Moments, keep: Tensor, ridge: float) -> Tensor:
    """A with its intercept (outputs, kept + 1): least squares near the matrix that hands on what is kept."""
    outputs = len(moments.yy)
    start = torch.zeros(outputs, outputs + 1, dtype=torch.float64)
    start[keep, keep] = 1
    free = torch.zeros(outputs + 1, dtype=torch.bool)
    free[keep], free[-1] = True, True
    found = moments.refit(start, free, ridge)
    return torch.cat([found[:, keep], found[:, -1:]], 1)


def split(layer: Any, keep: Tensor, again: Tensor) -> tuple[nn.Module, nn.Module]:
    """The layer with the filters that are kept, and the one that makes all outputs from theirs."""
    few, filters, bias = len(keep), len(layer.weight), layer.bias is not None
    if isinstance(layer, nn.Linear):
        first, last = nn.Linear(layer.in_features, few, bias), nn.Linear(few, filters)
    else:
        kind: Any = next(k for k in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(layer, k))
        shape = {
            name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        }
        first, last = kind(layer.in_channels, few, bias=bias, **shape), kind(few, filters, 1)
    for made, weight in ((first.to(layer.weight), augmented(layer)[keep]), (last.to(layer.weight), again)):
        put(made, weight)
    return first, last
