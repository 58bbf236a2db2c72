"""The generators of Python, NumPy and PyTorch, all three together: put aside, and put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

Draws = tuple[Any, Any, torch.Tensor]


def drawn() -> Draws:
    """Where the three generators stand."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def redraw(at: Draws) -> None:
    """Puts the three generators where they stood."""
    random.setstate(at[0])
    np.random.set_state(at[1])
    torch.set_rng_state(at[2])


@contextmanager
def undrawn() -> Iterator[None]:
    """A block whose draws leave no trace: what follows draws as if it had not been there."""
    at = drawn()
    try:
        yield
    finally:
        redraw(at)
