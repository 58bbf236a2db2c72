"""Sums of powers of two: weights whose products are a few shifts and additions."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from featherweight.catalogue import ingredient
from featherweight.core.forms import Form
from featherweight.core.levels import Levels, survivors
from featherweight.core.site import Site


@ingredient("grid")
def shift_sums(site: Site, bits: int, terms: int = 2) -> Form:
    """`max|W|` times sums of `terms` powers of two, each from a codebook of `2^bits - 1` entries, chosen greedily.

    Source: Gudovskiy and Rigazio, 2017, arXiv:1706.02393, sec. 3. Departs from the paper: nothing known.

    >>> shift_sums(Site.of(torch.tensor([1.0, -0.7, 0.1])), bits=4)(torch.tensor([1.0, -0.7, 0.1])).tolist()
    [1.0, -0.75, 0.09375]
    """
    weights = survivors(site)
    widest = float(weights.abs().max()) if weights.numel() else 0.0
    unit = shift_levels(bits, terms)
    edges = torch.tensor([0.5]) if widest == 0 else Levels(unit).edges * widest
    levels = torch.zeros(2) if widest == 0 else unit * widest
    return Levels(levels.to(site.weight), edges)


def codebook(n: int, bits: int) -> Tensor:
    """`C_n`: zero and `+-2^(1-n), +-2^-n, ...`, in all `2^bits - 1` entries, ascending, float64 (eq. 2).

    >>> codebook(1, 3).tolist()
    [-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0]
    """
    sizes = torch.tensor([2.0 ** (1 - n - i) for i in range(2 ** (bits - 1) - 1)], dtype=torch.float64).flip(0)
    return torch.cat([-sizes.flip(0), torch.zeros(1, dtype=torch.float64), sizes])


def greedy(values: Tensor, bits: int, terms: int) -> list[Tensor]:
    """The terms of values in [-1, 1]: from each codebook in turn the entry nearest to what is left, float64."""
    left, found = values.double(), []
    for n in range(1, terms + 1):
        found.append(Levels(codebook(n, bits))(left))
        left = left - found[-1]
    return found


def shift_levels(bits: int, terms: int) -> Tensor:
    """All sums that `greedy` makes of values in [-1, 1], ascending, float64: of a value it makes the nearest.

    That greedy and nearest agree (but for values half-way between two levels) is tested, not proved.

    >>> len(shift_levels(4, 1)), len(shift_levels(4, 2))
    (15, 89)
    """
    books = [codebook(n, bits).tolist() for n in range(1, terms + 1)]
    sums = torch.tensor(sorted({sum(entries) for entries in itertools.product(*books)}), dtype=torch.float64)
    return sums[(sum(greedy(sums, bits, terms)) == sums) & (sums.abs() <= 1)]
