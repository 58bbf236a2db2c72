"""Kernels that are turned and mirrored copies of one another: the weights of group equivariant convolutions.

The group p4 has the four turns by 90 degrees, p4m also their mirror images. Channels are maps of the group: channel
c * |G| + g is what a filter c sees when it is turned by the element g.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from featherweight.core.structures import Array, Free, Tied
from featherweight.errors import BadOption

ORDERS = {"p4": 4, "p4m": 8}


def turned(kernel: Any, element: int) -> Any:
    """A kernel (..., k, k), array or tensor, acted upon by an element `a + 4 m`: mirrored m times, then turned a times.

    >>> turned(np.array([[1, 2], [3, 4]]), 1).tolist(), turned(np.array([[1, 2], [3, 4]]), 4).tolist()
    ([[2, 4], [1, 3]], [[2, 1], [4, 3]])
    """
    flip = torch.flip if isinstance(kernel, Tensor) else np.flip
    kernel = flip(kernel, (-1,)) if element >= 4 else kernel
    if element % 2:
        kernel = flip(kernel.swapaxes(-1, -2), (-2,))
    return flip(kernel, (-1, -2)) if element % 4 >= 2 else kernel


@cache
def division(order: int) -> tuple[tuple[int, ...], ...]:
    """The table of `r^-1 s` for the elements r (rows) and s of a group, from what they do to a kernel.

    >>> division(4)[1]
    (3, 0, 1, 2)
    """
    mark = np.arange(9).reshape(3, 3)
    seen = {turned(mark, e).tobytes(): e for e in range(order)}
    product = [[seen[turned(turned(mark, s), r).tobytes()] for s in range(order)] for r in range(order)]
    return tuple(tuple(row.index(s) for s in range(order)) for row in product)


@final
@dataclass(frozen=True)
class Rotated(Tied):
    """A convolution's weight whose filters for the elements of a group are one filter, acted upon.

    Cohen and Welling, ICML 2016, eqs. 10 and 11: as (C_o, |G|, C_i, |G|, k, k) it is `W[o, r, i, s] = T_r w[o, i, r^-1
    s]`, with w of shape (C_o, C_i, |G|, k, k); from images, `W[o, r, i] = T_r w[o, i]`.
    """

    order: int
    kernel: int
    lifting: int

    word = "rotated"
    bounds: ClassVar[dict[str, tuple[int, int]]] = {"order": (4, 8), "kernel": (1, 1 << 10), "lifting": (0, 1)}

    def __post_init__(self) -> None:
        super().__post_init__()
        each = self.maps * self.kernel**2
        if self.order not in ORDERS.values() or self.rows % self.order or self.columns % each:
            raise BadOption(
                f"a rotated matrix of {self.rows} x {self.columns}: order={self.order} must be 4 or 8 and divide the "
                f"rows, and {each} inputs of a kernel the columns"
            )

    @property
    def maps(self) -> int:
        """How many channels one map of the input has: images have one."""
        return 1 if self.lifting else self.order

    @property
    def outputs_a_bias(self) -> int:
        """All maps of a function: with biases of their own, what turned images make of them would differ."""
        return self.order

    @property
    def wide(self) -> tuple[int, int, int, int, int]:
        """The shape of the free parameters (C_o, C_i, |G| or 1, k, k)."""
        inputs = self.columns // self.maps // self.kernel**2
        return self.rows // self.order, inputs, self.maps, self.kernel, self.kernel

    def shapes(self) -> dict[str, tuple[int, ...]]:
        outputs, inputs, maps, kernel, _ = self.wide
        return {"filters": (outputs, inputs * maps * kernel * kernel)}

    def entries(self) -> Array:
        index = np.arange(self.size, dtype=np.int32).reshape(self.wide)
        return np.stack([self._seen_by(index, r) for r in range(self.order)], 1).ravel()

    def _seen_by(self, filters: Any, element: int) -> Any:
        """What the filters (C_o, C_i, |G| or 1, k, k) are for one element of the group."""
        if not self.lifting:
            stack = torch.stack if isinstance(filters, Tensor) else np.stack
            filters = stack([filters[:, :, s] for s in division(self.order)[element]], 2)
        return turned(filters, element)

    def portable(self, free: Free, one: Tensor) -> Tensor:
        filters = free["filters"].reshape(self.wide)
        whole = torch.stack([self._seen_by(filters, r) for r in range(self.order)], 1)
        return whole.reshape(self.rows, self.columns)

    def product(self, x: Tensor, free: Free) -> Tensor:
        return F.linear(x, self.matrix(free))

    def macs(self, vectors: int) -> int:
        return vectors * self.rows * self.columns
