"""Locality preserving: samples that are neighbours in the teacher's features stay neighbours in the student's.

Source: Chen, Wang, Xu, Xu and Tao, Learning Student Networks via Feature Embedding, IEEE TNNLS 32(1), 2021,
arXiv:1812.06597. With `soft` above 0, the teacher's softened probabilities are learned beside it (eq. 8).
Departs from the paper: sigma^2 is the median of the squared distances to the neighbours, batch by batch, so that the
affinities do not vanish in high dimensions; the layers are the last ones before the logits, the paper's choice could
not be found; features can be divided by their spread, and the teacher's graph replaced by controls (settings).

The loss has no constraint on the scale of the features: constant ones make it 0, and only the labels' loss keeps the
student from that. Its strength depends on the features' scale: beside the last maps of a ResNet-8 a weight of 0.01
left nothing but dead features, 1e-4 did little harm (docs/distillation.md). With few samples a batch "nearest" means
little.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from featherweight.allowed import Count, Positive
from featherweight.catalogue import ingredient, method
from featherweight.core.features import Taps, paired, squared_distances, vectors
from featherweight.core.ledger import note
from featherweight.errors import BadOption

Graph = Literal["teacher", "symmetric", "student", "random", "labels"]


@ingredient("match", where="last", samples=2)
def locality(
    student: Taps,
    teacher: Taps,
    batch: Any,
    progress: float,
    *,
    neighbours: Count = 5,
    sigma2: Positive | None = None,
    graph: Graph = "teacher",
    normalise: Literal["none", "batch_std"] = "none",
) -> Tensor:
    """`L_LP = 1 / (2 m) sum_{i,j} alpha_ij ||f_S^i - f_S^j||^2` over the m samples of a batch (eq. 4 and 6).

    Args:
        neighbours: k, how many nearest samples of the batch have an affinity; fewer in a batch that has no more.
        sigma2: sigma^2 of the affinities; the median of the squared distances to neighbours when left out.
        graph: whose neighbours: the teacher's; symmetric, if either of two is the other's; and as controls the
            student's own, random ones, or samples of the same label.
        normalise: batch_std divides the student's features by their spread in the batch, against collapse.

    Raises:
        BadOption: neighbours by label in batches without labels.
    """
    total = next(iter(student.values())).new_zeros((), dtype=torch.float32)
    for ours, theirs in ((spread(vectors(s), normalise), vectors(t)) for s, t in paired(student, teacher)):
        if len(ours) < 10 * neighbours:
            note(f"batches of {len(ours)} samples have no near neighbours worth the name: {10 * neighbours} or more do")
        seen = ours.detach() if graph == "student" else theirs
        alpha = affinities(squared_distances(seen), chosen(seen, batch, neighbours, graph), sigma2)
        total = total + (alpha * squared_distances(ours)).sum() / (2 * len(ours))
    return total


def spread(f: Tensor, normalise: Literal["none", "batch_std"]) -> Tensor:
    """Features (m, d) as they are, or divided by the root mean square of their distances to their mean."""
    return f if normalise == "none" else f / (f - f.mean(0)).square().sum(1).mean().sqrt().clamp_min(1e-6)


def affinities(squares: Tensor, kept: Tensor, sigma2: float | None = None) -> Tensor:
    """`alpha_ij = exp(-||f_T^i - f_T^j||^2 / sigma^2)` where j is a neighbour of i, else 0 (eq. 5), constants."""
    squares = squares.detach()
    scale = squares[kept].median().clamp_min(1e-12) if sigma2 is None and bool(kept.any()) else sigma2 or 1.0
    return torch.exp(-squares / scale) * kept


def chosen(features: Tensor, batch: Any, neighbours: int, graph: Graph) -> Tensor:
    """Whether j is a neighbour of i, (m, m); nobody is his own."""
    count = len(features)
    apart = ~torch.eye(count, dtype=torch.bool, device=features.device)
    if graph == "labels":
        labels = labels_of(batch, count).to(features.device)
        return (labels[:, None] == labels[None]) & apart
    far = torch.rand(count, count, device=features.device) if graph == "random" else squared_distances(features)
    nearest = far.masked_fill(~apart, torch.inf).topk(min(neighbours, count - 1), largest=False).indices
    kept = torch.zeros_like(apart).scatter(1, nearest, True)
    return kept | kept.T if graph == "symmetric" else kept


def labels_of(batch: Any, count: int) -> Tensor:
    """The labels of a batch (inputs, labels), one a sample.

    Raises:
        BadOption: it has none.
    """
    last = batch.get("labels") if isinstance(batch, dict) else batch[-1] if isinstance(batch, (tuple, list)) else None
    if not isinstance(last, Tensor) or last.shape != (count,) or last.is_floating_point():
        raise BadOption("graph='labels' needs batches (inputs, labels) with one class a sample: choose another graph")
    return last


locality_preserving = method(
    "distill",
    match=locality,
    labels=1.0,
    weight=1.5,
    paper="Chen et al., IEEE Transactions on Neural Networks and Learning Systems 32(1), 2021, arXiv:1812.06597",
    needs={"labels", "train", "teacher"},
    small={"epochs": 1},
)
