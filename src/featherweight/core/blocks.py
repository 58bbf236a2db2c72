"""Convolutions in a row that take the place of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Between = Literal["norm", "linear"]
"""What stands between the parts of a block: a batch norm and a rectifier, or nothing."""
Start = Literal["factors", "random"]
"""Whether a block starts from the layer that it replaces, taken apart, or from new weights."""


def in_a_row(
    layer: nn.Conv2d, parts: Sequence[Tensor], *, spatial: int, groups: int, start: Start, between: Between
) -> nn.Sequential:
    """Convolutions with weights of these shapes in the place of a layer; the last one has its bias.

    Args:
        parts: the weights (outputs, inputs of a group, k, k), in order.
        spatial: which of them has the layer's stride, padding and dilation, and `groups` groups; the others are 1 x 1.
    """
    steps: list[nn.Module] = []
    for i, weight in enumerate(parts):
        last = i == len(parts) - 1
        conv = convolution(layer, weight, groups if i == spatial else 1, spatial=i == spatial, last=last)
        if start == "factors":
            fill(conv, weight, layer.bias if last else None)
        norm = [nn.BatchNorm2d(len(weight)).to(layer.weight), nn.ReLU()] if between == "norm" and not last else []
        steps += [conv, *norm]
    return nn.Sequential(*steps)


def convolution(layer: nn.Conv2d, weight: Tensor, groups: int, *, spatial: bool, last: bool) -> nn.Conv2d:
    """A convolution with the shape of this weight; a `spatial` one has the layer's geometry, the `last` its bias."""
    names = ("stride", "padding", "dilation", "padding_mode") if spatial else ()
    geometry: dict[str, Any] = {name: getattr(layer, name) for name in names}
    out, into, height, width = weight.shape
    bias = last and layer.bias is not None
    return nn.Conv2d(into * groups, out, (height, width), groups=groups, bias=bias, **geometry).to(layer.weight)


@torch.no_grad()
def fill(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None = None) -> None:
    """Puts weight and bias into a convolution that has them."""
    conv.weight.copy_(weight)
    if conv.bias is not None and bias is not None:
        conv.bias.copy_(bias)
