"""Matching softened class probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from featherweight.catalogue import ingredient
from featherweight.errors import BadOption


@ingredient("match")
def softened(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    batch: Any,
    progress: float,
    *,
    temperature: float = 4.0,
) -> Tensor:
    """`t^2 KL(p_T || p_S)` of probabilities softened by a temperature t, a scalar: the mean over the batch.

    Logits are (batch, classes, ...); further dimensions (pixels, tokens) count as samples. The factor t^2 keeps the
    size of the gradient when t changes. Source: Hinton, Vinyals and Dean, 2015, arXiv:1503.02531, sec. 2.

    Raises:
        BadOption: the outputs are not the scores of at least two classes.

    >>> a, b = {"": torch.tensor([[1.0, 2.0]])}, {"": torch.tensor([[5.0, 6.0]])}
    >>> softened(a, b, None, 0.0).abs() < 1e-6
    tensor(True)
    """
    ours, theirs = class_scores(student[""]), class_scores(teacher[""]).detach()
    if ours.shape != theirs.shape:
        raise BadOption(
            f"the student's outputs {tuple(student[''].shape)} do not fit the teacher's {tuple(teacher[''].shape)}: "
            "both must score the same classes"
        )
    loss = F.kl_div(
        (ours / temperature).log_softmax(1),
        (theirs / temperature).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    return temperature**2 * loss


def class_scores(logits: Tensor) -> Tensor:
    """Logits (batch, classes, ...) as (samples, classes).

    Raises:
        BadOption: there are no two classes.
    """
    if logits.dim() < 2 or logits.shape[1] < 2:
        raise BadOption(
            f"the model's outputs have shape {tuple(logits.shape)}: softened probabilities need the scores of at least "
            "two classes, shape (batch, classes, ...)"
        )
    return logits.movedim(1, -1).flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
