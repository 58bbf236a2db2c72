"""The rank that keeps a given share of a matrix's energy."""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.catalogue import ingredient


@ingredient("rank")
def energy(matrix: Tensor, *, keep: float = 0.9) -> int:
    """The least rank whose singular values hold the share `keep` of the sum of squares of a matrix (rows, columns).

    Source: the usual rule of Denton et al., NIPS 2014, arXiv:1404.0736, for truncated SVD.

    >>> energy(torch.diag(torch.tensor([3.0, 1.0, 1.0]))), energy(torch.diag(torch.tensor([1.0, 1.0, 1.0])))
    (2, 3)
    """
    squares = torch.linalg.svdvals(matrix.detach().double()).square()
    share = squares.cumsum(0) / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return min(int((share < keep - 1e-12).sum()) + 1, len(squares))
