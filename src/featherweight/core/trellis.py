"""Rate-distortion optimal rounding to an integer grid, alone or along the paths of a trellis (dependent quantization).

Of two grids, the even and the odd multiples of a step (zero is in both), the parities of the levels before say which
one is in use: Schwarz et al., "Quantization and Entropy Coding in the Versatile Video Coding (VVC) Standard", IEEE
TCSVT 31(10), 2021. The path of least distortion plus rate is found by the algorithm of Viterbi.

What an error costs may depend on the errors beside it, as those of a layer's weights do when its inputs are correlated
(`Metric`). Then each of the paths that survive carries its own errors along the row, and what they do to the weights to
come is taken into what these are rounded from: per-survivor processing (Raheli, Polydoros, Tzou, IEEE Transactions on
Communications 43(2), 1995) of the feedback of optimal brain compression (Frantar et al., ICLR 2023, arXiv:2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

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
BLOCK = 24  # columns after which all paths that survive are taken to have come from one


@final
@dataclass(frozen=True)
class Metric:
    """What errors cost: row o's `outputs[o] * sum_j columns[j] (e_j + sum_{k < j} e_k factor[j, k])^2`.

    `factor` (columns, columns) is the transpose of the unit upper triangular U of `H = U diag(columns) U'`, so this is
    `outputs[o] * e H e'` for each row e of the error (outputs, columns).
    """

    outputs: Floats
    columns: Floats
    factor: Floats

    @staticmethod
    def of(matrix: Floats, outputs: Floats) -> Metric:
        """Of a symmetric positive matrix H (columns, columns) and what each row counts (outputs,)."""
        upper = np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
        pivots = np.diagonal(upper)
        return Metric(np.asarray(outputs, dtype=np.float64), pivots**2, np.ascontiguousarray((upper / pivots).T))

    @staticmethod
    def plain(outputs: int, columns: int, weight: float = 1.0) -> Metric:
        """`weight` times the sum of squares."""
        return Metric(np.full(outputs, weight), np.ones(columns), np.zeros((0, 0)))

    def first(self, columns: int) -> Metric:
        """Of the first columns alone, whatever the later ones are then chosen to be."""
        return Metric(self.outputs, self.columns[:columns], np.ascontiguousarray(self.factor[:columns, :columns]))


def quantized(
    weight: Floats,
    step: float | Floats,
    states: int,
    rate: float,
    *,
    metric: Metric | None = None,
    kept: NDArray[np.bool_] | None = None,
    rounds: int = 3,
) -> Ints:
    """Integers `q` of weight's shape (outputs, inputs) with `weight ~ q * step`, points of a trellis of 4 or 8 states.

    Minimises the cost of the errors plus `rate * bits`, where the bits are those that levels of the round before would
    take, group by group of rows and columns of like size, at their frequencies; the first round has rate zero.

    Args:
        weight: shape (outputs, inputs).
        step: the finer of the two grids' distance of points, or one for each output.
        states: 1 for a plain grid.
        rate: what a bit costs; zero is the nearest point, or path.
        metric: what errors (in units of the weight) cost; squares of a step when left out.
        kept: False where the integer is to be zero.
    """
    steps = np.broadcast_to(np.asarray(step, dtype=np.float64), len(weight))
    scaled = np.ascontiguousarray(weight / steps[:, None], dtype=np.float64)
    found = metric or Metric.plain(*scaled.shape)
    rows = found.outputs * (steps**2 if metric else 1.0)
    free = np.ones(scaled.shape, dtype=np.bool_) if kept is None else np.ascontiguousarray(kept)
    group, bits = _groups(scaled), np.zeros((GROUPS, 2, TOLD + 1))

    def path(price: float) -> Any:
        return best_path(scaled, free, rows, found.columns, found.factor, group, bits, price, NEXT[states], states > 1)

    points, levels, odd = path(0.0)
    for _ in range(rounds if rate else 0):
        bits = _bits(levels, group, odd)
        points, levels, odd = path(rate)
    return np.asarray(points, dtype=np.int64)


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
    return np.asarray(bits)


@njit(cache=True)
def best_path(  # noqa: PLR0912, PLR0917 - one compiled loop, on plain arrays
    scaled: Floats,
    kept: Any,
    outputs: Floats,
    columns: Floats,
    factor: Floats,
    group: Ints,
    bits: Floats,
    rate: float,
    follows: Any,
    two: bool,
) -> Any:
    """Points, levels, and which grid (0 even, 1 odd) each is on, of the cheapest path from state zero, row by row.

    With a factor, the cheapest of those that agree with the best one up to the last block but one.
    """
    rows, width = scaled.shape
    states, fed = len(follows), len(factor) > 0
    cost, after = np.full(states, np.inf), np.empty(states)
    cost[0] = 0.0
    before = np.zeros((rows * width, states), dtype=np.uint8)
    chosen = np.zeros((rows * width, states), dtype=np.int32)
    errors, longer = np.zeros((states, 2 * BLOCK)), np.zeros((states, 2 * BLOCK))  # of the last columns, path by path
    origin, later = np.arange(states), np.arange(states)  # the state of each path one block ago
    aims = np.zeros(states)
    for r in range(rows):
        goal = scaled[r].copy()  # moved by the errors that all paths share
        start = 0
        for j in range(width):
            i, reach = r * width + j, j - start
            weight, odds = outputs[r] * columns[j], bits[group[r, j]]
            for s in range(states):
                after[s] = np.inf
            for s in range(states):
                if cost[s] == np.inf:
                    continue
                aim = goal[j]
                if fed:
                    for k in range(reach):
                        aim += errors[s, k] * factor[j, start + k]
                aims[s] = aim
                size, odd = abs(aim), s & 1 if two else 0
                base = int((size + odd) / 2) if two else int(size)
                for candidate in range(4 if kept[r, j] else 1):  # zero, and the three levels about the weight
                    level = max(base + candidate - 2, 0) if candidate else 0
                    point = 2 * level - (odd if level else 0) if two else level
                    told = odds[odd, min(level, TOLD)]
                    if level > TOLD:
                        told += 2 * np.log2(level - TOLD + 1)
                    total = cost[s] + weight * (size - point) ** 2 + rate * told
                    to = follows[s, level & 1]
                    if total < after[to]:
                        after[to], before[i, to], chosen[i, to] = total, s, level if aim >= 0 else -level
            cost, after = after, cost
            if not fed:
                continue
            for s in range(states):
                if cost[s] < np.inf:
                    old = before[i, s]
                    for k in range(reach):
                        longer[s, k] = errors[old, k]
                    longer[s, reach] = scaled[r, j] - _point(chosen[i, s], old & 1 if two else 0, two)
                    later[s] = origin[old]
            errors, longer, origin, later = longer, errors, later, origin
            if reach + 1 == 2 * BLOCK:
                best = int(np.argmin(cost))
                for m in range(j + 1, width):
                    for k in range(BLOCK):
                        goal[m] += errors[best, k] * factor[m, start + k]
                for s in range(states):
                    if origin[s] != origin[best]:
                        cost[s] = np.inf
                    for k in range(BLOCK):
                        errors[s, k] = errors[s, k + BLOCK]
                start += BLOCK
            if (reach + 1) % BLOCK == 0:
                for s in range(states):
                    origin[s] = s
    return _traced(before, chosen, int(np.argmin(cost)), two, scaled.shape)


@njit(cache=True)
def _point(level: int, odd: int, two: bool) -> int:
    """The multiple of the step that a level stands for."""
    return 2 * level - odd * np.sign(level) if two else level


@njit(cache=True)
def _traced(before: Any, chosen: Any, state: int, two: bool, shape: Any) -> Any:
    """The path that ends in a state."""
    count = len(chosen)
    points, levels, grids = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, np.int64)
    for i in range(count - 1, -1, -1):
        levels[i], state = chosen[i, state], before[i, state]
        grids[i] = state & 1 if two else 0
        points[i] = _point(levels[i], grids[i], two)
    return points.reshape(shape), levels.reshape(shape), grids.reshape(shape)
