"""ShiftCNN: weights as sums of few powers of two, without retraining, and the convolution made of shifts alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from featherweight.catalogue import recipe
from featherweight.core.forms import attach
from featherweight.core.ledger import note
from featherweight.core.levels import not_zero
from featherweight.core.site import PerLayer, per_layer
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task
from featherweight.errors import BadData
from featherweight.ingredients.grid.shift_sums import greedy, shift_sums

ShiftBits = Annotated[int, Interval(ge=2, le=5)]
Terms = Annotated[int, Interval(ge=1, le=3)]


@recipe(
    paper="Gudovskiy and Rigazio, 2017, arXiv:1706.02393",
    family="quantize",
    shrinks={"bits"},
    small={"weight_bits": 3},
)
def shiftcnn(
    model: nn.Module,
    task: Task,
    *,
    weight_bits: PerLayer[ShiftBits] = 4,
    terms: Terms = 2,
    where: WhereWeighted = None,
) -> nn.Module:
    """Rounds every weight to a sum of `terms` powers of two times the layer's largest; no data and no training.

    Denis A. Gudovskiy, Luca Rigazio, "ShiftCNN: Generalized Low-Precision Architecture for Inference of Convolutional
    Neural Networks", 2017. With `B = weight_bits`, weights over `max|W|` are sums of one entry of each codebook
    `C_n = {0, +-2^(1-n), ..., +-2^(2-n-floor(M/2))}`, `M = 2^B - 1` entries, n = 1 to `terms`; greedily, the nearest
    entry to what the earlier terms leave. An index has `terms * B` bits. The largest error on [-1, 1] with four bits is
    0.25, 0.0625 and 0.0156 for one, two and three terms.

    Storage only: the convolution that shifts all inputs once and then only adds (`shift_plan`, `shift_add`) is here in
    exact integers, to be counted and tested; no runtime has it, and networks run by multiplication.

    Departs from the paper: activations stay float; batch norms are not folded first. Scales are those of the weights
    that a mask leaves.

    Args:
        weight_bits: bits of one term's index; or layer patterns with bits each.
        terms: how many powers of two are added.
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: an option outside its range.
        BadData: weights are not finite.
        CompressionError: every chosen layer is zero.
    """
    found, bits = per_layer(model, "weight_bits", weight_bits, where)
    for path, site in not_zero(found).items():
        before = site.weight
        attach(site.module, shift_sums(site, bits[path], terms), at=site.name, root=model)
        worst = float(((site.weight - before) * site.keep.to(before.device)).abs().max() / before.abs().max())
        note(f"{path}: {terms} terms of {bits[path]} bits, largest error {worst:.4f} of the largest weight")
    return model


@dataclass(frozen=True)
class ShiftPlan:
    """Weights over their largest as powers of two: `signs[e]` (the weight's shape) says how often `2^-e` is added."""

    signs: Mapping[int, Tensor]
    scale: float

    @property
    def deepest(self) -> int:
        """The largest shift."""
        return max(self.signs)

    @property
    def additions(self) -> int:
        """Terms that are not zero: additions and subtractions per position of the output."""
        return sum(int(held.abs().sum()) for held in self.signs.values())


def shift_plan(weight: Tensor, bits: int, terms: int) -> ShiftPlan:
    """The shifts and signs behind a weight of any shape, on the levels of `shift_sums` or not."""
    scale = float(weight.abs().max())
    signs: dict[int, Tensor] = {}
    for term in greedy(weight / (scale or 1.0), bits, terms):
        for size in term.abs().unique()[1:] if bool((term == 0).any()) else term.abs().unique():
            exponent = -int(torch.log2(size))
            held = torch.where(term.abs() == size, term.sign(), 0.0)
            signs[exponent] = signs.get(exponent, torch.zeros_like(held)) + held
    return ShiftPlan(signs or {0: torch.zeros_like(weight, dtype=torch.float64)}, scale)


def shift_add(layer: nn.Conv2d | nn.Linear, x: Tensor, plan: ShiftPlan) -> Tensor:
    """The layer's products with integers `x`, without bias, as int64: `2^deepest / scale` times the true output.

    Every input is shifted once for each exponent; all else is addition and subtraction.

    Raises:
        BadData: the input is no integers.
    """
    if x.is_floating_point():
        raise BadData(f"shift_add takes integers, given {x.dtype}: put the activations on an integer grid first")
    total = torch.zeros((), dtype=torch.float64)
    for exponent, signs in plan.signs.items():
        shifted = (x.long() << (plan.deepest - exponent)).double()  # float64 adds integers below 2^53 exactly
        total = total + products(layer, shifted, signs.double())
    return total.long()


def products(layer: nn.Conv2d | nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
    """What the layer makes of `x` with another weight and no bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    assert not isinstance(layer.padding, str)
    return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
