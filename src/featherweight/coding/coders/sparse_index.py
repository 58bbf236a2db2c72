"""Positions of the weights that are not background: relative gaps with fillers, or a bit per weight."""

from __future__ import annotations

import numpy as np

from featherweight.catalogue import recipe
from featherweight.coding.bits import Ints
from featherweight.errors import FormatError


@recipe(paper="Han, Mao and Dally, ICLR 2016, arXiv:1510.00149, section 2", family="code", kind="coder")
def sparse_index(symbols: Ints, background: int, bits: int) -> tuple[Ints, Ints]:
    """Relative index: for each entry the number of background symbols before it, and its symbol.

    A run of 2**bits or more is broken by fillers: the largest gap, with the background as symbol. What follows the last
    entry is background. As a coder of its own (`coder="sparse_index"`) it stores gaps and symbols at fixed widths.

    Departs from the paper: the width of a gap is chosen per tensor, not 8 bits in convolutions and 5 in linear layers.

    >>> gaps, entries = sparse_index(np.array([0, 0, 7, 0, 0, 0, 0, 0, 9, 0]), 0, 2)
    >>> gaps.tolist(), entries.tolist()
    ([2, 3, 1], [7, 0, 9])
    """
    gaps = run_lengths(symbols, background)
    fillers = gaps >> bits
    ends = np.cumsum(fillers + 1) - 1
    total = int(ends[-1]) + 1 if len(ends) else 0
    out = np.full(total, (1 << bits) - 1, dtype=np.int64)
    entries = np.full(total, background, dtype=np.int64)
    out[ends] = gaps & ((1 << bits) - 1)
    entries[ends] = symbols[symbols != background]
    return out, entries


def run_lengths(symbols: Ints, background: int) -> Ints:
    """The number of background symbols before each other symbol."""
    return np.diff(np.flatnonzero(symbols != background), prepend=-1) - 1


def from_gaps(gaps: Ints, entries: Ints, background: int, count: int) -> Ints:
    """The `count` symbols whose gaps and entries are given.

    Raises:
        FormatError: the gaps lead beyond the end.
    """
    positions = np.cumsum(gaps + 1) - 1
    if len(positions) and (gaps.max() >= count or positions[-1] >= count):
        raise FormatError("the file is corrupt: a relative index leads beyond the end of its tensor")
    symbols = np.full(count, background, dtype=np.int64)
    symbols[positions] = entries
    return symbols
