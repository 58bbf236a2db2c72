"""Channels moved by whole places: what a convolution's taps do, without weights."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.errors import BadOption

SETTINGS = ("splits", "kernel_size")


@final
class Shift2d(nn.Module):
    """Moves groups of channels by the places of a kernel, zeros behind them; no parameters, no multiplications.

    Source: Wu et al., CVPR 2018, arXiv:1711.08141, sec. 3.1.

    Args:
        splits: how many channels move to each of the k^2 places, row by row; they follow one another.
        kernel_size: k, odd.

    >>> Shift2d((0, 0, 0, 1, 0, 0, 0, 0, 0), 3)(torch.arange(3.0).view(1, 1, 1, 3)).tolist()
    [[[[0.0, 0.0, 1.0]]]]
    """

    def __init__(self, splits: tuple[int, ...], kernel_size: int) -> None:
        super().__init__()
        if kernel_size % 2 == 0 or len(splits) != kernel_size**2:
            raise BadOption(
                f"{len(splits)} places of a kernel of {kernel_size}: give the square of an odd kernel_size of them"
            )
        self.splits, self.kernel_size = tuple(splits), kernel_size

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        reach = self.kernel_size // 2
        wide, parts, first = F.pad(x, [reach] * 4), [], 0
        for place, count in enumerate(self.splits):
            if count:
                row, column = divmod(place, self.kernel_size)
                part = wide[:, first : first + count]
                parts.append(part[:, :, row : row + height, column : column + width])
            first += count
        return torch.cat(parts, 1)

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return f"splits={self.splits}, kernel_size={self.kernel_size}"
