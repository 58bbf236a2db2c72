"""Representational distance learning: the distances between the samples of a batch are the teacher's.

Source: McClure and Kriegeskorte, Representational Distance Learning for Deep Neural Networks, Front. Comput. Neurosci.
10:131, 2016, arXiv:1511.03979.
Departs from the paper: all pairs of a batch in place of random pairs; its normalisation is not settled: here each
matrix is divided by its mean, so that widths and scales of the two networks do not matter, or by the dimension only.
The layers are the last ones with maps of each size, or the last layer before the logits.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from featherweight.catalogue import ingredient, method
from featherweight.core.features import Taps, paired, squared_distances, vectors


@ingredient("match", where="any", samples=2)
def distance_matrices(
    student: Taps, teacher: Taps, batch: Any, progress: float, *, normalise: Literal["mean", "dimension"] = "mean"
) -> Tensor:
    """`2 / (B (B - 1)) sum_{i<j} (D^S_ij - D^T_ij)^2` of squared distances D, summed over the paired layers.

    Args:
        normalise: D / mean(D), or D as the squared distance divided by the dimension.
    """
    return sum(  # type: ignore[return-value]
        (distance_matrix(s, normalise) - distance_matrix(t, normalise)).square().mean()
        for s, t in paired(student, teacher)
    )


def distance_matrix(features: Tensor, normalise: Literal["mean", "dimension"] = "mean") -> Tensor:
    """The upper triangle of the matrix of squared distances between samples, as a vector."""
    f = vectors(features)
    i, j = torch.triu_indices(len(f), len(f), 1, device=f.device)
    found = squared_distances(f)[i, j] / f.shape[1]
    return found / found.mean().clamp_min(1e-12) if normalise == "mean" else found


rdl = method(
    "distill",
    match=distance_matrices,
    labels=1.0,
    weight=1.0,
    paper="McClure and Kriegeskorte, Frontiers in Computational Neuroscience, 2016, arXiv:1511.03979",
    needs={"labels", "train", "teacher"},
    small={"epochs": 1},
)
