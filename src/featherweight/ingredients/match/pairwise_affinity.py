"""Matching how alike the places of a map are, whatever number of channels the maps have."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from featherweight.allowed import Positive
from featherweight.catalogue import ingredient
from featherweight.core.features import Taps, as_map, paired, same_size


@ingredient("match", where="top", same="size")
def pairwise_affinity(student: Taps, teacher: Taps, batch: Any, progress: float, *, scale: Positive = 0.5) -> Tensor:
    """`1 / N^2 sum_ij (a_ij^S - a_ij^T)^2`, a_ij cosines of features of nodes i and j of N; the mean over samples.

    Nodes are windows of the map, by their maximum; without pooling, N^2 were the square of the number of pixels.
    Source: Liu et al., CVPR 2019, arXiv:1903.04197.

    Args:
        scale: side of a window as a part of the map's: 0.5 makes 2 x 2 nodes.
    """
    return sum(  # type: ignore[return-value]
        (affinity(a, scale) - affinity(b, scale)).square().mean()
        for a, b in (same_size(as_map(ours), as_map(theirs)) for ours, theirs in paired(student, teacher))
    )


def affinity(maps: Tensor, scale: float) -> Tensor:
    """Cosines between the nodes of maps (batch, channels, height, width): (batch, nodes, nodes)."""
    window = [min(max(int(side * scale), 1), side) for side in maps.shape[2:]]
    nodes = F.normalize(F.max_pool2d(maps, window, ceil_mode=True).flatten(2), dim=1)
    return nodes.transpose(1, 2) @ nodes
