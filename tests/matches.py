"""What the tests of distillation share: features to compare, and the loss of a formula on them."""

from __future__ import annotations

import torch
from torch import Tensor


def taps(*features: Tensor, logits: Tensor | None = None) -> dict[str, Tensor]:
    """Features as a network's taps, in order."""
    found = {str(index): f for index, f in enumerate(features)}
    return found if logits is None else {"": logits, **found}


def loss(match, ours: Tensor | list[Tensor], theirs: Tensor | list[Tensor], **options) -> Tensor:
    """The value of a formula on features of student and teacher, as tensors or lists of them."""
    ours, theirs = ([f] if isinstance(f, Tensor) else f for f in (ours, theirs))
    return match(taps(*ours), taps(*theirs), None, 0.0, **options)


def on_logits(match, ours: Tensor, theirs: Tensor, **options) -> Tensor:
    return match({"": ours}, {"": theirs}, None, 0.0, **options)


def rotation(d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(d, d, dtype=dtype))[0]


def watched(steps: list):
    """A `fit` that trains nothing and keeps what each call would minimise, and what it would train."""

    def fit_nothing(model, task, **options):
        steps.append((options.get("step"), list(options.get("params") or model.parameters())))
        return model

    return fit_nothing
