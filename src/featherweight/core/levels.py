"""Forms whose values are fixed numbers: any ascending levels, or a uniform grid with a step and a zero point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, final

import torch
from torch import Tensor

from featherweight.core.forms import Affine, Codes, Form, Table
from featherweight.core.ledger import skip
from featherweight.core.site import Site
from featherweight.errors import BadData, CompressionError

LARGEST = 2**24  # integers up to here are exact in float32


@final
class Levels(Form):
    """`weight = levels[i]` where `i` edges lie at or below the weight; the gradient passes straight through.

    Args:
        levels: shape (k,), ascending, of the weight's type.
        edges: shape (k - 1,), ascending, float64; those of `nearest_edges` when left out.
    """

    stands = ("weight",)
    levels: Tensor
    edges: Tensor

    def __init__(self, levels: Tensor, edges: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("levels", levels.detach().clone())
        self.register_buffer("edges", (nearest_edges(levels) if edges is None else edges).detach().double().clone())

    def unsound(self) -> str:
        known = self._buffers.keys() == {"levels", "edges"} and self.levels.is_floating_point()
        known = known and self.edges.dtype == torch.float64 and self.levels.dim() == self.edges.dim() == 1
        whole = known and len(self.levels) == len(self.edges) + 1 and bool(self.levels.isfinite().all())
        ascending = whole and bool((self.levels.diff() >= 0).all()) and bool((self.edges.diff() >= 0).all())
        return "" if ascending else "without ascending levels and the edges between them"

    def symbols(self, weight: Tensor) -> Tensor:
        """Which level, of the weight's shape."""
        return torch.bucketize(weight.detach().double(), self.edges, right=True)

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (weight,) = free
        return straight_through(weight, self.levels[self.symbols(weight)])

    def codes(self, *free: Tensor, keep: Tensor | None = None) -> Codes | None:
        (weight,) = free
        kind = torch.uint8 if len(self.levels) <= 256 else torch.int32
        return Codes(self.symbols(weight).to(kind).cpu(), Table(self.levels.cpu()), tuple(weight.shape))


def nearest_edges(levels: Tensor) -> Tensor:
    """The edges between ascending levels with which each value goes to the nearest; half-way, away from zero.

    >>> Levels(torch.tensor([-2.0, 0.0, 2.0]))(torch.tensor([-1.0, -0.9, 0.9, 1.0])).tolist()
    [-2.0, 0.0, 0.0, 2.0]
    """
    middle = (levels.double()[1:] + levels.double()[:-1]) / 2
    return torch.where(middle < 0, torch.nextafter(middle, torch.full_like(middle, torch.inf)), middle)


@final
class FixedGrid(Form):
    """`weight = (clamp(round(w / scale + zero_point), low, high) - zero_point) * scale`; gradients pass straight on.

    Args:
        scale: one step in all, or shape (n,) along `axis`.
        zero_point: of the same shape or a single one; integers, or floats where zero need not be on the grid.
        low: the smallest symbol.
        high: the largest symbol.
        axis: the dimension of the weight that the steps belong to.
        block: in place of an axis, how many consecutive weights (row-major) have a step of their own.
        ties: where a weight half-way between two steps goes: to the "even" one, or "away" from zero, in which case
            `round(w / scale) + zero_point` is meant.
    """

    stands = ("weight",)
    settings = ("low", "high", "axis", "block", "ties")
    scale: Tensor
    zero_point: Tensor
    stochastic = False  # a method may round at random, right on average, while it trains; no file knows of it

    def __init__(
        self,
        scale: Tensor,
        low: int,
        high: int,
        *,
        zero_point: Tensor | None = None,
        axis: int | None = None,
        block: int | None = None,
        ties: Literal["even", "away"] = "even",
    ) -> None:
        super().__init__()
        self.low, self.high, self.axis, self.block, self.ties = low, high, axis, block, ties
        zero_point = torch.zeros((), dtype=torch.int32) if zero_point is None else zero_point
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", zero_point.detach().clone().to(scale.device))

    def unsound(self) -> str:
        if self._buffers.keys() != {"scale", "zero_point"} or not self.scale.is_floating_point():
            return "without a scale and a zero point"
        if not (
            bool((self.scale > 0).all()) and bool(self.scale.isfinite().all() and self.zero_point.isfinite().all())
        ):
            return "whose scale is not positive, or whose zero point is not finite"
        limits = all(_whole(value, -LARGEST, LARGEST) for value in (self.low, self.high)) and self.low <= self.high
        axis = self.axis is None or _whole(self.axis, 0, 31)
        block = self.block is None or (_whole(self.block, 1, LARGEST) and self.axis is None)
        block = block and self.ties in ("even", "away")
        return "" if limits and axis and block else "whose limits, axis or block are impossible"

    @property
    def rule(self) -> Affine:
        """How symbols become weights."""
        return Affine(self.scale, self.zero_point, self.axis if self.scale.dim() else None, self.block)

    def symbols(self, weight: Tensor) -> Tensor:
        """The integers, as float64, of the weight's shape; half-way the even one, or the one away from zero."""
        rule, shape = self.rule, tuple(weight.shape)
        step, zero = rule.spread(self.scale.double(), shape), rule.spread(self.zero_point.double(), shape)
        steps = weight.detach().double() / step
        if self.stochastic and self.training:
            whole = (steps + zero + torch.rand_like(steps)).floor()
        elif self.ties == "even":
            whole = (steps + zero).round()
        else:
            whole = steps.sign() * (steps.abs() + 0.5).floor() + zero
        return whole.clamp(self.low, self.high)

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (weight,) = free
        return straight_through(weight, self.rule.decode(self.symbols(weight), tuple(weight.shape)))

    def codes(self, *free: Tensor, keep: Tensor | None = None) -> Codes | None:
        (weight,) = free
        kind = next(kind for kind, low, high in KINDS if low <= self.low and self.high <= high)
        rule = replace(self.rule, scale=self.scale.cpu(), zero_point=self.zero_point.cpu())
        return Codes(self.symbols(weight).to(kind).cpu(), rule, tuple(weight.shape))


def _whole(value: object, low: int, high: int) -> bool:
    """Whether a value, of whatever type a file gave it, is an integer in a range."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


KINDS = ((torch.uint8, 0, 255), (torch.int8, -128, 127), (torch.int32, -(2**31), 2**31 - 1))


def straight_through(weight: Tensor, snapped: Tensor) -> Tensor:
    """The value of `snapped`, bit for bit, with the gradient of `weight`."""
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return snapped
    return snapped + (weight - weight.detach())  # what is added is exactly zero


def survivors(site: Site) -> Tensor:
    """The weights that no mask hides, shape (n,), float64, on the CPU.

    Raises:
        BadData: one is not finite.
    """
    weight = site.weight.cpu().double()[site.keep]
    if not weight.isfinite().all():
        raise BadData(f"the weights of {site.path} are not finite: train the network again, or choose layers by where=")
    return weight


def not_zero(found: Mapping[str, Site]) -> dict[str, Site]:
    """The sites with any weight that is not zero; of the others it is said that they stay.

    Raises:
        BadData: a weight is not finite.
        CompressionError: every chosen layer is zero.
    """
    alive = {path: site for path, site in found.items() if bool(survivors(site).any())}
    for path in found.keys() - alive.keys():
        skip(path, "all its weights are zero")
    if not alive:
        raise CompressionError("no layer has a weight that is not zero: there is nothing to quantize")
    return alive
