"""Uniform grids as forms, for weights (symmetric) and activations (a fixed range); where they stand; what they saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from featherweight.core.forms import Affine, Codes, Form, along
from featherweight.errors import BadOption

SAMPLE = 4096  # values that `Seen` keeps of one call


def _whole(value: object, low: int, high: int) -> bool:
    """Whether a value, of whatever type a file gave it, is an integer in a range."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def rows(tensor: Tensor, axis: int | None) -> Tensor:
    """A weight as one row in all, shape (1, n), or one row for each index of `axis`."""
    return tensor.reshape(1, -1) if axis is None else tensor.movedim(axis, 0).flatten(1)


def from_rows(held: Tensor, shape: torch.Size, axis: int | None) -> Tensor:
    """The tensor of which `rows` were made.

    >>> weight = torch.arange(24).view(2, 3, 4)
    >>> torch.equal(from_rows(rows(weight, 1), weight.shape, 1), weight)
    True
    """
    if axis is None:
        return held.view(shape)
    moved = [shape[axis], *(size for d, size in enumerate(shape) if d != axis)]
    return held.view(moved).movedim(0, axis)


def mean_sizes(weight: Tensor, axis: int | None, keep: Tensor | None = None) -> Tensor:
    """`E|w|` over the weights that count, in all or one per index of `axis`; zero where none does."""
    size = weight.abs() if keep is None else torch.where(keep, weight.abs(), torch.zeros_like(weight))
    held = rows(size, axis)
    mean = held.mean(1) if keep is None else held.sum(1) / rows(keep, axis).sum(1).clamp(1)
    return mean[0] if axis is None else mean


def only_bits(given: int, wanted: int, grid: str) -> None:
    """Refuses a number of bits that a grid of a fixed number of levels does not have.

    Raises:
        BadOption: it is another number.
    """
    if given != wanted:
        raise BadOption(
            f"{given} bits: {grid} weights have {wanted}; pass weight_bits={wanted}, or choose another grid"
        )


@final
class SymmetricGrid(Form):
    """`weight = round(w / s) * s` with `s = clip * max|w| / (2^(bits-1) - 1)`, zero always on the grid.

    The maximum is taken over the survivors of a mask, and anew at every call, so that the grid follows the weight while
    it is trained; `clip` (all ones, or shape (out,)) narrows the range. The gradient passes straight through, and is
    zero for weights that `clip` cuts off. A channel of zeros has the scale one.
    """

    stands = ("weight",)
    settings = ("bits", "axis")
    clip: Tensor

    def __init__(self, bits: int, axis: int | None = 0, clip: Tensor | None = None) -> None:
        super().__init__()
        self.bits, self.axis = bits, axis
        self.register_buffer("clip", torch.ones(()) if clip is None else clip.detach().clone())

    def unsound(self) -> str:
        numbers = (
            self._buffers.keys() == {"clip"} and self.clip.is_floating_point() and bool(self.clip.isfinite().all())
        )
        axis = self.axis is None or _whole(self.axis, 0, 31)
        return "" if numbers and axis and _whole(self.bits, 1, 32) else "whose bits, axis or clip are impossible"

    @property
    def top(self) -> int:
        """The largest symbol; its negative is the smallest. One bit leaves only -1, 0 and 1."""
        return max(1, 2 ** (self.bits - 1) - 1)

    def scale(self, weight: Tensor, keep: Tensor | None = None) -> Tensor:
        """The grid's step, one in all or of shape (out,)."""
        size = weight.detach().abs()
        if keep is not None:
            size = torch.where(keep, size, torch.zeros((), dtype=size.dtype, device=size.device))
        if self.axis is None:
            widest = size.max()
        else:
            widest = size.movedim(self.axis, 0).flatten(1).amax(1) if size.dim() > 1 else size
        step = widest * self.clip / self.top
        return torch.where(step > 0, step, torch.ones_like(step))

    def symbols(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The integers, still as floats."""
        return (weight / along(scale, self.axis, weight.dim())).round().clamp(-self.top, self.top)

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (weight,) = free
        scale = self.scale(weight, keep)
        spread = along(scale, self.axis, weight.dim())
        snapped = self.symbols(weight.detach(), scale) * spread
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return snapped
        edge = spread * (self.top + 0.5)
        inside = torch.minimum(torch.maximum(weight, -edge), edge)
        # (inside - inside) is exactly zero, so the value is exactly the snapped one and the gradient that of `inside`
        return snapped + (inside - inside.detach())

    def codes(self, *free: Tensor, keep: Tensor | None = None) -> Codes | None:
        (weight,) = free
        weight = weight.detach()
        scale = self.scale(weight, keep)
        symbols = self.symbols(weight, scale).to(torch.int8 if self.bits <= 8 else torch.int32)
        rule = Affine(scale.cpu(), torch.zeros((), dtype=torch.int32), self.axis if scale.dim() else None)
        return Codes(symbols.cpu(), rule, tuple(weight.shape))


@dataclass(frozen=True)
class Steps:
    """`value = (symbol - zero_point) * scale`, symbols from `low` to `high`: what a file needs to know of a grid."""

    scale: float
    zero_point: int
    low: int
    high: int


@final
class ActivationGrid(Form):
    """`x = (clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale`, one fixed grid for a whole tensor.

    The gradient passes straight through inside the range and is zero outside of it.
    """

    stands = ("input", "output")
    settings = ("low", "high")
    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: float, zero_point: int, low: int = 0, high: int = 255) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.int32))

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (value,) = free
        if not value.is_floating_point():
            return value
        return torch.fake_quantize_per_tensor_affine(
            value.float(), self.scale, self.zero_point, self.low, self.high
        ).to(value.dtype)

    def unsound(self) -> str:
        if self._buffers.keys() != {"scale", "zero_point"} or self.scale.numel() != 1 or self.zero_point.numel() != 1:
            return "without one scale and one zero point"
        types = self.scale.is_floating_point() and not self.zero_point.is_floating_point()
        if not (types and 0 < float(self.scale) < float("inf")):
            return "whose scale is not positive, or whose zero point is no integer"
        limits = all(_whole(value, -(1 << 31), (1 << 31) - 1) for value in (self.low, self.high))
        inside = limits and self.low <= int(self.zero_point) <= self.high
        return "" if inside else "whose zero point does not lie between the lowest and the highest integer"

    def steps(self) -> Steps:
        """The grid as plain numbers."""
        return Steps(float(self.scale), int(self.zero_point), self.low, self.high)


def covering(low: float, high: float, bits: int = 8) -> ActivationGrid:
    """The unsigned grid of `bits` that covers a range; zero is on it exactly, so zero padding is exact too.

    >>> covering(0.0, 2.55).steps()
    Steps(scale=0.009999999776482582, zero_point=0, low=0, high=255)
    """
    top = 2**bits - 1
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / top
    if not scale > torch.finfo(torch.float32).tiny:  # an activation that is always zero
        return ActivationGrid(1.0, 0, 0, top)
    return ActivationGrid(scale, min(top, max(0, round(-low / scale))), 0, top)


@dataclass(frozen=True)
class Place:
    """Tensors that share one activation grid, as (module path, "input" or "output") pairs.

    What lies outside of `clamp` the network cuts off right behind this place (a ReLU), so the grid need not reach it.
    `readers` are the quantized layers whose inputs lie on the grid.
    """

    sites: tuple[tuple[str, str], ...]
    clamp: tuple[float, float] = (float("-inf"), float("inf"))
    readers: tuple[str, ...] = ()


@final
class Seen(Form):
    """Stands where a grid will stand and remembers what passes: exact limits and a sample; changes nothing."""

    stands = ()

    def __init__(self, clamp: tuple[float, float] = (float("-inf"), float("inf"))) -> None:
        super().__init__()
        self.clamp = clamp
        self.low, self.high = float("inf"), float("-inf")
        self.parts: list[Tensor] = []

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (value,) = free
        if value.is_floating_point() and value.numel():
            flat = value.detach().flatten()
            if flat.numel() > SAMPLE:  # at random: a fixed stride meets the same features or pixels in every batch
                draw = torch.Generator().manual_seed(len(self.parts))
                flat = flat[torch.randint(flat.numel(), (SAMPLE,), generator=draw).to(flat.device)]
            limits = [float(v) for v in torch.aminmax(value.detach())]
            least, most = (min(max(v, self.clamp[0]), self.clamp[1]) for v in limits)
            self.low, self.high = min(self.low, least), max(self.high, most)
            self.parts.append(flat.float().clamp(*self.clamp).cpu())
        return value

    @property
    def drawn(self) -> Tensor:
        """Values that passed, shape (n,), drawn at random from every call."""
        return torch.cat(self.parts)

    @property
    def sample(self) -> Tensor:
        """The same with the limits, each once more, behind them."""
        return torch.cat([*self.parts, torch.tensor([self.low, self.high])])
