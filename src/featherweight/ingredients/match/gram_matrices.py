"""Gram matrices between the layers of a network, which say how features flow from one to the other."""

from __future__ import annotations

from itertools import combinations
from typing import Any, Literal

from torch import Tensor

from featherweight.catalogue import ingredient
from featherweight.core.features import Taps, as_map, paired, same_size
from featherweight.errors import BadOption

Between = Literal["consecutive", "all", "skip", "self"]


@ingredient("match", where="stages", same="channels")
def gram_matrices(
    student: Taps,
    teacher: Taps,
    batch: Any,
    progress: float,
    *,
    between: Between = "consecutive",
    scale: Literal["sum", "mean"] = "sum",
    pooling: Literal["max", "average"] = "max",
) -> Tensor:
    """`1/B sum_x sum_{i,j} lambda_ij ||G^T_ij - G^S_ij||_F^2` over pairs of layers, a scalar.

    `G_ij(x) = sum_{positions} F_i F_j^T / (h w)` has the size channels of i x channels of j; the larger of two maps is
    pooled to the smaller. Source: Yim et al., CVPR 2017, eq. 1 and 2; other pairs: Chou, thesis, 2019.

    Args:
        between: each layer and the next; all pairs i < j; those with at least one layer between; all and i = j too.
        scale: lambda is 1, or 1 / (size of the matrix).
        pooling: how.

    Raises:
        BadOption: there are too few layers for a pair.
    """
    ours, theirs = zip(*((as_map(s), as_map(t)) for s, t in paired(student, teacher)), strict=True)
    found = layer_pairs(len(ours), between)
    if not found:
        raise BadOption(f"{len(ours)} layers give no pair for Gram matrices ({between}): pass pairs= with more layers")
    total = ours[0].new_zeros(())
    for i, j in found:
        gap = (gram(ours[i], ours[j], pooling) - gram(theirs[i], theirs[j], pooling)).square()
        total = total + (gap.mean((1, 2)) if scale == "mean" else gap.sum((1, 2))).mean()
    return total


def layer_pairs(count: int, between: Between) -> list[tuple[int, int]]:
    """Which of `count` layers are paired.

    >>> layer_pairs(3, "consecutive"), layer_pairs(3, "all"), layer_pairs(3, "skip"), len(layer_pairs(3, "self"))
    ([(0, 1), (1, 2)], [(0, 1), (0, 2), (1, 2)], [(0, 2)], 6)
    """
    pairs = list(combinations(range(count), 2))
    chosen = {
        "consecutive": [(i, j) for i, j in pairs if j == i + 1],
        "all": pairs,
        "skip": [(i, j) for i, j in pairs if j > i + 1],
        "self": sorted(pairs + [(i, i) for i in range(count)]),
    }
    return chosen[between]


def gram(first: Tensor, second: Tensor, pooling: Literal["max", "average"] = "max") -> Tensor:
    """`G_ij = sum_{s,t} F1_i F2_j / (h w)` of maps (batch, m, h, w) and (batch, n, h, w), (batch, m, n)."""
    a, b = same_size(first, second, pooling)
    return a.flatten(2) @ b.flatten(2).mT / (a.shape[2] * a.shape[3])
