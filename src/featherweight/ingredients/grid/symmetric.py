"""Symmetric integer weights, one scale per output channel: zero stays zero, and integer kernels need no correction."""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.catalogue import ingredient
from featherweight.core.forms import Form
from featherweight.core.grids import SymmetricGrid
from featherweight.core.site import Site, channel_axis

SHRINKS = torch.linspace(1.0, 0.4, 31)


@ingredient("grid")
def symmetric(site: Site, bits: int) -> Form:
    """From the largest weight of each output channel: `s = max|w| / (2^(bits-1) - 1)`.

    Source: Krishnamoorthi, 2018, arXiv:1806.08342, sec. 2.2. Departs from the paper: symbols run from -127, not -128.

    >>> from torch import tensor
    >>> grid = symmetric(Site.of(tensor([[1.27, 0.004]])), bits=8)
    >>> grid.codes(tensor([[1.27, 0.004]])).symbols.tolist()
    [[127, 0]]
    """
    return SymmetricGrid(bits, channel_axis(site))


@ingredient("grid")
def symmetric_tensor(site: Site, bits: int) -> Form:
    """The same with one scale for the whole tensor."""
    return SymmetricGrid(bits, None)


@ingredient("grid")
def symmetric_mse(site: Site, bits: int) -> Form:
    """The same with a narrower range where that lowers the squared error of a channel's surviving weights.

    Source: Hwang and Sung, SiPS 2014 (the step of least squared error), here searched over 31 fractions of the maximum.

    >>> from torch import tensor
    >>> weight = tensor([[1.0] + [0.3] * 8])
    >>> bool(symmetric_mse(Site.of(weight), bits=2).clip < 1)
    True
    """
    weight, keep, axis = site.weight, site.keep.to(site.weight.device), channel_axis(site)
    errors = torch.stack([_error(SymmetricGrid(bits, axis, clip), weight, keep) for clip in SHRINKS])
    return SymmetricGrid(bits, axis, SHRINKS.to(weight)[errors.argmin(0)])


def _error(grid: SymmetricGrid, weight: Tensor, keep: Tensor) -> Tensor:
    """Squared error per output channel."""
    gap = ((grid(weight, keep=keep) - weight) * keep).square()
    return gap.movedim(grid.axis or 0, 0).flatten(1).sum(1)
