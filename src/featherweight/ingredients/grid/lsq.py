"""Learned step size quantization: the steps of weight and activation grids are trained with the weights.

Steven K. Esser, Jeffrey L. McKinstry, Deepika Bablani, Rathinakumar Appuswamy, Dharmendra S. Modha, "Learned Step Size
Quantization", ICLR 2020, arXiv:1902.08153. With the integers from -Q_N to Q_P,

    v^ = round(clip(v / s, -Q_N, Q_P)) s                                                          (eq. 1 and 2)
    dv^/ds = round(v / s) - v / s inside, -Q_N below, Q_P above;  dv^/dv = 1 inside, else 0        (eq. 3 and 5)

The gradient of s is scaled by `1 / sqrt(n Q_P)`, n the weights or the features of a sample that share it (sec. 2.2),
and s starts at `2 E|v| / sqrt(Q_P)`. Training starts from the float network, with momentum; the first and the last
layer have 8 bits.

Departs from the paper: weights have one step per output channel (the paper: one a layer, `weights="lsq_tensor"`), and
8 bits leave out -128, which integer kernels need not have. Activations start from what calibration saw of the float
network, not from the first batch, at the step of least squared error (`acts="lsq_acts_mean"` is the paper's start: at
2 bits and after 94 steps of 128 images, one seed, a ResNet-20 of half width had 89.0 % on Fashion-MNIST with it, 90.7 %
with ours). Momentum is Nesterov's, the weight decay 5e-4 at every number of bits, and 10 epochs are the default (the
paper: 90, with less decay at fewer bits). Activations that go below zero have signed integers. With a mask, the steps
start from the surviving weights. Executed by integer runtimes as int8: symbols of fewer bits make the file smaller,
not the arithmetic, unless packed kernels take them.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from featherweight.catalogue import ingredient, method
from featherweight.core.forms import Affine, Codes, Form, along
from featherweight.core.grids import ActivationGrid, Seen, mean_sizes
from featherweight.core.site import Site, channel_axis
from featherweight.errors import BadOption

FRACTIONS = torch.logspace(0, -2, 100)  # of the widest step, the one that reaches the largest activation
SMALLEST = 1e-18  # no step gets smaller, so that none is zero


@final
class LearnedWeights(Form):
    """`clamp(round(w / s), low, high) * s` with a trained step `s`, in all or of shape (channels,)."""

    stands = ("weight",)
    settings = ("low", "high", "axis")
    step: nn.Parameter

    def __init__(self, step: Tensor, low: int, high: int, axis: int | None) -> None:
        super().__init__()
        self.low, self.high, self.axis = low, high, axis
        self.step = nn.Parameter(step.detach().clone())

    def unsound(self) -> str:
        return _unsound(self, self.axis)

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (weight,) = free
        scale = along(positive(self.step), self.axis, weight.dim())
        snapped = self.symbols(weight.detach(), scale.detach()) * scale.detach()
        if not torch.is_grad_enabled():
            return snapped
        factor = 1 / math.sqrt(weight.numel() / self.step.numel() * self.high)
        return StepGradient.apply(weight, scale, snapped, self.low, self.high, factor)

    def symbols(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The integers, still as floats."""
        return (weight / scale).round().clamp(self.low, self.high) + 0.0  # no -0.0

    def codes(self, *free: Tensor, keep: Tensor | None = None) -> Codes | None:
        (weight,) = free
        scale = positive(self.step.detach())
        symbols = self.symbols(weight.detach(), along(scale, self.axis, weight.dim()))
        kind = torch.int8 if self.high <= 127 else torch.int32
        rule = Affine(scale.cpu(), torch.zeros((), dtype=torch.int32), self.axis if scale.dim() else None)
        return Codes(symbols.to(kind).cpu(), rule, tuple(weight.shape))


@final
class LearnedActivations(Form):
    """An activation on integers from `low` to `high` times a trained step; settles as a grid of that step."""

    stands = ("input", "output")
    settings = ("low", "high")
    step: nn.Parameter

    def __init__(self, step: float, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.step = nn.Parameter(torch.tensor(step, dtype=torch.float32))

    def unsound(self) -> str:
        return _unsound(self, None)

    def settled(self) -> Form:
        return ActivationGrid(float(positive(self.step.detach())), 0, self.low, self.high)

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (value,) = free
        if not value.is_floating_point():
            return value
        scale, zero = positive(self.step), torch.zeros((), dtype=torch.int32, device=self.step.device)
        held = value.float()
        # the operator of ActivationGrid: what is trained is what settles, bit for bit
        snapped = torch.fake_quantize_per_tensor_affine(held.detach(), scale.detach(), zero, self.low, self.high)
        if not torch.is_grad_enabled():
            return snapped.to(value.dtype)
        factor = 1 / math.sqrt(max(1, held[:1].numel()) * self.high)
        return StepGradient.apply(held, scale, snapped, self.low, self.high, factor).to(value.dtype)


class StepGradient(torch.autograd.Function):
    """Hands on `snapped`, with the gradients of value and step; `scale` broadcasts over the value."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: Tensor, snapped: Tensor, low: int, high: int, factor: float) -> Tensor:
        ctx.save_for_backward(value, scale, snapped)
        ctx.low, ctx.high, ctx.factor = low, high, factor
        return snapped.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = grads
        value, scale, snapped = ctx.saved_tensors
        inside = (value > ctx.low * scale) & (value < ctx.high * scale)
        passed = torch.where(inside, gradient, torch.zeros_like(gradient))
        # (snapped - value) / s inside, snapped / s = -Q_N or Q_P outside
        of_scale = ((gradient * snapped - passed * value) / scale).sum_to_size(scale.shape) * ctx.factor
        return passed, of_scale, None, None, None, None


def positive(step: Tensor) -> Tensor:
    """A step as a scale: a trained number may cross zero, a scale may not."""
    return step.abs().clamp_min(SMALLEST)


def _unsound(form: LearnedWeights | LearnedActivations, axis: int | None) -> str:
    held = form._parameters.keys() == {"step"} and not form._buffers and form.step.is_floating_point()
    numbers = all(isinstance(value, int) and abs(value) <= 1 << 16 for value in (form.low, form.high))
    if not (held and numbers and form.low <= 0 < form.high):
        return "whose step or integers are missing or impossible"
    shape = form.step.dim() == 0 if axis is None else form.step.dim() == 1
    return "" if shape and bool(form.step.isfinite().all()) else "whose step is of another shape, or not finite"


@ingredient("grid")
def lsq_weights(site: Site, bits: int) -> Form:
    """Trained steps, one per output channel, that start at `2 E|w| / sqrt(Q_P)`.

    >>> site = Site.of(torch.tensor([[0.3, -0.3, 0.6], [0.0, 0.0, 0.0]]))
    >>> [round(v, 2) for v in lsq_weights(site, bits=2).step.tolist()]
    [0.8, 2.0]
    """
    return _weights(site, bits, channel_axis(site))


@ingredient("grid")
def lsq_tensor(site: Site, bits: int) -> Form:
    """The paper's weights: the same with one step for the whole tensor."""
    return _weights(site, bits, None)


def _weights(site: Site, bits: int, axis: int | None) -> Form:
    low, high = integers(bits, negative=True)
    mean = mean_sizes(site.weight, axis, site.keep.to(site.weight.device))
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    return LearnedWeights(2 * mean / math.sqrt(high), low, high, axis)


@ingredient("range")
def lsq_acts(seen: Seen, bits: int) -> Form:
    """A trained step that starts at the one of least squared error of what was seen; unsigned if none was below 0.

    >>> seen = Seen()
    >>> _ = seen(torch.tensor([0.0, 0.5, 1.0, 1.5]))
    >>> lsq_acts(seen, bits=2).settled().steps()
    Steps(scale=0.5, zero_point=0, low=0, high=3)
    """
    form = _acts(seen, bits)
    values = seen.sample if seen.parts else torch.zeros(1)
    steps = values.abs().max() / form.high * FRACTIONS
    errors = torch.stack([_error(values, step, form.low, form.high) for step in steps])
    if steps[0] > 0:
        form.step.data = steps[errors.argmin()]
    return form


@ingredient("range")
def lsq_acts_mean(seen: Seen, bits: int) -> Form:
    """The paper's activations: the same, starting at `2 E|x| / sqrt(Q_P)`.

    >>> seen = Seen()
    >>> _ = seen(torch.tensor([0.0, 3.0]))
    >>> lsq_acts_mean(seen, bits=2).settled().steps()
    Steps(scale=1.7320507764816284, zero_point=0, low=0, high=3)
    """
    return _acts(seen, bits)


def _acts(seen: Seen, bits: int) -> LearnedActivations:
    low, high = integers(bits, negative=bool(seen.parts) and seen.low < 0)
    mean = float(torch.cat(seen.parts).abs().mean()) if seen.parts else 0.0
    return LearnedActivations(2 * mean / math.sqrt(high) if mean > 0 else 1.0, low, high)


def _error(values: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    return ((values / step).round().clamp(low, high) * step - values).square().mean()


def integers(bits: int, *, negative: bool) -> tuple[int, int]:
    """The lowest and the highest integer: -Q_N and Q_P.

    Raises:
        BadOption: one bit has no positive integer beside its negative one.

    >>> integers(2, negative=True), integers(2, negative=False), integers(8, negative=True)
    ((-2, 1), (0, 3), (-127, 127))
    """
    if not negative:
        return 0, 2**bits - 1
    if bits < 2:
        raise BadOption(f"{bits} bit leaves no positive value of a signed grid: pass at least 2, or weights='binary'")
    return max(-(2 ** (bits - 1)), -127 if bits == 8 else -(2**15)), 2 ** (bits - 1) - 1


lsq = method(
    "quantize",
    weights=lsq_weights,
    acts=lsq_acts,
    weight_bits=4,
    act_bits=4,
    first_last_bits=8,
    epochs=10,
    lr=0.01,
    optimizer="sgd",
    paper="Esser et al., ICLR 2020, arXiv:1902.08153",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"epochs": 1},
)
