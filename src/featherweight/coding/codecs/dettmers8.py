"""Four sets of 256 numbers for gradients and activations that travel between machines: a byte for every float.

Tim Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", ICLR 2016, arXiv:1511.04561. A tensor is divided
by its largest size; each element becomes the nearest of 256 fixed numbers in [-1, 1], found by binary search.

Departs from the paper: the dynamic tree is the authors' later table (0.1 to 1 is bisected, the paper's text says 0.1 to
0.9; zero and one are in it). The static tree and the mantissa are reconstructed: zero stands in the place of the two
smallest numbers of a tree, or of the smallest of the mantissa, and the largest number is one in all of them. Tensors
may be cut into blocks, each with its own largest size, as the authors' later work does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.catalogue import recipe

PAPER = "Dettmers, ICLR 2016, arXiv:1511.04561"


@recipe(paper=PAPER, family="quantize", kind="codec")
def dettmers8_dynamic_tree() -> Tensor:
    """A byte whose leading zeros are a decimal exponent and whose other bits bisect: 5.5e-7 to 1, 256 numbers.

    Behind the sign, e zeros and a one stand for 10^-e, and the i = 6 - e bits that are left bisect [0.1, 1): `2^i`
    midpoints of `linspace(0.1, 1, 2^i + 1)`, times 10^-e. The larger a number, the more bits it has for its digits.

    >>> table = dettmers8_dynamic_tree()
    >>> len(table.unique()), f"{table[table > 0].min():.2g}"
    (256, '5.5e-07')
    """
    return _signed(torch.cat([_bisected(2**i) * 10.0 ** (i - 6) for i in range(7)]), [0.0, 1.0])


@recipe(paper=PAPER, family="quantize", kind="codec")
def dettmers8_static_tree() -> Tensor:
    """A sign, three bits of decimal exponent, four bits that bisect: as fine near 1e-7 as near 1.

    >>> table = dettmers8_static_tree()
    >>> len(table.unique()), f"{table[table > 0].min():.2g}"
    (256, '1.8e-08')
    """
    sizes = torch.cat([_bisected(16) * 10.0**-e for e in range(8)]).sort().values
    return _signed(sizes[1:], [0.0, 1.0])


@recipe(paper=PAPER, family="quantize", kind="codec")
def dettmers8_mantissa() -> Tensor:
    """A sign, three bits of binary exponent, four bits of mantissa, over the largest: a small floating-point number.

    >>> table = dettmers8_mantissa()
    >>> len(table.unique()), f"{table[table > 0].min():.2g}"
    (255, '0.0043')
    """
    mantissa = 1 + torch.arange(16, dtype=torch.float64) / 16
    sizes = torch.cat([mantissa * 2.0**-e for e in range(8)]).sort().values[1:] / mantissa[-1]
    return _signed(sizes, [0.0])


@recipe(paper=PAPER, family="quantize", kind="codec")
def dettmers8_linear() -> Tensor:
    """The numbers -127/127 to 127/127 at equal distances.

    >>> table = dettmers8_linear()
    >>> len(table), round(float(table[128] * 127), 3)
    (255, 1.0)
    """
    return (torch.arange(-127, 128, dtype=torch.float64) / 127).float()


def _bisected(count: int) -> Tensor:
    """The midpoints of so many equal parts of [0.1, 1), float64."""
    ends = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
    return (ends[1:] + ends[:-1]) / 2


def _signed(sizes: Tensor, others: list[float]) -> Tensor:
    """Sizes with both signs, and others, ascending, float32."""
    return torch.cat([-sizes, sizes, torch.tensor(others, dtype=torch.float64)]).sort().values.float()
