"""Activations of one bit."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from featherweight.core.forms import Form


@final
class Signs(Form):
    """`scale` where an activation is at least zero, `-scale` elsewhere; the gradient passes where `|x| <= 1`.

    Source: Hubara et al., "Binarized Neural Networks", NIPS 2016, arXiv:1602.02830, eq. 1 and 4. Zero is no level, so
    zero padding stays zero: it stands behind the form.
    """

    settings = ()
    scale: Tensor

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))

    def unsound(self) -> str:
        held = self._buffers.keys() == {"scale"} and self.scale.numel() == 1 and self.scale.is_floating_point()
        return "" if held and 0 < float(self.scale) < float("inf") else "without one positive scale"

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (value,) = free
        if not value.is_floating_point():
            return value
        scale = self.scale.to(value.dtype)
        signs = torch.where(value.detach() >= 0, scale, -scale)
        if not (torch.is_grad_enabled() and value.requires_grad):
            return signs
        inside = value.clamp(-1, 1) * scale
        return signs + (inside - inside.detach())  # exactly the signs; the gradient is that of `inside`
