"""One-shot compression: Tucker-2 of every convolution and SVD of every linear layer, ranks by VBMF, then fine-tuning.

Source: Kim, Park, Yoo, Choi, Yang and Shin, ICLR 2016, arXiv:1511.06530, "Compression of deep convolutional neural
networks for fast and low power mobile applications".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from featherweight.catalogue import ingredient, method
from featherweight.core.lowrank import decompose, truncated

FEW_CHANNELS = 4
Layer = nn.Linear | nn.Conv2d


def unfoldings(layer: Layer) -> tuple[Tensor, ...] | str:
    """The matrices whose ranks `tucker2` needs, or why it refuses the layer.

    A convolution (N, C, d, d) has two, over outputs (N, C d d) and over inputs (C, N d d); only the first where there
    are few input channels. A linear layer and a 1x1 convolution have one: the weight.
    """
    weight = layer.weight.detach()
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        kind = "depthwise" if layer.groups == layer.in_channels else "grouped"
        return f"a {kind} convolution (groups={layer.groups}): Tucker-2 is for groups=1"
    outputs = weight.flatten(1)
    if _pointwise(layer) or weight.shape[1] < FEW_CHANNELS:
        return (outputs,)
    return outputs, weight.transpose(0, 1).flatten(1)


@ingredient("factor", views=unfoldings)
def tucker2(layer: Layer, ranks: tuple[int, ...], *, sweeps: int = 10) -> nn.Sequential:
    """Ordinary layers that compute the layer's Tucker-2 approximation (its Tucker-1 or SVD where there is one rank).

    A convolution becomes 1x1 C -> R2, d x d R2 -> R1 with the stride, padding and dilation, 1x1 R1 -> N with the bias
    (Kim et al., fig. 2); with one rank d x d C -> R1, 1x1 R1 -> N. A linear layer becomes two.

    Departs from the paper: singular values are split evenly over the two factors of a linear layer or 1x1 convolution;
    "few input channels" (below 4) takes the place of "the first layer" for Tucker-1.
    """
    weight = layer.weight.detach().double()
    if isinstance(layer, nn.Linear) or _pointwise(layer) or len(ranks) == 1:
        left, right = truncated(weight.flatten(1), ranks[0])
        parts = [right.view(ranks[0], *weight.shape[1:]), left.view(*left.shape, *[1] * (weight.dim() - 2))]
    else:
        core, out, into = decompose(weight, ranks[0], ranks[1], sweeps)
        parts = [into.T[:, :, None, None], core, out[:, :, None, None]]
    if isinstance(layer, nn.Linear):
        return nn.Sequential(*(_linear(part, layer, last=part is parts[-1]) for part in parts))
    spatial = parts[0] if len(parts) == 2 else parts[1]
    return nn.Sequential(*(_conv(part, layer, here=part is spatial, last=part is parts[-1]) for part in parts))


def _pointwise(layer: Layer) -> bool:
    return isinstance(layer, nn.Linear) or tuple(layer.weight.shape[2:]) == (1, 1)


def _linear(weight: Tensor, layer: nn.Linear, *, last: bool) -> nn.Module:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=last and layer.bias is not None)
    return _filled(made, weight, layer)


def _conv(weight: Tensor, layer: nn.Conv2d, *, here: bool, last: bool) -> nn.Module:
    """A convolution with the given weight; the one that is `here` keeps the layer's geometry, the `last` its bias."""
    names = ("stride", "padding", "dilation", "padding_mode") if here else ()
    geometry: dict[str, Any] = {name: getattr(layer, name) for name in names}
    out, into, height, width = weight.shape
    return _filled(
        nn.Conv2d(into, out, (height, width), bias=last and layer.bias is not None, **geometry), weight, layer
    )


def _filled(made: Layer, weight: Tensor, layer: Layer) -> nn.Module:
    made.to(device=layer.weight.device, dtype=layer.weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
        if made.bias is not None and layer.bias is not None:
            made.bias.copy_(layer.bias)
    return made


tucker2_vbmf = method(
    "factorize",
    factor=tucker2,
    rank="vbmf",
    paper="Kim et al., ICLR 2016, arXiv:1511.06530",
    needs={"labels", "train"},
    shrinks={"factors"},
    small={"rank": 0.25, "floor": 1, "epochs": 1},
)
