"""Ranges of activations from what calibration saw."""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.catalogue import ingredient
from featherweight.core.grids import ActivationGrid, Seen, covering

KEPT = 0.9999
SHRINKS = [1 - 0.02 * i for i in range(40)]


@ingredient("range")
def minmax(seen: Seen, bits: int) -> ActivationGrid:
    """Everything that was seen lies on the grid.

    >>> seen = Seen()
    >>> _ = seen(torch.tensor([0.0, 2.55]))
    >>> minmax(seen, 8).steps().high
    255
    """
    return covering(seen.low, seen.high, bits) if seen.parts else covering(0.0, 0.0, bits)


@ingredient("range")
def percentile(seen: Seen, bits: int) -> ActivationGrid:
    """All but 0.01 % of what was seen, half of it at either end; what lies outside is cut off.

    >>> seen = Seen()
    >>> for outlier in (50.0, *[0.0] * 9):
    ...     _ = seen(torch.cat([torch.linspace(0, 1, 4000), torch.tensor([outlier])]))
    >>> bool(percentile(seen, 8).scale < 0.1)
    True
    """
    values = seen.drawn.double() if seen.parts else torch.zeros(1, dtype=torch.float64)
    low, high = (float(torch.quantile(values, q)) for q in ((1 - KEPT) / 2, (1 + KEPT) / 2))
    return covering(low, high, bits)


@ingredient("range")
def mse(seen: Seen, bits: int) -> ActivationGrid:
    """The range, of 40 fractions of the whole, with the least squared error over a sample of what was seen.

    >>> seen = Seen()
    >>> _ = seen(torch.cat([torch.linspace(0, 1, 4000), torch.tensor([3.0])]))
    >>> bool(mse(seen, 2).scale < 0.9)
    True
    """
    if not seen.parts:
        return covering(0.0, 0.0, bits)
    sample = seen.sample
    grids = [covering(seen.low * f, seen.high * f, bits) for f in SHRINKS]
    return min(grids, key=lambda grid: float(_error(grid, sample)))


def _error(grid: ActivationGrid, sample: Tensor) -> Tensor:
    return (grid(sample) - sample).square().mean()
