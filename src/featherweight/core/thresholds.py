"""A batch norm (and whatever rises with it) followed by a sign, as the comparison of an integer with an integer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Thresholds:
    """For each channel: the sign is 1 where `direction * sum >= threshold`, else -1. Both int64, shape (channels,)."""

    direction: Tensor
    threshold: Tensor

    def signs(self, sums: Tensor) -> Tensor:
        """The signs of integer sums, channels last."""
        return torch.where(sums * self.direction >= self.threshold, 1, -1)


def integer_thresholds(value: Callable[[Tensor], Tensor], channels: int, low: int, high: int) -> Thresholds:
    """The thresholds of `value(sum) >= 0` for integer sums from `low` to `high`, exact as the value is computed.

    A batch norm of scale g, shift b, mean m and deviation s gives `sum >= ceil(m - b s / g)` for g > 0, the comparison
    the other way round for g < 0, and a constant for g = 0. Rounding makes floats differ from the formula next to the
    threshold, so it is searched: sums are given to `value` itself, which must rise or fall, in each channel.

    Args:
        value: sums (n, channels) as floats -> values of the same shape, such as a batch norm in evaluation mode.

    >>> found = integer_thresholds(lambda sums: torch.stack([sums[:, 0] - 2.5, 1.0 - sums[:, 1]], 1), 2, -9, 9)
    >>> found.direction.tolist(), found.threshold.tolist()
    ([1, -1], [3, -1])
    """

    def at(sums: Tensor) -> Tensor:
        with torch.no_grad():
            return value(sums.to(torch.get_default_dtype()).unsqueeze(0))[0]

    ends = torch.full((channels,), low), torch.full((channels,), high)
    direction = torch.where(at(ends[1]) >= at(ends[0]), 1, -1)
    # the smallest `direction * sum` whose value is not negative, by bisection in every channel at once
    below = torch.where(direction > 0, ends[0], -ends[1]) - 1
    above = below + (high - low) + 2
    while bool((wide := above - below > 1).any()):
        middle = torch.div(above + below, 2, rounding_mode="floor")
        positive = at(middle * direction) >= 0
        above, below = torch.where(wide & positive, middle, above), torch.where(wide & ~positive, middle, below)
    return Thresholds(direction, above)
