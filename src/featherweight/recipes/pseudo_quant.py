"""Pseudo-quantization: integers with a scale and a zero point in the file, floats again when it is loaded."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor, nn

from featherweight.allowed import Count
from featherweight.catalogue import recipe
from featherweight.core.forms import attach
from featherweight.core.ledger import note
from featherweight.core.levels import FixedGrid, survivors
from featherweight.core.site import PerLayer, Site, channel_axis, per_layer
from featherweight.core.surgery import WEIGHTED, Layers, Where
from featherweight.core.task import Task

StoredBits = Annotated[int, Interval(ge=2, le=16)]
Offset = Literal["symmetric", "integer", "float"]
Granularity = Literal["channel", "tensor", "group"]
NEAR = 2**16  # steps from zero that float32 still divides finely
STORED = (*WEIGHTED, nn.Embedding)


@recipe(
    paper="Jacob et al., CVPR 2018, arXiv:1712.05877",
    family="quantize",
    shrinks={"bits"},
    small={"weight_bits": 6},
)
def pseudo_quant(
    model: nn.Module,
    task: Task,
    *,
    weight_bits: PerLayer[StoredBits] = 8,
    offset: Offset = "symmetric",
    granularity: Granularity = "channel",
    group_size: Count = 64,
    where: Annotated[Where, Layers(STORED)] = None,
) -> nn.Module:
    """Stores weights as integers of few bits with a scale and an offset; they are floats again when the file is loaded.

    The files get smaller, networks get no faster. With b bits and the least and largest weight of a channel, a layer or
    a group: "symmetric" has `scale = max|w| / (2^(b-1) - 1)` and zero at zero; "integer" has
    `scale = (max - min) / (2^b - 1)`, where min <= 0 <= max is forced, and `Z = clip(round(-min / scale), 0, 2^b - 1)`,
    `w = scale (q - Z)`, so that zero is exact (Jacob et al., "Quantization and Training of Neural Networks for
    Efficient Integer-Arithmetic-Only Inference", CVPR 2018, eq. 1); "float" has the same scale without the force, and
    `w = q scale + min`: the tightest range, but zero is not on it in general, so pruned weights need a mask of theirs.

    Storage only. Weight-only kernels would execute it; ONNX Runtime and OpenVINO dequantize when they load the file.

    Departs from the paper: nothing is calibrated, trained or run in integers; the float offset is held as the zero
    point `-min / scale`, of float64 where min is so many steps that it takes that. Ranges are those of the weights that
    a mask leaves; a range of nothing gets the scale one.

    Args:
        weight_bits: bits of a weight; or layer patterns with bits each.
        offset: "symmetric", "integer" (an integer zero point) or "float" (an offset that is any number).
        granularity: one scale per output "channel", per "tensor", or per "group" of consecutive weights.
        group_size: weights in a group; where it does not divide the weights of an output, the largest divisor below.
        where: which layers; all linear, convolution and embedding layers when left out.

    Raises:
        BadOption: an option outside its range.
        BadData: weights are not finite.
    """
    found, bits = per_layer(model, "weight_bits", weight_bits, where, types=STORED)
    for path, site in found.items():
        survivors(site)
        axis = channel_axis(site) if granularity == "channel" else None
        block = group_of(site, group_size) if granularity == "group" else None
        if block is not None and block != group_size:
            note(f"{path}: groups of {block} weights, because {group_size} does not divide its rows")
        attach(site.module, offset_grid(site, bits[path], offset, axis, block), at=site.name, root=model)
    used = "/".join(str(b) for b in sorted(set(bits.values())))
    note(f"{len(found)} layers stored in {used} bits: size down, speed unchanged (weights are floats when loaded)")
    return model


def offset_grid(site: Site, bits: int, offset: Offset, axis: int | None, block: int | None) -> FixedGrid:
    """The grid over the range of the surviving weights, of each index of `axis`, each block, or all."""
    weight, keep = site.weight.double(), site.keep.to(site.weight.device)
    low = grouped(torch.where(keep, weight, torch.inf), axis, block).amin(1)
    high = grouped(torch.where(keep, weight, -torch.inf), axis, block).amax(1)
    low, high = (torch.where(end.isfinite(), end, 0.0) for end in (low, high))  # of nothing
    if axis is None and block is None:
        low, high = low.squeeze(0), high.squeeze(0)
    if offset == "symmetric":
        top = 2 ** (bits - 1) - 1
        return FixedGrid(_scale(torch.maximum(high, -low) / top, site), -top, top, axis=axis, block=block)
    if offset == "integer":
        low, high = low.clamp_max(0), high.clamp_min(0)
    top = 2**bits - 1
    scale = _scale((high - low) / top, site)
    zero = -low / scale.double()
    if offset == "integer":
        zero = zero.round().clamp(0, top).int()
    elif float(zero.abs().max()) < NEAR:
        zero = zero.to(scale.dtype)
    return FixedGrid(scale, 0, top, zero_point=zero, axis=axis, block=block)


def grouped(values: Tensor, axis: int | None, block: int | None) -> Tensor:
    """Values as rows that have a step of their own: an index of `axis`, a block, or all of them."""
    if block is not None:
        return values.reshape(-1, block)
    return values.reshape(1, -1) if axis is None else values.movedim(axis, 0).flatten(1)


def _scale(scale: Tensor, site: Site) -> Tensor:
    """Steps of the weight's type; one where there is nothing to divide."""
    scale = scale.to(site.weight.dtype)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def group_of(site: Site, size: int) -> int:
    """The largest number up to `size` that divides the weights of the first dimension's entries.

    >>> group_of(Site.of(torch.ones(2, 12)), 8)
    6
    """
    row = site.weight[0].numel()
    return next(n for n in range(min(size, row), 0, -1) if row % n == 0)
