"""Binary weight networks: a sign for each weight and one size for each filter.

Mohammad Rastegari, Vicente Ordonez, Joseph Redmon, Ali Farhadi, "XNOR-Net: ImageNet Classification Using Binary
Convolutional Neural Networks", ECCV 2016, arXiv:1603.05279, sec. 3.1. `B = sign(W)` and `alpha = mean|W|` minimise
`||W - alpha B||^2` for each filter (eq. 6), which leaves `||W||^2 - n alpha^2`. The first and the last layer stay
float. Latent float weights are trained.

Departs from the paper: training starts from the network that is given, whose batch norms stay as they are, not from
scratch. The gradient is that of `alpha(W) sign(W)` with a sign of slope 1[|W| <= 1],

    dL/dW = sign(W) <sign(W), g> / n + alpha g 1[|W| <= 1],

not `g (1/n + alpha 1[|W| <= 1])` as the paper writes, which forgets that alpha is shared by a filter. With a mask,
alpha is that of the surviving weights.

Executed as int8 weights by the ONNX file.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from featherweight.catalogue import ingredient, method
from featherweight.core.forms import Affine, Codes, Form, along
from featherweight.core.grids import mean_sizes, only_bits
from featherweight.core.site import Site, channel_axis


@final
class BinaryWeights(Form):
    """`alpha * sign(w)` with `alpha = mean|w|`, in all or per index of `axis`; `sign(0) = 1`.

    A channel of zeros stays zero.
    """

    settings = ("axis",)

    def __init__(self, axis: int | None = 0) -> None:
        super().__init__()
        self.axis = axis

    def unsound(self) -> str:
        axis = self.axis is None or (isinstance(self.axis, int) and 0 <= self.axis < 32)
        return "" if axis and not self._buffers and not self._parameters else "whose axis is impossible"

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (weight,) = free
        sign = signs(weight.detach())
        alpha = along(mean_sizes(weight, self.axis, keep), self.axis, weight.dim())
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return sign * alpha
        clipped = weight.clamp(-1, 1)
        # the difference is exactly zero: the value is alpha * sign, the gradient that of both factors
        return sign * alpha + alpha.detach() * (clipped - clipped.detach())

    def codes(self, *free: Tensor, keep: Tensor | None = None) -> Codes | None:
        (weight,) = free
        alpha = mean_sizes(weight.detach(), self.axis, keep)
        rule = Affine(alpha.cpu(), torch.zeros((), dtype=torch.int32), self.axis)
        return Codes(signs(weight.detach()).to(torch.int8).cpu(), rule, tuple(weight.shape))


def signs(value: Tensor) -> Tensor:
    """1 where a value is at least zero, else -1.

    >>> signs(torch.tensor([-2.0, 0.0, 3.0])).tolist()
    [-1.0, 1.0, 1.0]
    """
    return torch.where(value >= 0, torch.ones_like(value), -torch.ones_like(value))


@ingredient("grid")
def binary(site: Site, bits: int) -> Form:
    """`mean|w| sign(w)` of each output channel.

    >>> site = Site.of(torch.tensor([[0.2, -0.4], [1.0, 3.0]]))
    >>> [[round(v, 3) for v in row] for row in binary(site, bits=1)(site.weight).tolist()]
    [[0.3, -0.3], [2.0, 2.0]]
    """
    only_bits(bits, 1, "binary")
    return BinaryWeights(channel_axis(site))


bwn = method(
    "quantize",
    weights=binary,
    weight_bits=1,
    keep_first_last=True,
    epochs=10,
    lr=1e-3,
    paper="Rastegari et al., ECCV 2016, arXiv:1603.05279",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"epochs": 1},
)
