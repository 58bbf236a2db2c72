"""Relations between the samples of a batch: their distances and angles are the teacher's, whatever its dimensions.

Source: Park, Kim, Lu and Cho, Relational Knowledge Distillation, CVPR 2019, arXiv:1904.05068, sec. 3.2.
Departs from the paper: the weights 25 and 50 are those of the authors' code for classification; the mean runs over all
pairs and triplets, those of a sample with itself included, as there; the layer is the last one before the logits.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from featherweight.allowed import Amount
from featherweight.catalogue import ingredient, method
from featherweight.core.features import Taps, paired, squared_distances, vectors


@ingredient("match", where="last", samples=3)
def relations(
    student: Taps, teacher: Taps, batch: Any, progress: float, *, distance: Amount = 25.0, angle: Amount = 50.0
) -> Tensor:
    """`lambda_D Huber(psi_D) + lambda_A Huber(psi_A)` of distances by pairs and of angles by triplets of samples.

    Args:
        distance: lambda_D.
        angle: lambda_A; the angles cost n^3.
    """
    total = next(iter(student.values())).new_zeros(())
    for ours, theirs in ((vectors(s), vectors(t)) for s, t in paired(student, teacher)):
        if distance:
            total = total + distance * F.smooth_l1_loss(distances(ours), distances(theirs))
        if angle:
            total = total + angle * F.smooth_l1_loss(angles(ours), angles(theirs))
    return total


def distances(f: Tensor) -> Tensor:
    """`psi_D = ||f_i - f_j|| / mu` of the rows of f, (n, n), mu the mean of the distances that are not 0."""
    found = squared_distances(f).clamp_min(1e-12).sqrt()  # a root has no gradient at 0
    found = found * (found > 1e-6)
    return found / found[found > 0].mean().clamp_min(1e-12) if bool((found > 0).any()) else found


def angles(f: Tensor) -> Tensor:
    """`psi_A = <e_ij, e_kj>`, the cosine of the angle at j between i and k, (n, n, n) by (j, i, k)."""
    directions = F.normalize(f[None] - f[:, None], dim=2)
    return directions @ directions.mT


rkd = method(
    "distill",
    match=relations,
    labels=1.0,
    weight=1.0,
    paper="Park et al., CVPR 2019, arXiv:1904.05068",
    needs={"labels", "train", "teacher"},
    small={"epochs": 1},
)
