"""Whether two networks gave the same: every output, its kind, shape and type, its numbers within a tolerance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.core.task import as_call, device_of, eval_mode, to_device
from featherweight.core.trace import uncached

TOLERANCE = 1e-4  # of the largest output, for numbers that are not whole


def answer(model: nn.Module, example_inputs: Any) -> list[Any]:
    """What a model gives in evaluation mode, on the processor and in order; the inputs stay as they are."""
    args, kwargs = to_device(as_call(example_inputs), device_of(model))
    args, kwargs = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, (args, kwargs))
    with eval_mode(model), uncached(model):
        return [to_device(leaf, torch.device("cpu")) for leaf in pytree.tree_leaves(model(*args, **kwargs))]


def compared(expected: list[Any], found: list[Any]) -> tuple[float, str]:
    """The largest difference between numbers that are not whole, and what makes the answers differ, or nothing.

    >>> compared([torch.ones(2), 3], [torch.ones(2), 3])
    (0.0, '')
    >>> compared([torch.ones(2)], [torch.tensor([1.0, float("nan")])])[1]
    'output 0 differs by nan of its largest value'
    """
    if len(expected) != len(found):
        return 0.0, f"{len(found)} outputs where there are {len(expected)}"
    largest, wrong = 0.0, ""
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        gap, why = _compared(a, b)
        largest, wrong = max(largest, gap), wrong or (f"output {number} {why}" if why else "")
    return largest, wrong


def _compared(a: Any, b: Any) -> tuple[float, str]:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        same = type(a) is type(b) and repr(a) == repr(b)
        return 0.0, "" if same else f"is a {type(b).__name__} where there is another {type(a).__name__}"
    if a.shape != b.shape or a.dtype != b.dtype:
        return 0.0, f"is {b.dtype} of shape {tuple(b.shape)} where there is {a.dtype} of shape {tuple(a.shape)}"
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0, "" if torch.equal(a, b) else "differs in whole numbers"
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    other = ~((a == b) | (a.isnan() & b.isnan()))
    if not other.any():
        return 0.0, ""
    gap = float((a - b)[other].abs().max())
    scale = max(float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 0.0, 1e-6)
    wrong = "" if gap / scale <= TOLERANCE else f"differs by {gap / scale:.1e} of its largest value"
    return (float("inf") if math.isnan(gap) else gap), wrong
