"""The range whose rounded histogram diverges least from what was seen, as TensorRT calibrates."""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.catalogue import ingredient
from featherweight.core.grids import ActivationGrid, Seen, covering

BINS = 2048
STRIDE = 16  # bins between two candidates


@ingredient("range")
def entropy(seen: Seen, bits: int) -> ActivationGrid:
    """The threshold on |x| with the least Kullback-Leibler divergence between values and rounded values.

    Source: Migacz, "8-bit inference with TensorRT", GTC 2017: of a histogram of |x| with 2048 bins, `P_t` is its first
    `t` bins, all that lies above counted into the last of them; `Q_t` the same bins without that, merged into as many
    as the grid has levels and spread again evenly over those that are not empty; `t` minimises `KL(P_t | Q_t)`.

    Departs from the source: grids are unsigned here, with twice as many levels where all values have one sign; the
    histogram is one of a sample of what was seen; zeros count as the bin above them (a ReLU makes any number of them,
    and every grid holds them exactly); `t` is tried in steps of 16 bins.

    >>> seen = Seen()
    >>> _ = seen(torch.cat([torch.linspace(-0.999, 0.999, 4000).erfinv(), torch.tensor([20.0])]))
    >>> bool(entropy(seen, 8).scale < 0.06)
    True
    """
    if not seen.parts:
        return covering(0.0, 0.0, bits)
    widest = max(abs(seen.low), abs(seen.high))
    levels = max(2 ** (bits - 1), 2)
    counts = torch.histc(seen.sample.double().abs(), BINS, 0, widest) if widest > 0 else torch.zeros(BINS)
    counts[0] = counts[1]
    kept = divergences(counts, levels) if levels < BINS and counts.any() else {BINS: 0.0}
    threshold = min(kept, key=kept.__getitem__) * widest / BINS
    return covering(max(seen.low, -threshold), min(seen.high, threshold), bits)


def divergences(counts: Tensor, levels: int) -> dict[int, float]:
    """`KL(P_t | Q_t)` by the number of bins `t` that are kept, from as many as there are levels to all."""
    return {t: _divergence(counts, t, levels) for t in range(levels, len(counts) + 1, STRIDE)}


def _divergence(counts: Tensor, kept: int, levels: int) -> float:
    inside = counts[:kept]
    above = counts[kept:].sum()
    p = inside.clone()
    p[-1] += above
    level = torch.arange(kept) * levels // kept
    filled = (p > 0).double()
    share = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, inside)
    spread = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled)
    q = (share / spread.clamp_min(1))[level] * filled
    if not p.sum() or not q.sum():
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    held = p > 0
    return float((p[held] * (p[held] / q[held].clamp_min(1e-12)).log()).sum())
