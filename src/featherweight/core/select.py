"""Which entries have the lowest scores: exact counts, ties broken by index."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor

from featherweight.core.check import fraction, one_of
from featherweight.errors import BadData

K = TypeVar("K", bound=Hashable)


def lowest(scores: Mapping[K, Tensor], ratio: float, scope: Literal["global", "layer"] = "global") -> dict[K, Tensor]:
    """Marks the `floor(ratio * n)` lowest scores: one boolean tensor per key, of the shape of its scores.

    A threshold miscounts under ties (all equal scores: everything or nothing); a stable sort does not.

    Args:
        scores: one tensor of any shape per key; infinite scores are allowed and come last.
        ratio: fraction marked, of all entries (`global`) or of each tensor's own (`layer`).

    Raises:
        BadData: a score is NaN.
        BadOption: ratio outside [0, 1).

    >>> marked = lowest({"a": torch.tensor([3.0, 1.0, 1.0]), "b": torch.tensor([1.0])}, 0.5)
    >>> marked["a"].tolist(), marked["b"].tolist()
    ([False, True, True], [False])
    """
    fraction("ratio", ratio)
    one_of("scope", scope, ("global", "layer"))
    for key, score in scores.items():
        if torch.isnan(score).any():
            raise BadData(hold_nan(key))
    if scope == "layer":
        return {key: _lowest(score.flatten(), ratio).view_as(score) for key, score in scores.items()}
    if not scores:
        return {}
    flat = torch.cat([score.detach().flatten().double().cpu() for score in scores.values()])
    parts = _lowest(flat, ratio).split([score.numel() for score in scores.values()])
    return {key: part.view_as(score) for (key, score), part in zip(scores.items(), parts, strict=True)}


def hold_nan(key: Hashable) -> str:
    """What is said of scores that cannot be ranked."""
    return f"the scores of {key} hold NaN: check the weights and the loss of the batches behind them"


def _lowest(flat: Tensor, ratio: float) -> Tensor:
    count = int(ratio * flat.numel() + 1e-9)
    marked = torch.zeros(flat.numel(), dtype=torch.bool)
    marked[torch.argsort(flat.detach().cpu(), stable=True)[:count]] = True
    return marked
