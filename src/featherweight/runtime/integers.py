"""Small integers behind weights and activations: a value is `(2 q - z) * h`, q from 0 to 2^bits - 1, z an integer.

Signs are q of 0 and 1 with z = 1: their grid has no zero, which is why everything is counted in half steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from featherweight.core.binary import SignInput, SizedSignInput
from featherweight.core.forms import Affine, Codes, Form
from featherweight.core.grids import ActivationGrid

MOST_BITS = 8


@dataclass(frozen=True)
class Levels:
    """How activations become integers: 1 from a shift on, or `clamp(round(x * inverse) + zero, low, high) - low`.

    The shifts, one for each channel, are with the layer.
    """

    bits: int
    z: int
    half: float
    sign: bool
    inverse: float = 0.0
    zero: int = 0
    low: int = 0
    high: int = 1

    @property
    def binary(self) -> bool:
        """Whether the values are plus and minus one number."""
        return self.bits == 1 and self.z == 1


@dataclass(frozen=True)
class Digits:
    """The integers of a weight: q (out, ...), and z and the half step h of each output, shape (out,)."""

    q: Tensor
    z: Tensor
    half: Tensor
    bits: int

    @property
    def binary(self) -> bool:
        """Whether the values are plus and minus one number for each output."""
        return self.bits == 1 and bool((self.z == 1).all())


@singledispatch
def levels(form: Form | None) -> Levels | str:
    """The levels of activations under a form, or why there are none."""
    if form is None:
        return "its input carries no grid"
    return f"a {type(form).__name__} on its input is no grid of a few bits"


@levels.register(SignInput)
@levels.register(SizedSignInput)
def _(form: SignInput | SizedSignInput) -> Levels | str:
    return Levels(1, 1, 1.0, sign=True)


@levels.register
def _(form: ActivationGrid) -> Levels | str:
    steps = form.steps()
    bits = (steps.high - steps.low).bit_length()
    if bits > MOST_BITS:
        return f"its input has {bits} bits, and bit planes serve at most {MOST_BITS}"
    inverse = float(1 / form.scale)  # in float32, as the form divides
    z = 2 * (steps.zero_point - steps.low)
    return Levels(bits, z, steps.scale / 2, False, inverse, steps.zero_point, steps.low, steps.high)


def digits(codes: Codes | None) -> Digits | str:
    """The small integers behind a weight, or why there are none.

    Plus and minus one number for each output, with or without zeros, is recognized whatever the rule of the codes.
    """
    if codes is None:
        return "its weight has no codes: quantize it first"
    found = _signs(codes.decode())
    if found is not None:
        return found
    rule = codes.rule
    if not isinstance(rule, Affine):
        return f"its weight is a {type(rule).__name__} of values that are not evenly spaced"
    if rule.block is not None or rule.axis not in (None, 0):
        return "its scales are not one for each output"
    return _affine(codes, rule)


def _affine(codes: Codes, rule: Affine) -> Digits | str:
    symbols = codes.symbols.view(codes.shape).long()
    low = int(symbols.min()) if symbols.numel() else 0
    bits = max(1, (int(symbols.max()) - low).bit_length()) if symbols.numel() else 1
    z = 2 * (rule.zero_point.double() - low)
    if bits > MOST_BITS:
        return f"its weight has {bits} bits, and bit planes serve at most {MOST_BITS}"
    if bool((z != z.round()).any()):
        return "the zero point of its weight is no multiple of one half"
    rows = (codes.shape[0],)
    return Digits(symbols - low, z.long().expand(rows), (rule.scale / 2).expand(rows), bits)


def _signs(weight: Tensor) -> Digits | None:
    """A weight of one size for each output, and perhaps zeros; an output of nothing but zeros has the size zero."""
    flat = weight.flatten(1)
    size = flat.abs().amax(1) if flat.shape[1] else flat.new_zeros(len(flat))
    signs = flat.sign()
    if not torch.equal(signs * size[:, None], flat):
        return None
    if bool(((signs != 0) | (size == 0)[:, None]).all()):
        return Digits((signs > 0).long().view(weight.shape), torch.ones(len(flat), dtype=torch.long), size, 1)
    z = torch.full((len(flat),), 2, dtype=torch.long)
    return Digits((signs + 1).long().view(weight.shape), z, size / 2, 2)
