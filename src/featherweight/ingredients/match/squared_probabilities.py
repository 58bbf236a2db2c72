"""Squared error between the class probabilities of student and teacher."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from featherweight.catalogue import ingredient
from featherweight.core.features import Taps, scores
from featherweight.errors import BadOption


@ingredient("match", where="logits")
def squared_probabilities(student: Taps, teacher: Taps, batch: Any, progress: float) -> Tensor:
    """`1/B sum_i ||p_S(x_i) - p_T(x_i)||^2`.

    Source: Bucila, Caruana and Niculescu-Mizil, Model Compression, KDD 2006.

    Raises:
        BadOption: the outputs are not the scores of at least two classes.
    """
    ours, theirs = scores(student, teacher)
    if ours.shape[1] < 2:
        raise BadOption("the model puts out one number: probabilities need the scores of at least two classes")
    return (ours.softmax(1) - theirs.softmax(1)).square().sum(1).mean()
