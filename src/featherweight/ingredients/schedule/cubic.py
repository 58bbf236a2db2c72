"""Gradual pruning along a cubic curve (Zhu and Gupta, 2017)."""

from __future__ import annotations

from featherweight.catalogue import ingredient


@ingredient("schedule")
def cubic(progress: float) -> float:
    """Most of the way early, while there is much to remove: `1 - (1 - progress)^3`, so that
    `s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3` (AGP).

    Michael Zhu, Suyog Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression",
    2017, arXiv:1710.01878, eq. 1.

    >>> [cubic(p) for p in (0.0, 0.5, 1.0)]
    [0.0, 0.875, 1.0]
    """
    return 1 - (1 - progress) ** 3
