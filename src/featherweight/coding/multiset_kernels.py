"""The loops of the coder of multisets, compiled by numba; with NUMBA_DISABLE_JIT=1 the same Python runs as it stands.

Integers alone, none beyond 2**62, so that every machine makes the same bytes. Rows in ascending order are a tree: all
rows at first, then those that begin with the same bits. At each node it is told how many of its n rows go on with a
zero, by halving 0..n until one number is left; how likely each half is, follows from what the same bit of the same
symbols has been so far.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from featherweight.coding.bits import Ints
from featherweight.coding.context_kernels import _ended, _get, _put, _room

ONE = 1 << 16  # a chance of one
HIGH = 1 << 20  # the weight of the number of zeros at which weights begin
OLDEST = 1 << 20  # bits of one kind that are counted before both counts are halved
MOST = 1 << 16  # rows that a tree may have


@njit(cache=True)
def _sums(sums: Any, rows: int, zeros: int, ones: int) -> None:
    """Of how many of `rows` bits are zero: sums[k] is the weight of all numbers below k.

    The bits are exchangeable, each as likely as the counts so far and a half say: a beta-binomial distribution, from
    about its peak to both sides by the ratios of neighbours.
    """
    a, b = 2 * zeros + 1, 2 * ones + 1
    peak = 0 if a == 1 else rows if b == 1 else min(rows * (a - 2) // (a + b - 4), rows)
    weight = sums[peak + 1] = HIGH
    for k in range(peak, rows):
        weight = max(weight * ((rows - k) * (a + 2 * k)) // ((k + 1) * (b + 2 * (rows - k - 1))), 1)
        sums[k + 2] = weight
    weight = HIGH
    for k in range(peak, 0, -1):
        weight = max(weight * (k * (b + 2 * (rows - k))) // ((rows - k + 1) * (a + 2 * (k - 1))), 1)
        sums[k] = weight
    sums[0] = 0
    for k in range(rows + 1):
        sums[k + 1] += sums[k]


@njit(cache=True)
def _chance(sums: Any, low: int, middle: int, high: int) -> int:
    """That the number is at most `middle`, of ONE, if it is at least `low` and at most `high`."""
    chance = ((sums[middle + 1] - sums[low]) << 16) // (sums[high + 1] - sums[low])
    return min(max(chance, 1), ONE - 1)


@njit(cache=True)
def _count(counts: Any, node: int, zeros: int, ones: int) -> None:
    counts[0, node] += zeros
    counts[1, node] += ones
    while counts[0, node] + counts[1, node] > OLDEST:
        counts[0, node] >>= 1
        counts[1, node] >>= 1


@njit(cache=True, nogil=True)
def encode(rows: Any, ends: Any, bits: int) -> Any:
    """The bytes of rows (n, width) of symbols of so many bits.

    Args:
        ends: whether a row is the last of a run in ascending order, (n,); changed.
    """
    counts, sums = np.zeros((2, 1 << bits), dtype=np.int64), np.zeros(min(len(rows), MOST) + 2, dtype=np.int64)
    out = np.zeros(rows.size // 4 + 128, dtype=np.uint8)
    coder = np.array([0, 0xFFFFFFFF, -1, 0, 0], dtype=np.int64)
    for column in range(rows.shape[1]):
        for bit in range(bits - 1, -1, -1):
            start = 0
            for row in range(len(rows)):
                if not ends[row]:
                    continue
                out = _room(coder, out)
                many, zeros = row + 1 - start, 0
                while zeros < many and not rows[start + zeros, column] >> bit & 1:
                    zeros += 1
                node = (1 << bits | rows[start, column]) >> (bit + 1)
                _sums(sums, many, counts[0, node], counts[1, node])
                low, high = 0, many
                while low < high:
                    middle = (low + high) >> 1
                    below = 1 if zeros <= middle else 0
                    _put(coder, out, below, _chance(sums, low, middle, high))
                    low, high = (low, middle) if below else (middle + 1, high)
                _count(counts, node, zeros, many - zeros)
                if zeros:
                    ends[start + zeros - 1] = True
                start = row + 1
    return _ended(coder, out)


@njit(cache=True, nogil=True)
def decode(data: Any, ends: Any, width: int, bits: int, coder: Any) -> Any:
    """The rows, and how many bytes were looked at; -1 where they end too early."""
    rows = np.zeros((len(ends), width), dtype=np.int64)
    counts, sums = np.zeros((2, 1 << bits), dtype=np.int64), np.zeros(min(len(ends), MOST) + 2, dtype=np.int64)
    for _ in range(4):
        coder[0] = (coder[0] << 8) | (data[coder[2]] if coder[2] < len(data) else 0)
        coder[2] += 1
    for column in range(width):
        for bit in range(bits - 1, -1, -1):
            start = 0
            for row in range(len(ends)):
                if not ends[row]:
                    continue
                if coder[2] > len(data) + 4:  # a writer leaves out four bytes at most
                    return rows, -1
                many = row + 1 - start
                node = (1 << bits | rows[start, column]) >> (bit + 1)
                _sums(sums, many, counts[0, node], counts[1, node])
                low, high = 0, many
                while low < high:
                    middle = (low + high) >> 1
                    if _get(coder, data, _chance(sums, low, middle, high)):
                        high = middle
                    else:
                        low = middle + 1
                for other in range(start + low, row + 1):
                    rows[other, column] |= 1 << bit
                _count(counts, node, low, many - low)
                if low:
                    ends[start + low - 1] = True
                start = row + 1
    return rows, coder[2] if coder[2] <= len(data) + 4 else -1


@njit(cache=True)
def runs(rows: Ints) -> Any:
    """Whether each row (n, width) is the last before a smaller one, or the last of all."""
    ends = np.ones(len(rows), dtype=np.bool_)
    for row in range(len(rows) - 1):
        column, width = 0, rows.shape[1]
        while column < width and rows[row, column] == rows[row + 1, column]:
            column += 1
        ends[row] = column < width and rows[row, column] > rows[row + 1, column]
    return ends
