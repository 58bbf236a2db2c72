"""Scalar k-means of a layer's weights, no training: the k values of least squared error.

Yunchao Gong, Liu Liu, Ming Yang, Lubomir Bourdev, "Compressing Deep Convolutional Networks using Vector Quantization",
2014, arXiv:1412.6115, section 3.2: every weight becomes the nearest of the k values that minimise
`sum_i min_j |w_i - c_j|^2`; a weight costs log2 k bits. `gong_binary`, `gong_pq` and `gong_rq` are the paper's others.

Departs from the paper: the minimum is found exactly by dynamic programming (Wu, "Optimal quantization by matrix
searching", Journal of Algorithms 1991; Wang and Song, "Ckmeans.1d.dp", The R Journal 2011), where the paper iterates
from random values; layers of more than `ENTRIES / k` weights are solved exactly over runs of neighbouring values, then
refined by Lloyd's iterations; zeros keep a value of their own; convolutions are shared too (where="Linear" is the
paper's choice).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from featherweight.catalogue import ingredient, method
from featherweight.ingredients.cluster.lloyd import lloyd

ENTRIES = 2**26
"""Of the table of cuts (values x centroids, four bytes each): with more values, neighbours are taken together."""


@ingredient("cluster")
def exact(values: Tensor, centroids: Tensor) -> Tensor:
    """The centroids (k,), ascending, float64, of the least sum of squares over all partitions; k as many as given.

    >>> exact(torch.tensor([0.0, 1.0, 5.0, 9.0, 10.0]), torch.zeros(3)).tolist()
    [0.5, 5.0, 9.5]
    """
    k, ordered = len(centroids), np.sort(values.detach().flatten().double().cpu().numpy())
    run = -(-len(ordered) // max(k, ENTRIES // k))
    starts = np.arange(0, len(ordered), run)
    # about the mean, so that differences of running sums of squares lose as little as possible
    middle = ordered.mean() if len(ordered) else 0.0
    sums = _running(np.add.reduceat(ordered - middle, starts))
    squares = _running(np.add.reduceat((ordered - middle) ** 2, starts))
    counts = np.append(starts, len(ordered)).astype(np.float64)
    edges = counts[_cuts(counts, sums, squares, k)].astype(np.int64)
    means = np.add.reduceat(ordered, edges[:-1]) / np.diff(edges)
    found = torch.from_numpy(means)
    return found if run == 1 else lloyd(values, found)


def _running(values: Any) -> Any:
    return np.concatenate([np.zeros(1), np.cumsum(values)])


@njit(cache=True)
def _cuts(counts: Any, sums: Any, squares: Any, k: int) -> Any:
    """Where the k intervals of least squared error begin, and the end: (k + 1,) places among the sorted values.

    `D_m(j) = min_i D_{m-1}(i) + cost(i, j)`; the best i never falls as j grows, so that one row of D is found by
    halving: the middle first, then either side between the places that are left.
    """
    n = len(counts) - 1
    best = np.empty(n + 1)
    for j in range(n + 1):
        best[j] = _cost(counts, sums, squares, 0, j)
    cut = np.zeros((k, n + 1), np.int32)
    low, high = np.empty(64, np.int64), np.empty(64, np.int64)
    least, most = np.empty(64, np.int64), np.empty(64, np.int64)
    for m in range(1, k):
        row, top = best.copy(), 0
        low[0], high[0], least[0], most[0] = m + 1, n, m, n - 1
        while top >= 0:
            a, b, c, d = low[top], high[top], least[top], most[top]
            top -= 1
            if a > b:
                continue
            j = (a + b) // 2
            here, cost = c, np.inf
            for i in range(c, min(j - 1, d) + 1):
                found = best[i] + _cost(counts, sums, squares, i, j)
                if found < cost:
                    here, cost = i, found
            row[j], cut[m, j] = cost, here
            low[top + 1], high[top + 1], least[top + 1], most[top + 1] = a, j - 1, c, here
            low[top + 2], high[top + 2], least[top + 2], most[top + 2] = j + 1, b, here, d
            top += 2
        best = row
    edges = np.empty(k + 1, np.int64)
    edges[k] = n
    for m in range(k - 1, -1, -1):
        edges[m] = cut[m, edges[m + 1]]
    return edges


@njit(cache=True)
def _cost(counts: Any, sums: Any, squares: Any, i: int, j: int) -> float:
    """The squared error of the values from i to j about their mean."""
    count = counts[j] - counts[i]
    return 0.0 if count <= 0 else squares[j] - squares[i] - (sums[j] - sums[i]) ** 2 / count


gong_kmeans = method(
    "share",
    cluster=exact,
    epochs=0,
    paper="Gong et al., 2014, arXiv:1412.6115, section 3.2",
    shrinks={"bits"},
    small={"weight_bits": 4},
)
