"""Matching a middle layer of the teacher through a regressor that is thrown away afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.errors import BadOption


@final
class Hint(nn.Module):
    """`1/2 mean (f_T - r(f_S))^2` of a teacher's and a student's layer; the regressor r trains along (eq. 3).

    r is a valid convolution of the size that turns the student's map into the teacher's, (h_S - h_T + 1)^2, followed by
    ReLU where the hint has no negative value.
    Source: Romero et al., ICLR 2015, arXiv:1412.6550, sec. 2.2 and eq. 3.

    Departs from the paper: the mean over all units in place of the sum, so that the scale does not depend on the layer;
    the paper's regressor has the teacher's nonlinearity, here it is ReLU if one batch of the hint has no negative value
    and none otherwise, so that hints behind sigmoid, tanh or softmax are met by ReLU or linearly; where the student's
    map is the smaller one, the teacher's is average-pooled to it and r is 1x1; for features (batch, ..., d) that are no
    maps r is a linear layer, where the paper has convolutions only.

    Args:
        guided, hint: names of the student's and the teacher's layer among the taps.
        ours, theirs: one batch of what the two put out.
    """

    def __init__(self, guided: str, hint: str, ours: Tensor, theirs: Tensor) -> None:
        super().__init__()
        self.guided, self.hint = guided, hint
        self.rectified = bool((theirs >= 0).all())
        self.regressor = regressor(ours, theirs).to(device=ours.device, dtype=ours.dtype)

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Any, progress: float
    ) -> Tensor:
        guess = self.regressor(student[self.guided])
        target = teacher[self.hint]
        if target.dim() == 4 and target.shape[2:] != guess.shape[2:]:
            target = F.adaptive_avg_pool2d(target, guess.shape[2:])
        return 0.5 * F.mse_loss(torch.relu(guess) if self.rectified else guess, target)


def regressor(ours: Tensor, theirs: Tensor) -> nn.Module:
    """The layer that turns features like `ours` into features like `theirs`.

    Raises:
        BadOption: one is a map and the other is not, or their numbers of tokens differ.

    >>> regressor(torch.zeros(2, 8, 6, 6), torch.zeros(2, 16, 4, 4))
    Conv2d(8, 16, kernel_size=(3, 3), stride=(1, 1))
    """
    if ours.dim() == theirs.dim() == 4:
        height, width = (max(a - b, 0) + 1 for a, b in zip(ours.shape[2:], theirs.shape[2:], strict=True))
        return nn.Conv2d(ours.shape[1], theirs.shape[1], (height, width))
    if ours.dim() == theirs.dim() != 4 and ours.shape[1:-1] == theirs.shape[1:-1]:
        return nn.Linear(ours.shape[-1], theirs.shape[-1])
    raise BadOption(
        f"a hint of shape {tuple(theirs.shape[1:])} cannot guide a layer of shape {tuple(ours.shape[1:])}: "
        "pass hint= and guided= that are both maps, or both vectors"
    )
