"""Matching features unit by unit: the mean squared distance."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from featherweight.catalogue import ingredient
from featherweight.core.features import Taps, as_map, is_map, paired, same_size, vectors


@ingredient("match", where="deep", same="channels")
def feature_distance(student: Taps, teacher: Taps, batch: Any, progress: float) -> Tensor:
    """`sum_j mean (F_S - F_T)^2` over paired layers j; of maps or tokens the larger are average-pooled.

    Source: Gupta, Hoffman and Malik, CVPR 2016, arXiv:1507.00448 (there a sum over units).
    """
    return sum(distance(ours, theirs) for ours, theirs in paired(student, teacher))  # type: ignore[return-value]


def distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """The mean squared distance of two features of equally many channels."""
    if is_map(tuple(ours.shape)) or is_map(tuple(theirs.shape)) or ours.shape != theirs.shape:
        return F.mse_loss(*same_size(as_map(ours), as_map(theirs)))
    return F.mse_loss(vectors(ours), vectors(theirs))
