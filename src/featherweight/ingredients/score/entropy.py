"""Entropy-based pruning: channels go whose activations vary little from image to image.

Jian-Hao Luo, Jianxin Wu, "An Entropy-based Pruning Method for CNN Compression", 2017, arXiv:1706.05791: the
output of a layer is averaged over positions, an (images, channels) matrix; of every channel the values are put into m
bins between their least and their greatest, and `H_j = -sum_i p_i log p_i`. Layer by layer, forward, the channels of
low entropy go, an epoch or two of training follow, and a long training comes at the end.

Departs from the paper: kept channels are rounded up to whole vectors; channels that a residual sum couples go together
by the sum of their entropies; the epochs between the layers are given in total and shared equally; 100 bins always.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.catalogue import ingredient, method
from featherweight.core.ledger import note
from featherweight.core.site import Site

BINS = 100


@ingredient("score", grain="filter")
def entropy(site: Site) -> Tensor:
    """Entropy in nats of every output's mean activation over the samples, (outputs,)."""
    pooled = site.data.activations(mean_over_positions).get(site.path)
    if pooled is None:
        return site.stays()
    if len(pooled) < BINS:
        note(f"{len(pooled)} samples for {BINS} bins of entropy: raise calibration_batches, there should be many a bin")
    return entropies(pooled)


def mean_over_positions(activation: Tensor) -> Tensor:
    """(n, channels, ...) -> (n, channels)."""
    return activation.flatten(2).mean(2) if activation.dim() > 2 else activation


def entropies(values: Tensor, bins: int = BINS) -> Tensor:
    """Entropy of the histogram of every column of (samples, channels), its bins between its least and greatest value.

    >>> [round(h, 4) for h in entropies(torch.tensor([[0.0, 5.0], [1.0, 5.0]]), bins=2).tolist()]
    [0.6931, 0.0]
    """
    values = values.double()
    low, high = values.amin(0), values.amax(0)
    place = ((values - low) / torch.where(high > low, high - low, 1.0) * bins).long().clamp(max=bins - 1)
    counts = torch.zeros(bins, values.shape[1], dtype=torch.float64).scatter_add_(0, place, torch.ones_like(values))
    return torch.special.entr(counts / len(values)).sum(0)


entropy_gap = method(
    "prune",
    score=entropy,
    grain="filter",
    scope="layer",
    prune_ratio=0.5,
    order="forward",
    schedule="constant",
    rounds=1,
    epochs=12,
    finetune=12,
    lr=1e-3,
    optimizer="sgd",
    paper="Luo and Wu, 2017, arXiv:1706.05791",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"epochs": 2, "finetune": 1, "round_to": 1},
)
