"""Discriminators, which learn to tell a teacher's outputs from a student's while the student learns to mislead them."""

from __future__ import annotations

from itertools import pairwise
from typing import final

import torch.nn.functional as F
from torch import Tensor, nn


@final
class Discriminator(nn.Module):
    """A small network of vectors (n, width): the logit of "from the teacher" first, then those of `classes` classes."""

    def __init__(self, width: int, classes: int = 0, hidden: tuple[int, ...] = (128, 256, 128)) -> None:
        super().__init__()
        sizes, layers = (width, *hidden), []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], 1 + classes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logit of the origin (n,) and of the classes (n, classes)."""
        out = self.layers(x)
        return out[:, 0], out[:, 1:]


def from_teacher(logit: Tensor, yes: float) -> Tensor:
    """The cross-entropy, in the mean, of a logit of "from the teacher" against the probability `yes` of it."""
    return F.binary_cross_entropy_with_logits(logit, logit.new_full(logit.shape, yes))
