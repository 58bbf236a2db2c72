"""Low rank: the nearest matrix, Tucker-2 of a kernel, and grouped convolutions followed by one of 1 x 1."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a given rank as (left, right), singular values split evenly between the two."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def decompose(kernel: Tensor, r1: int, r2: int, sweeps: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Core (r1, r2, d, d), orthonormal output factor (N, r1) and input factor (C, r2): the truncated higher-order SVD,
    then `sweeps` of higher-order orthogonal iteration, none of which makes the error larger (De Lathauwer, 2000).

    >>> core, out, into = decompose(torch.ones(4, 5, 3, 3), 1, 1)
    >>> core.shape, round(float(core.norm()), 4)
    (torch.Size([1, 1, 3, 3]), 13.4164)
    """
    out, into = leading(kernel.flatten(1), r1), leading(kernel.transpose(0, 1).flatten(1), r2)
    for _ in range(sweeps):
        out = leading(torch.einsum("nchw,cs->nshw", kernel, into).flatten(1), r1)
        into = leading(torch.einsum("nchw,nr->crhw", kernel, out).flatten(1), r2)
    return torch.einsum("nchw,nr,cs->rshw", kernel, out, into), out, into


def leading(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors, (rows, rank)."""
    return torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank]


def grouped(weight: Tensor, groups: int, rank: int) -> tuple[Tensor, Tensor]:
    """A weight (K, C, k, k) as a grouped one (groups rank, C / groups, k, k) and a 1 x 1 (K, groups rank, 1, 1).

    The inputs of each group, as a matrix (K, n k^2), get the best approximation of the rank: exact where that is K or
    n k^2.

    >>> spatial, point = grouped(torch.ones(3, 4, 3, 3), 4, 1)
    >>> tuple(spatial.shape), tuple(point.shape), round(float((point[:, 0, 0] * spatial[0, 0, 0, 0])[0]), 4)
    ((4, 1, 3, 3), (3, 4, 1, 1), 1.0)
    """
    outputs, inputs, *kernel = weight.shape
    each = inputs // groups
    spatial, point = weight.new_zeros(groups * rank, each, *kernel), weight.new_zeros(outputs, groups * rank)
    for i in range(groups):
        left, right = truncated(weight[:, i * each : (i + 1) * each].flatten(1), rank)
        found = slice(i * rank, i * rank + left.shape[1])  # fewer where there are fewer outputs
        point[:, found], spatial[found] = left, right.view(-1, each, *kernel)
    return spatial, point[:, :, None, None]
