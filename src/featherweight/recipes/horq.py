"""HORQ: inputs as a sum of signs, each taken of what the signs before it left over."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.binary import (
    BinaryWeights,
    Start,
    add_mean,
    channel_dim,
    looked_at,
    pad,
    readable,
    reads_of,
    sign_through,
    spread,
    unsound_shift,
)
from featherweight.core.fit import Optimizers
from featherweight.core.forms import Form, attach
from featherweight.core.ledger import note
from featherweight.core.norms import fit_and_settle
from featherweight.core.site import Site, channel_axis
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task
from featherweight.core.taught import taught
from featherweight.quantize import chosen_sites


@recipe(
    paper="Li et al., ICCV 2017, arXiv:1708.08687",
    family="quantize",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"epochs": 1, "calibration_batches": 2},
)
def horq(
    model: nn.Module,
    task: Task,
    *,
    order: Count = 2,
    keep_first_last: bool = True,
    calibration_batches: Count = 16,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    teacher_share: Share = 0.0,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Trains with inputs `X ~ sum_i beta_i H_i` and weights `alpha sign(W)`: `order` products of signs a layer.

    Zefan Li, Bingbing Ni, Wenjun Zhang, Xiaokang Yang, Wen Gao, "Performance Guaranteed Network Acceleration via
    High-Order Residual Quantization", ICCV 2017. From R_0 = X, for each column that a place of the output reads,

        beta_i = mean|R_{i-1}|,   H_i = sign(R_{i-1}),   R_i = R_{i-1} - beta_i H_i,

    so that `|R_i|^2 = |R_{i-1}|^2 - n beta_i^2`. Of order 1 it is XNOR-Net. First and last layer stay float.

    Departs from the paper: training starts from the network that is given, not from scratch, in the order of its own
    layers; the input is taken less a trained shift per channel, which starts at the mean that calibration saw (see
    `xnor_net`). Gradients are those of the forward pass with signs of the slope of a clipped line, in every order.
    Padding is zero in every order. After the training the running statistics of batch norms are taken anew. Residuals
    differ from column to column, so a convolution reads its columns laid out side by side: it gets the stride of its
    kernel and no padding. Simulated: sums of signs are exported as float operators; packed signs would execute `order`
    products a layer.

    Args:
        order: how many signs make up an input.
        keep_first_last: leave the first and the last layer that run in float.
        calibration_batches: how many batches the shifts are taken from.
        epochs: training through the signs, the learning rate falling to zero.
        lr: learning rate.
        optimizer: as in `fit`.
        teacher_share: share of the teacher's softened class probabilities in the loss, the labels have the rest.
        where: which layers; all Linear and Conv2d layers when left out.

    Raises:
        CompressionError: nothing is left to binarize.
    """
    found = chosen_sites(model, task, where, keep_first_last=keep_first_last)
    step = taught(task, model, teacher_share) if epochs else None
    starts = looked_at(model, task, {path: site.module for path, site in found.items()}, calibration_batches)
    for site in found.values():
        binarize(model, site, starts[site.path], order)
    note(f"{len(found)} layers of signs, inputs of order {order}")
    return fit_and_settle(model, task, epochs=epochs, lr=lr, optimizer=optimizer, step=step, label="train on signs")


def binarize(model: nn.Module, site: Site, start: Start, order: int) -> None:
    """Signs for a layer's weights and inputs; a bias takes over the mean of the input."""
    layer, dim = site.module, channel_dim(site.module)
    add_mean(model, site, start)
    attach(layer, ResidualSigns(start.shift, dim, start.window, order, layer), "input")
    attach(layer, BinaryWeights(channel_axis(site)), root=model)
    if isinstance(layer, nn.Conv2d):
        layer.stride, layer.padding, layer.dilation, layer.padding_mode = layer.kernel_size, (0, 0), (1, 1), "zeros"
        layer._reversed_padding_repeated_twice = [0, 0, 0, 0]
        layer._fw_swapped = True  # type: ignore[assignment] # the container rebuilds this layer, which moves as that of its class does not


# --- the input as a sum of signs --------------------------------------------------------------------------------------


def residual_signs(
    columns: Tensor, dims: tuple[int, ...], terms: int, window: float = 1.0, alive: Tensor | None = None
) -> Tensor:
    """`sum_i beta_i H_i` of columns that lie along `dims`; what is not `alive` (padding) is zero in every order.

    >>> column = torch.tensor([1.0, -3.0])
    >>> residual_signs(column, (0,), terms=1).tolist(), residual_signs(column, (0,), terms=2).tolist()
    ([2.0, -2.0], [1.0, -3.0])
    """
    total, rest = torch.zeros_like(columns), columns
    for _ in range(terms):
        part = rest.abs().mean(dims, keepdim=True) * sign_through(rest, window)
        part = part if alive is None else part * alive
        total, rest = total + part, rest - part
    return total


@final
class ResidualSigns(Form):
    """The first `terms` signs of each column of `x - shift`, summed; columns of a convolution are laid side by side.

    The input of a convolution with a kernel of (h, w) becomes (batch, channels, h * out height, w * out width); that
    of a linear layer, whose rows are the columns, keeps its shape.
    """

    stands = ("input",)
    settings = ("dim", "window", "terms", "reads")
    shift: nn.Parameter

    def __init__(self, shift: Tensor, dim: int, window: float, terms: int, layer: nn.Module) -> None:
        super().__init__()
        self.dim, self.window, self.terms, self.reads = dim, window, terms, reads_of(layer)
        self.shift = nn.Parameter(shift.detach().clone())

    def unsound(self) -> str:
        terms = isinstance(self.terms, int) and 1 <= self.terms <= 64
        return unsound_shift(self) or ("" if readable(self.reads) and terms else "whose window or order is impossible")

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (value,) = free
        centred = value - spread(self.shift, self.dim)
        if not self.reads:
            return residual_signs(centred, (-1,), self.terms, self.window)
        columns, groups = self.columns(centred), self.reads["groups"]
        alive = None
        if any(self.reads["padding"]) and self.reads["mode"] == "zeros":
            alive = self.columns(torch.ones_like(centred[..., :1, :, :])).unsqueeze(-6)
        found = residual_signs(columns.unflatten(-5, (groups, -1)), (-5, -4, -3), self.terms, self.window, alive)
        laid = found.flatten(-6, -5).movedim((-2, -4, -1, -3), (-4, -3, -2, -1))  # (..., out h, h, out w, w)
        return laid.flatten(-4, -3).flatten(-2, -1)

    def columns(self, value: Tensor) -> Tensor:
        """What each place of the output reads, shape (..., channels, h, w, out height, out width)."""
        (h, w), (down, right), (far, wide) = self.reads["kernel"], self.reads["stride"], self.reads["dilation"]
        padded = pad(value, self.reads)
        height = (padded.shape[-2] - far * (h - 1) - 1) // down + 1
        width = (padded.shape[-1] - wide * (w - 1) - 1) // right + 1
        taps = [
            padded[..., i * far : i * far + down * (height - 1) + 1 : down, :]
            [..., j * wide : j * wide + right * (width - 1) + 1 : right]
            for i in range(h)
            for j in range(w)
        ]  # fmt: skip
        return torch.stack(taps, -3).unflatten(-3, (h, w))
