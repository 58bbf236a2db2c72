"""Correlations between the leading singular vectors of consecutive layers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from featherweight.allowed import Count
from featherweight.catalogue import ingredient
from featherweight.core.features import Taps, as_map, paired
from featherweight.errors import BadOption

SPARE = 3  # further vectors of the student among which the teacher's are looked for


@ingredient("match", where="stages", same="channels")
def singular_vectors(student: Taps, teacher: Taps, batch: Any, progress: float, *, vectors: Count = 1) -> Tensor:
    """`1/B sum_x sum_l sum_{a,b,k} (R_S - R_T)^2` with `R = exp(-(v^l_ak - v^{l+1}_bk)^2 / 8)` over consecutive layers.

    The v^l are the first right singular vectors of the maps of layer l, (positions x channels). The student's are those
    nearest to the teacher's, with their sign, scaled by the teacher's singular values of norm 1.
    Source: Lee, Kim and Song, ECCV 2018, sec. 3.

    Args:
        vectors: how many of each layer.

    Raises:
        BadOption: there are fewer than two layers.
    """
    found = [aligned(as_map(s), as_map(t), vectors) for s, t in paired(student, teacher)]
    if len(found) < 2:
        raise BadOption(f"{len(found)} layer gives no correlation between layers: pass pairs= with more of them")
    total = found[0][0].new_zeros(())
    for (s0, t0), (s1, t1) in pairwise(found):
        count = min(s0.shape[2], s1.shape[2])
        ours, theirs = (correlation(a[:, :, :count], b[:, :, :count]) for a, b in ((s0, s1), (t0, t1)))
        total = total + (ours - theirs).square().sum((1, 2, 3)).mean()
    return total


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """`exp(-(v_ak - u_bk)^2 / 8)` of vectors (batch, m, k) and (batch, n, k), (batch, m, n, k)."""
    return torch.exp(-(first[:, :, None] - second[:, None]).square() / 8)


def aligned(ours: Tensor, theirs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Singular vectors of student and teacher that belong together, (batch, channels, count) each, scaled."""
    t, values = leading(theirs, count)
    t = t * t.gather(1, t.abs().argmax(1, keepdim=True)).sign()  # one of two signs, always the same
    s, _ = leading(ours, count + SPARE)
    cosines = t.mT @ s
    nearest = cosines.detach().abs().argmax(2)
    signs = cosines.detach().gather(2, nearest[..., None]).sign().mT
    chosen = s.gather(2, nearest[:, None].expand(-1, s.shape[1], -1)) * signs
    scale = (values / values.norm(dim=1, keepdim=True).clamp_min(1e-12))[:, None]
    return chosen * scale, t * scale


def leading(maps: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first right singular vectors of maps (batch, c, h, w) as (batch, c, k), and their singular values (batch, k).

    The gradient is that of the eigenvectors of F^T F to first order, without the pairs of eigenvalues that nearly
    agree, where it has no bound.

    >>> v, s = leading(torch.diag(torch.tensor([3.0, 2.0])).view(1, 2, 2, 1), 1)
    >>> v[0, :, 0].abs().tolist(), s.tolist()
    ([1.0, 0.0], [[3.0]])
    """
    flat = maps.flatten(2)
    gram = flat @ flat.mT
    values, basis = torch.linalg.eigh(gram.detach())
    values, basis = values.flip(1).clamp_min(0), basis.flip(2)
    count = min(count, basis.shape[2])
    gaps = values[:, None, :count] - values[:, :, None]
    near = gaps.abs() <= 1e-3 * values[:, :1, None].clamp_min(1e-12)
    rates = torch.where(near, 0, 1 / torch.where(near, 1, gaps))
    moved = basis @ (rates * (basis.mT @ gram @ basis[:, :, :count]))
    return basis[:, :, :count] + moved - moved.detach(), values[:, :count].sqrt()
