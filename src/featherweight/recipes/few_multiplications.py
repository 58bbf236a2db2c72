"""Training with few multiplications: drawn binary or ternary weights, and shifts in the back-propagation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.binary import SignWeights, power_of_two
from featherweight.core.fit import Optimizers
from featherweight.core.forms import Affine, Codes, Form, along, attach, forms_of, originals
from featherweight.core.grids import mean_sizes, rows
from featherweight.core.ledger import note
from featherweight.core.norms import settle_norms
from featherweight.core.site import Site, channel_axis
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task
from featherweight.core.taught import taught
from featherweight.ingredients.grid.twn import best_ternary
from featherweight.quantize import chosen_sites


@recipe(
    paper="Lin et al., ICLR 2016, arXiv:1510.03009",
    family="quantize",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"epochs": 1},
)
def few_multiplications(
    model: nn.Module,
    task: Task,
    *,
    connect: Literal["ternary", "binary"] = "ternary",
    shifts: Count | None = 4,
    keep_first_last: bool = False,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    teacher_share: Share = 0.0,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Trains with drawn weights of -1, 0, 1 and with layer inputs rounded to powers of two in the weights' gradient.

    Zhouhan Lin, Matthieu Courbariaux, Roland Memisevic, Yoshua Bengio, "Neural Networks with Few Multiplications",
    ICLR 2016. Binary connect: P(1) = (w + 1) / 2, P(-1) = 1 - P(1). Ternary connect: P(1) = w and P(0) = 1 - w for
    w > 0, P(-1) = -w and P(0) = 1 + w else, so `E[w_t] = w`. Both passes use the drawn weights, so that products are
    changes of sign. Quantized back propagation: in `dW = delta x^T` x becomes `sign(x) 2^clip(round(log2|x|))`, so that
    these products are shifts. Float weights are clipped to [-1, 1] after each update.

    Departs from the paper: training starts from the network that is given, so -1 and 1 stand for a power of two near
    the channel's own scale (the best ternary scale, or the mean size), which costs no multiplication, and weights and
    learning rate are in these units; with a mask it is that of the surviving weights. The bounds of the exponent,
    `-shifts` to `shifts`, were not checked against the paper's. The result has the weights rounded, not drawn (the most
    likely value), and batch norms have their statistics taken anew. Adam and batch norm multiply as ever. Simulated:
    it is training without multiplications that the paper is about, and here it is slower than training with them; the
    result is executed as int8 weights by the ONNX file.

    Args:
        connect: "ternary" or "binary" weights.
        shifts: the largest exponent, either way, of a power of two that stands for an input; None leaves the inputs.
        keep_first_last: leave the first and the last layer that run in float.
        epochs: training, the learning rate falling to zero.
        lr: learning rate.
        optimizer: as in `fit`.
        teacher_share: share of the teacher's softened class probabilities in the loss, the labels have the rest.
        where: which layers; all Linear and Conv2d layers when left out.

    Raises:
        CompressionError: nothing is left to quantize.
    """
    found = chosen_sites(model, task, where, keep_first_last=keep_first_last)
    step = taught(task, model, teacher_share) if epochs else None
    for site in found.values():
        attach(site.module, _drawn(site, ternary=connect == "ternary"), root=model)
    _clip(found.values())
    note(f"{len(found)} layers of {connect} weights")
    with shifted_back_propagation([site.module for site in found.values()] if shifts else [], shifts or 0):
        task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, step=step, label="train on drawn weights",
                 after_step=lambda progress: _clip(found.values()))  # fmt: skip
    return settle_norms(model, task) if epochs else model


def _drawn(site: Site, *, ternary: bool) -> Form:
    """The form of one layer, its scale a power of two."""
    axis, keep = channel_axis(site), site.keep.to(site.weight.device)
    if not ternary:
        return SignWeights(power_of_two(mean_sizes(site.weight, axis, keep)), axis, stochastic=True)
    size = rows(torch.where(keep, site.weight.abs(), torch.zeros_like(site.weight)), axis)
    above = best_ternary(size)
    return TernaryConnect(power_of_two((size * above).sum(1) / above.sum(1).clamp(1)), axis)


def _clip(found: Iterable[Site]) -> None:
    for site in found:
        for form in forms_of(site.module, site.name):
            if isinstance(form, (SignWeights, TernaryConnect)):
                form.clip(originals(site.module, site.name)[0])


# --- ternary connect --------------------------------------------------------------------------------------------------


@final
class TernaryConnect(Form):
    """`scale * t`, t in {-1, 0, 1}: drawn with the mean `w / scale` while a network trains, else the nearest."""

    stands = ("weight",)
    settings = ("axis",)
    scale: Tensor

    def __init__(self, scale: Tensor, axis: int | None = 0) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("scale", scale.detach().clone())

    def unsound(self) -> str:
        axis = self.axis is None or (isinstance(self.axis, int) and 0 <= self.axis < 32)
        held = self._buffers.keys() == {"scale"} and not self._parameters and self.scale.is_floating_point() and axis
        sound = held and self.scale.dim() == (0 if self.axis is None else 1) and bool(self.scale.isfinite().all())
        return "" if sound else "whose scale or axis is impossible"

    def unit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight over its scale, in [-1, 1], and the scale; zero where the scale is."""
        scale = along(self.scale, self.axis, weight.dim())
        return torch.where(scale > 0, weight / scale, torch.zeros_like(weight)).clamp(-1, 1), scale

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (weight,) = free
        unit, scale = self.unit(weight.detach())
        if not torch.is_grad_enabled():
            return unit.round() * scale + 0.0
        symbols = unit.sign() * torch.bernoulli(unit.abs()) if self.training else unit.round()
        return symbols * scale + (weight - weight.detach())

    def codes(self, *free: Tensor, keep: Tensor | None = None) -> Codes | None:
        (weight,) = free
        symbols = self.unit(weight.detach())[0].round().to(torch.int8)
        rule = Affine(self.scale.cpu(), torch.zeros((), dtype=torch.int32), self.axis)
        return Codes(symbols.cpu(), rule, tuple(weight.shape))

    @torch.no_grad()
    def clip(self, weight: Tensor) -> None:
        """Clips the free weight to between -scale and scale, in place."""
        scale = along(self.scale, self.axis, weight.dim())
        weight.copy_(torch.minimum(torch.maximum(weight, -scale), scale))


# --- quantized back propagation ---------------------------------------------------------------------------------------


def shifted(value: Tensor, shifts: int) -> Tensor:
    """`sign(x) 2^clip(round(log2|x|), -shifts, shifts)`; zero stays zero.

    >>> shifted(torch.tensor([0.0, 0.3, -100.0, 1e-9]), 4).tolist()
    [0.0, 0.25, -16.0, 0.0625]
    """
    exponent = value.abs().log2().round().clamp(-shifts, shifts)
    return torch.where(value == 0, value, value.sign() * exponent.exp2())


@contextmanager
def shifted_back_propagation(layers: list[nn.Module], shifts: int) -> Iterator[None]:
    """A block in which the gradients of these layers' weights are taken from inputs that are powers of two."""
    for layer in layers:
        layer.forward = partial(_forward, layer, shifts)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _forward(layer: nn.Module, shifts: int, x: Tensor) -> Tensor:
    """What the layer computes; its input's gradient comes by the first product, its weight's by the second."""
    product = partial(layer._conv_forward, bias=None) if isinstance(layer, nn.Conv2d) else F.linear
    weight: Tensor = layer.weight  # type: ignore[assignment] # once: every look at it draws anew
    bias: Tensor | None = layer.bias  # type: ignore[assignment] # through the forms that may stand on it
    plain = product(x, weight.detach())
    plain = plain if bias is None else plain + (bias if isinstance(layer, nn.Linear) else bias.view(-1, 1, 1))
    if not torch.is_grad_enabled():
        return plain
    learns = product(shifted(x.detach(), shifts), weight)
    return plain + (learns - learns.detach())
