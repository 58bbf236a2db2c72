"""Low rank: the nearest matrix, and Tucker-2 of a kernel."""

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
