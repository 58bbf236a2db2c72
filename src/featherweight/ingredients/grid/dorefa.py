"""DoReFa-Net: low-bit weights, activations and gradients, trained through the rounding.

Shuchang Zhou, Yuxin Wu, Zekun Ni, Xinyu Zhou, He Wen, Yuheng Zou, "DoReFa-Net: Training Low Bitwidth Convolutional
Neural Networks with Low Bitwidth Gradients", 2016, arXiv:1606.06160: weights eq. 8 and 9, activations eq. 11,
gradients eq. 12; the first and the last layer stay float; the defaults are the 1-2-6 bits of its abstract.

Departs from the paper: training starts from the network that is given, not from scratch. So every layer keeps the mean
size of its weights through one fixed scale (a batch norm behind the layer would absorb it, a network without one needs
it), and the grid of its input ends where calibration says, below zero too if the input goes there, not at 0 and 1
(`acts="unit_range"` is the paper's). With a mask, scales and maxima are those of the surviving weights.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from featherweight.catalogue import ingredient, method
from featherweight.core.forms import Affine, Codes, Form
from featherweight.core.grids import ActivationGrid, Seen
from featherweight.core.site import Site


@final
class DoReFaWeights(Form):
    """`scale * (2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1)`; with one bit `E|w| sign(w)`.

    `scale` is one fixed number; one bit takes its scale from the weights as they are. There are exactly `2^bits`
    levels, and zero is none of them.
    """

    stands = ("weight",)
    settings = ("bits",)
    scale: Tensor

    def __init__(self, bits: int, scale: Tensor) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", scale.detach().clone())

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (weight,) = free
        symbols, step = self.symbols(weight.detach(), keep)
        snapped = (symbols - self.centre) * step
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return snapped
        smooth = weight if self.bits == 1 else self.unit(weight, keep) * (2 * self.scale)
        # (smooth - smooth) is exactly zero: the value is the snapped one, the gradient passes straight through
        return snapped + (smooth - smooth.detach())

    def unsound(self) -> str:
        held = self._buffers.keys() == {"scale"} and self.scale.numel() == 1 and self.scale.is_floating_point()
        return "" if held and self.bits in range(1, 33) else "whose bits or scale are impossible"

    @property
    def centre(self) -> float:
        """The zero point, half-way between two symbols."""
        return (2**self.bits - 1) / 2

    def unit(self, weight: Tensor, keep: Tensor | None) -> Tensor:
        """`tanh(w) / (2 max|tanh(w)|) + 1/2`, in [0, 1] for every weight that counts."""
        squashed = weight.tanh()
        alive = squashed if keep is None else torch.where(keep, squashed, torch.zeros_like(squashed))
        widest = alive.abs().max()
        return squashed / (2 * torch.where(widest > 0, widest, torch.ones_like(widest))) + 0.5

    def symbols(self, weight: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """The integers 0 to 2^bits - 1, still as floats, and the step between two levels."""
        if self.bits == 1:
            return (weight >= 0).to(weight.dtype), 2 * mean_size(weight, keep)
        top = 2**self.bits - 1
        return (self.unit(weight, keep) * top).round().clamp(0, top), 2 * self.scale / top

    def codes(self, *free: Tensor, keep: Tensor | None = None) -> Codes | None:
        (weight,) = free
        symbols, step = self.symbols(weight.detach(), keep)
        kind = torch.uint8 if self.bits <= 8 else torch.int32
        return Codes(symbols.cpu().to(kind), Affine(step.cpu(), torch.tensor(self.centre)), tuple(weight.shape))


def mean_size(weight: Tensor, keep: Tensor | None = None) -> Tensor:
    """`E|w|` over the weights that count; one if there is none."""
    size = weight.detach().abs()
    mean = size.mean() if keep is None else torch.where(keep, size, torch.zeros_like(size)).sum() / keep.sum().clamp(1)
    return torch.where(mean > 0, mean, torch.ones_like(mean))


@ingredient("grid")
def dorefa_weights(site: Site, bits: int) -> Form:
    """The paper's weights, times the number that keeps the mean size of the layer's weights.

    >>> from torch import tensor
    >>> site = Site.of(tensor([-0.3, -0.1, 0.1, 0.3]))
    >>> [round(v, 3) for v in dorefa_weights(site, bits=2)(site.weight).tolist()]
    [-0.3, -0.1, 0.1, 0.3]
    """
    weight, keep = site.weight, site.keep.to(site.weight.device)
    bare = DoReFaWeights(bits, torch.ones((), dtype=weight.dtype, device=weight.device))
    if bits == 1:
        return bare
    return DoReFaWeights(bits, mean_size(weight, keep) / mean_size(bare(weight, keep=keep), keep))


@ingredient("range", calibrated=False)
def unit_range(seen: Seen, bits: int) -> ActivationGrid:
    """`quantize_k(clip(a, 0, 1))`: the paper's activations, whatever was seen.

    >>> unit_range(Seen(), bits=2)(torch.tensor([-1.0, 0.3, 0.6, 7.0])).tolist()
    [0.0, 0.3333333432674408, 0.6666666865348816, 1.0]
    """
    return ActivationGrid(1 / (2**bits - 1), 0, 0, 2**bits - 1)


@final
class DoReFaGradient(Form):
    """`2 m (quantize_k(g / 2m + 1/2 + N) - 1/2)`, `m` the largest |g| of a sample, N uniform within half a step.

    The noise makes the rounding right on average; the result lies on the grid of `bits` bits between -m and m.
    """

    stands = ("grad",)
    settings = ("bits",)

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def unsound(self) -> str:
        return "" if self.bits in range(1, 33) and not self._buffers and not self._parameters else "of impossible bits"

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (gradient,) = free
        top = 2**self.bits - 1
        widest = gradient.abs().flatten(1).amax(1).view(-1, *([1] * (gradient.dim() - 1)))
        widest = torch.where(widest > 0, widest, torch.ones_like(widest))
        noise = torch.rand_like(gradient) - 0.5
        symbols = ((gradient / (2 * widest) + 0.5) * top + noise).round().clamp(0, top)
        return (symbols / top - 0.5) * (2 * widest)


@ingredient("gradient")
def dorefa_gradient(bits: int) -> Form:
    """The paper's gradients.

    >>> dorefa_gradient(2)(torch.tensor([[-1.0, 1.0]])).tolist()
    [[-1.0, 1.0]]
    """
    return DoReFaGradient(bits)


dorefa = method(
    "quantize",
    weights=dorefa_weights,
    acts="mse",
    grads=dorefa_gradient,
    weight_bits=1,
    act_bits=2,
    grad_bits=6,
    keep_first_last=True,
    epochs=10,
    lr=1e-3,
    paper="Zhou et al., 2016, arXiv:1606.06160",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"epochs": 1, "weight_bits": 4, "act_bits": 4},
)
