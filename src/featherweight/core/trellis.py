"""Rate-distortion optimal rounding to an integer grid, alone or along the paths of a trellis (dependent quantization).

Of two grids, the even and the odd multiples of a step (zero is in both), the parities of the levels before say which
one is in use: Schwarz et al., "Quantization and Entropy Coding in the Versatile Video Coding (VVC) Standard", IEEE
TCSVT 31(10), 2021. The path of least distortion plus rate is found by the algorithm of Viterbi.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NEXT = {
    1: np.zeros((1, 2), dtype=np.int64),
    4: np.array([[0, 1], [2, 3], [1, 0], [3, 2]], dtype=np.int64),
    8: np.array([[0, 2], [7, 5], [1, 3], [6, 4], [2, 0], [5, 7], [3, 1], [4, 6]], dtype=np.int64),
}
TOLD = 24  # levels whose rates are counted; each one beyond costs as much as the last one more than the one before
GROUPS = 16  # of weights of about the same size, with rates of their own
SMOOTH = 0.5  # added to every count


def quantized(weight: Floats, step: float, states: int, rate: float, *, rounds: int = 3) -> Ints:
    """Integers `q` of weight's shape (outputs, inputs) with `weight ~ q * step`, points of a trellis of 4 or 8 states.

    Minimises `sum (weight / step - q)^2 + rate * bits`, where the bits are those that levels of the round before
    would take, group by group of rows and columns of like size, at their frequencies; the first round has rate zero.

    Args:
        weight: shape (outputs, inputs).
        step: the finer of the two grids' distance of points.
        states: 1 for a plain grid.
        rate: in squares of a step for each bit; zero is the nearest point, or path.
    """
    scaled = np.ascontiguousarray(weight / step, dtype=np.float64)
    group = _groups(scaled)
    bits = np.zeros((GROUPS, 2, TOLD + 1))
    flat, groups = scaled.reshape(-1), group.reshape(-1)
    points, levels, odd = best_path(flat, groups, bits, 0.0, NEXT[states], states > 1)
    for _ in range(rounds if rate else 0):
        bits = _bits(levels, groups, odd)
        points, levels, odd = best_path(flat, groups, bits, rate, NEXT[states], states > 1)
    return np.asarray(points.reshape(weight.shape), dtype=np.int64)


def _groups(scaled: Floats) -> Ints:
    """Which weights are alike: by the product of the mean sizes of row and column, on a logarithmic scale."""
    size = np.abs(scaled)
    expected = size.mean(1, keepdims=True) * size.mean(0, keepdims=True) / max(float(size.mean()), 1e-30)
    return np.clip(np.round(2 * np.log2(np.maximum(expected, 1e-6))) + 8, 0, GROUPS - 1).astype(np.int64)


def _bits(levels: Ints, group: Ints, odd: Ints) -> Floats:
    """The bits of each level, sign included, in each group on each of the two grids."""
    counts = np.full((GROUPS, 2, TOLD + 1), SMOOTH)
    np.add.at(counts, (group, odd, np.minimum(np.abs(levels), TOLD)), 1)
    bits = -np.log2(counts / counts.sum(2, keepdims=True))
    bits[..., 1:] += 1
    return bits


@njit(cache=True)
def best_path(scaled: Floats, group: Ints, bits: Floats, rate: float, follows: Any, two: bool) -> Any:
    """Points, levels, and which grid (0 even, 1 odd) each is on, of the cheapest path from state zero."""
    count, states = len(scaled), len(follows)
    cost = np.full(states, np.inf)
    cost[0] = 0.0
    before = np.zeros((count, states), dtype=np.uint8)
    chosen = np.zeros((count, states), dtype=np.int32)
    for i in range(count):
        after = np.full(states, np.inf)
        size = abs(scaled[i])
        for s in range(states):
            if cost[s] == np.inf:
                continue
            odd = s & 1 if two else 0
            base = int((size + odd) / 2) if two else int(size)
            for candidate in range(4):  # zero, and the three levels about the weight
                level = max(base + candidate - 2, 0) if candidate else 0
                point = 2 * level - (odd if level else 0) if two else level
                told = bits[group[i], odd, min(level, TOLD)]
                if level > TOLD:
                    told += 2 * np.log2(level - TOLD + 1)
                total = cost[s] + (size - point) ** 2 + rate * told
                to = follows[s, level & 1]
                if total < after[to]:
                    after[to], before[i, to], chosen[i, to] = total, s, level
        cost = after
    points, levels, grids = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, np.int64)
    state = int(np.argmin(cost))
    for i in range(count - 1, -1, -1):
        level, state = chosen[i, state], before[i, state]
        grids[i] = state & 1 if two else 0
        sign = -1 if scaled[i] < 0 else 1
        levels[i] = sign * level
        points[i] = sign * (2 * level - (grids[i] if level else 0)) if two else levels[i]
    return points, levels, grids
