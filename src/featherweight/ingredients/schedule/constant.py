"""The whole sparsity from the first round on."""

from __future__ import annotations

from featherweight.catalogue import ingredient


@ingredient("schedule")
def constant(progress: float) -> float:
    """The last sparsity at once: pruned in the first round, all training after it is retraining.

    >>> constant(0.25)
    1.0
    """
    return 1.0
