"""Attention maps of the teacher guide those of the student, whatever number of channels either has.

Source: Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, arXiv:1612.03928, sec. 3.1.
Departs from the paper: squares are averaged over batch and positions as in the authors' code (beta = 1000), where the
paper has the norm of the difference; the layers are the last ones with maps of each size; maps of unequal size are
pooled to the smaller.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from featherweight.allowed import Positive
from featherweight.catalogue import ingredient, method
from featherweight.core.features import Taps, as_map, paired


@ingredient("match", where="ends", same="size")
def attention_maps(
    student: Taps,
    teacher: Taps,
    batch: Any,
    progress: float,
    *,
    power: Positive = 2.0,
    over: Literal["sum", "max"] = "sum",
) -> Tensor:
    """`1/2 sum_j mean (Q_S / ||Q_S|| - Q_T / ||Q_T||)^2` over paired layers j, `Q = sum_channels |F|^p` by position.

    Args:
        power: p.
        over: whether channels are summed, or the largest is taken.
    """
    return 0.5 * sum(  # type: ignore[return-value]
        (attention(ours, power, over) - attention(theirs, power, over)).square().mean()
        for ours, theirs in paired(student, teacher)
    )


def attention(maps: Tensor, power: float = 2.0, over: Literal["sum", "max"] = "sum") -> Tensor:
    """The attention map of each sample, (batch, height x width), with norm 1; 0 where the maps are 0."""
    powers = as_map(maps).abs().pow(power)
    return F.normalize((powers.sum(1) if over == "sum" else powers.amax(1)).flatten(1), dim=1, eps=1e-12)


attention_transfer = method(
    "distill",
    match=attention_maps,
    labels=1.0,
    weight=1000.0,
    paper="Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928",
    needs={"labels", "train", "teacher"},
    small={"epochs": 1},
)
