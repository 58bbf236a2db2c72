"""Several teachers as one network: the mean of their class probabilities, fixed or drawn anew at every call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor, nn

from featherweight.core.features import exact
from featherweight.core.task import prediction
from featherweight.errors import BadOption

Average = Callable[[int], Tensor]
"""`count -> (count,)` weights of that many teachers, not negative, with the sum 1."""


@final
class Ensemble(nn.Module):
    """The logarithm of the weighted mean of the members' probabilities, `t log sum_m w_m softmax(z_m / t)`.

    Softened by the temperature t, it is the mean of the members' softened probabilities; at t = 1 its softmax is the
    mean of their probabilities. Outputs that are no class scores (regression) are averaged as they are.

    Args:
        members: at least two networks that score the same classes.
        average: the weights, asked for at every call; equal ones when left out.
        temperature: t.

    Raises:
        BadOption: there are fewer than two members.
    """

    def __init__(self, members: Iterable[nn.Module], average: Average | None = None, temperature: float = 1.0) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.average, self.temperature = average, temperature
        if len(self.members) < 2:
            raise BadOption(f"an ensemble of {len(self.members)} is none: pass two members, or the network itself")

    def weights(self) -> Tensor:
        count = len(self.members)
        return self.average(count) if self.average is not None else torch.full((count,), 1 / count)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        outputs = [exact(prediction(member(*args, **kwargs))) for member in self.members]
        if any(out.shape != outputs[0].shape for out in outputs):
            told = ", ".join(str(tuple(out.shape)) for out in outputs)
            raise BadOption(f"the members of the ensemble put out {told}: all must score the same classes")
        stacked = torch.stack(outputs)
        weights = self.weights().to(stacked).view(-1, *[1] * outputs[0].dim())
        if outputs[0].dim() < 2 or outputs[0].shape[1] < 2:
            return (weights * stacked).sum(0)
        softened = (stacked / self.temperature).log_softmax(2)
        return self.temperature * (softened + weights.log()).logsumexp(0)


def members_of(teacher: nn.Module) -> list[nn.Module]:
    """The members of an ensemble; any other network is its only member."""
    return list(teacher.members) if isinstance(teacher, Ensemble) else [teacher]
