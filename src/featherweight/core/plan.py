"""In which order a student learns features, outputs and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage of training: which of the teacher's features, its outputs and the labels it learns from.

    A stage of features alone trains the layers up to them.
    """

    features: bool
    outputs: bool
    labels: bool


Plan = Callable[[], Sequence[Stage]]
