"""Neuron selectivity transfer: the channels of a layer, as patterns in space, are distributed like the teacher's.

Source: Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017, arXiv:1707.01219.
Departs from the paper: the weight is the authors' code's 50 of MMD^2, which is lambda = 100 of the paper's lambda / 2;
the layer is the last one with maps, which may stand behind its ReLU; maps of unequal size are pooled to the smaller.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from featherweight.catalogue import ingredient, method
from featherweight.core.features import Taps, as_map, paired

Kernel = Literal["linear", "polynomial", "gaussian"]


@ingredient("match", where="top", same="size")
def selectivity(student: Taps, teacher: Taps, batch: Any, progress: float, *, kernel: Kernel = "polynomial") -> Tensor:
    """MMD^2 between the channels of paired layers, each a vector over the positions with norm 1: the batch's mean.

    Args:
        kernel: x.y, (x.y)^2, or exp(-||x - y||^2 / 2 s^2) with s^2 the mean squared distance of the two sets.
    """
    return sum(mmd2(patterns(s), patterns(t), kernel).mean() for s, t in paired(student, teacher))  # type: ignore[return-value]


def patterns(maps: Tensor) -> Tensor:
    """The channels of each sample as vectors over the positions, (batch, channels, height x width), of norm 1 or 0."""
    return F.normalize(as_map(maps).flatten(2), dim=2, eps=1e-12)


def mmd2(a: Tensor, b: Tensor, kernel: Kernel = "polynomial") -> Tensor:
    """The squared maximum mean discrepancy of two sets of vectors (batch, n, d) and (batch, m, d), by sample.

    >>> a = torch.randn(1, 6, 9).double()
    >>> bool(mmd2(a, a.repeat(1, 2, 1)).abs() < 1e-6)
    True
    """
    if kernel == "polynomial" and a.shape[2] < min(a.shape[1], b.shape[1]):
        return (second_moment(a) - second_moment(b)).square().sum((1, 2))  # the same, in d^2 in place of n m
    if kernel == "gaussian":
        scale = _squares(a, b).detach().mean((1, 2), keepdim=True).clamp_min(1e-12)
        means = [torch.exp(-_squares(x, y) / (2 * scale)).mean((1, 2)) for x, y in ((a, a), (b, b), (a, b))]
    else:
        power = 1 if kernel == "linear" else 2
        means = [(x @ y.mT).pow(power).mean((1, 2)) for x, y in ((a, a), (b, b), (a, b))]
    return means[0] + means[1] - 2 * means[2]


def second_moment(vectors: Tensor) -> Tensor:
    """`1/n sum_i x_i x_i^T` of vectors (batch, n, d)."""
    return vectors.mT @ vectors / vectors.shape[1]


def _squares(a: Tensor, b: Tensor) -> Tensor:
    return a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None] - 2 * a @ b.mT


nst_mmd = method(
    "distill",
    match=selectivity,
    labels=1.0,
    weight=50.0,
    paper="Huang and Wang, 2017, arXiv:1707.01219",
    needs={"labels", "train", "teacher"},
    small={"epochs": 1},
)
