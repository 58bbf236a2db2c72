"""Gradual pruning along a cubic curve, as AGP (Zhu and Gupta, 2017).

Michael Zhu, Suyog Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017,
arXiv:1710.01878, eq. 1. A pruning run is told by its initial and final sparsity, its first step `t_0`, the steps `dt`
from one pruning to the next, and how many prunings `n` there are.
"""

from __future__ import annotations

from featherweight.catalogue import ingredient


@ingredient("schedule")
def cubic(progress: float) -> float:
    """Most of the way early, while there is much to remove: `1 - (1 - progress)^3`.

    >>> [cubic(p) for p in (0.0, 0.5, 1.0)]
    [0.0, 0.875, 1.0]
    """
    return 1 - (1 - progress) ** 3


@ingredient("schedule", family="prune", paper="Zhu and Gupta, 2017, arXiv:1710.01878")
def agp(progress: float) -> float:
    """Automated gradual pruning: `s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3`, as the part of the way gone.

    Pass `schedule="agp"`, `start` for `s_i`, `sparsity` (or `prune_ratio`) for `s_f`, `rounds` for `n`, and `epochs`,
    which is `n dt`. `sparsity_at` is the equation in steps.

    Departs from the paper: the first of the n prunings is done at once, at `t_0 + dt` on the paper's clock; training
    before `t_0` is the network's own, training after the last pruning is `finetune`.

    >>> [agp(p) for p in (0.0, 0.5, 1.0)]
    [0.0, 0.875, 1.0]
    """
    return cubic(progress)


def sparsity_at(
    step: int, *, initial: float = 0.0, final: float, begin: int = 0, interval: int = 100, count: int
) -> float:
    """The sparsity after a training step (eq. 1), constant between prunings, before the first and after the last.

    Args:
        initial: sparsity before the first pruning, s_i.
        final: sparsity after the last one, s_f.
        begin: the step of the first pruning, t_0.
        interval: steps from one pruning to the next, dt.
        count: how many prunings follow the first, n.

    >>> [sparsity_at(step, final=0.5, begin=10, interval=5, count=2) for step in (0, 14, 15, 19, 20, 99)]
    [0.0, 0.0, 0.4375, 0.4375, 0.5, 0.5]
    """
    turn = min(max((step - begin) // interval, 0), count)
    return initial + (final - initial) * agp(turn / count)
