"""Four-bit weights with a scale for each group of them: no data, no training, float activations.

Sheng Shen, Zhen Dong, Jiayu Ye, Linjian Ma, Zhewei Yao, Amir Gholami, Michael W. Mahoney, Kurt Keutzer, "Q-BERT:
Hessian based ultra low precision quantization of BERT", AAAI 2020, arXiv:1909.05840 (group-wise quantization): within a
run of `group` weights that one output reads,

    w' = s clip(round(w / s), -top, top),    top = 2^(bits - 1) - 1

Departs from the paper: groups are runs of the inputs of every output, as runtimes execute them, not sets of outputs of
an attention head; `s` has the least squared error of 31 fractions of `max|w| / top`; nothing is fine-tuned, and
activations stay float. Executed by ONNX Runtime and OpenVINO from four-bit integers (DequantizeLinear with a
block size, operator set 21); both may round the inputs of such layers to eight bits by themselves. Fewer bits are kept
as four in the ONNX file, more as eight.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch import Tensor, nn

from featherweight.allowed import Count
from featherweight.catalogue import recipe
from featherweight.core.decibels import decibels
from featherweight.core.forms import attach, bake, mask_zeros, masked_names
from featherweight.core.ledger import note, show
from featherweight.core.levels import FixedGrid, not_zero
from featherweight.core.site import PerLayer, Site, per_layer
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task
from featherweight.quantize import LAYERS

SHRINKS = torch.linspace(1.0, 0.4, 31)
LEAST = 8  # weights that share a scale, or the scales take more than the weights


@recipe(paper="Shen et al., AAAI 2020, arXiv:1909.05840", family="quantize", shrinks={"bits"}, small={"group": 16})
def int4(
    model: nn.Module,
    task: Task,
    *,
    weight_bits: PerLayer[Annotated[int, Interval(ge=2, le=8)]] = 4,
    group: Count = 64,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Puts weights on grids of few bits with a scale for each group of inputs; needs no data.

    Args:
        weight_bits: bits of a weight, 2 to 8; or layer patterns with bits each.
        group: how many consecutive weights share a scale: 32, 64 and 128 are usual. A layer whose outputs do not read a
            multiple of it takes the largest smaller group that divides, or one scale for each output.
        where: which layers; all Linear and Conv2d layers when left out.

    Raises:
        CompressionError: no chosen layer has a weight that is not zero.
    """
    masked = masked_names(model)
    bake(model)
    mask_zeros(model, masked)
    found, bits = per_layer(model, "weight_bits", weight_bits, where, types=LAYERS)
    table: list[dict[str, Any]] = []
    for path, site in not_zero(found).items():
        size, before = group_of(site.weight[0].numel(), group), site.weight.clone()
        attach(site.module, grouped(site, bits[path], size), root=model)
        table.append({"layer": path, "bits": bits[path], "group": size, "dB": decibels(before, site.weight)})
    show("groups", sorted(table, key=lambda row: row["dB"]))
    others = sorted({row["group"] for row in table} - {group})
    told = f"; {', '.join(map(str, others))} where {group} does not divide what an output reads" if others else ""
    note(f"{len(table)} layers with a scale for each {group} weights{told}")
    return model


def group_of(columns: int, group: int) -> int:
    """The largest group, at most as large as asked, that divides what an output reads; all of it if none does.

    >>> [group_of(columns, 64) for columns in (256, 784, 27, 400)]
    [64, 56, 27, 50]
    """
    return next((size for size in range(min(group, columns), LEAST - 1, -1) if columns % size == 0), columns)


def grouped(site: Site, bits: int, group: int) -> FixedGrid:
    """The grid of least squared error over the surviving weights of each group.

    >>> grouped(Site.of(torch.tensor([[0.7, -0.1, 7.0, 1.0]])), bits=4, group=2).scale.tolist()
    [0.10000000149011612, 1.0]
    """
    top = 2 ** (bits - 1) - 1
    weight = (site.weight * site.keep.to(site.weight.device)).reshape(-1, group)
    widest = weight.abs().amax(1)
    step = torch.where(widest > 0, widest / top, torch.ones_like(widest))
    errors = torch.stack([_error(weight, step * by, top) for by in SHRINKS.to(weight)])
    return FixedGrid(step * SHRINKS.to(weight)[errors.argmin(0)], -top, top, block=group)


def _error(weight: Tensor, step: Tensor, top: int) -> Tensor:
    snapped = (weight / step[:, None]).round().clamp(-top, top) * step[:, None]
    return (snapped - weight).square().sum(1)
