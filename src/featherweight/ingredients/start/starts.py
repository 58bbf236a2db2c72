"""The three starts of Deep Compression (Han et al., ICLR 2016, arXiv:1510.00149, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.catalogue import ingredient


@ingredient("start")
def linear_span(values: Tensor, k: int) -> Tensor:
    """`k` centroids at equal distances over [min, max]: large weights, which are few and matter most, get some too.

    >>> linear_span(torch.tensor([0.0, 0.1, 3.0]), 4).tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    return torch.linspace(float(values.min()), float(values.max()), k, dtype=torch.float64)


@ingredient("start")
def density(values: Tensor, k: int) -> Tensor:
    """`k` centroids at equal steps of the distribution: dense in the middle, starved in the tails.

    >>> density(torch.tensor([0.0, 0.25, 0.5, 3.0, 4.0]), 3).tolist()
    [0.0, 0.5, 4.0]
    """
    ordered = values.double().flatten().sort().values
    return ordered[torch.linspace(0, ordered.numel() - 1, k).round().long()]


@ingredient("start")
def forgy(values: Tensor, k: int) -> Tensor:
    """`k` of the values, drawn with a generator of its own (seeded, repeatable)."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(values.numel(), generator=generator)[:k]
    return values.double().flatten()[drawn].sort().values
