"""Several teachers trained before, averaged with other random weights at every step.

Source: Chou, thesis, 2019, with Chou, Chiu and Liao, APSIPA Transactions 10, 2021, e18.
Departs from the paper: only its abstract was available, which says "random average"; what is drawn is inferred, and a
mode. The loss's gradient is linear in the target, so that in the mean over draws it is that of the plain average of the
teachers in every mode: only its variance differs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from featherweight.catalogue import ingredient


@ingredient("average", paper="Chou, Chiu and Liao, APSIPA Transactions on Signal and Information Processing, 2021, e18",
            family="distill")  # fmt: skip
def offline_random_ensemble(count: int, *, mode: Literal["subset", "dirichlet", "single"] = "subset") -> Tensor:
    """Random weights of `count` teachers, not negative, with the sum 1, from torch's generator.

    Args:
        mode: equal weights of a random number of teachers, drawn at random; uniform over all weights (Dirichlet); or
            all the weight on one teacher.

    >>> round(float(offline_random_ensemble(3).sum()), 5)
    1.0
    """
    if mode == "dirichlet":
        drawn = torch.empty(count).exponential_()
        return drawn / drawn.sum()
    size = 1 if mode == "single" else int(torch.randint(1, count + 1, ()))
    weights = torch.zeros(count)
    weights[torch.randperm(count)[:size]] = 1 / size
    return weights
