"""Shifts between two 1 x 1 convolutions, in the place of a spatial one.

Source: Wu, Wan, Yue, Jin, Zhao, Golmant, Gholaminejad, Gonzalez and Keutzer, Shift: A Zero FLOP, Zero Parameter
Alternative to Spatial Convolutions, CVPR 2018, arXiv:1711.08141. A convolution C -> K becomes 1 x 1 C -> M, a shift of
each of the M = e K channels to one place of the kernel, 1 x 1 M -> K with the stride: M (C + K) parameters.

As the places of a kernel add up, the M largest singular values of all k^2 matrices W[:, :, p] give the nearest such
convolution; it is exact where M is the sum of their ranks.

Departs from the paper: it takes the place of convolutions of a trained network, from whose weights it may start; what
it is added to, and the batch norm and rectifier behind it, are those that the network has; the paper's equal numbers of
channels at each place are places="equal".
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from featherweight.allowed import Positive
from featherweight.catalogue import ingredient
from featherweight.core.blocks import Between, Start, fill
from featherweight.core.shifts import Shift2d


@ingredient("block", kind="block", family="architecture", paper="Wu et al., CVPR 2018, arXiv:1711.08141")
def shift_conv(
    layer: nn.Conv2d,
    *,
    expansion: Positive = 1.0,
    places: Literal["best", "equal"] = "best",
    start: Start = "factors",
    between: Between = "norm",
) -> nn.Module | str:
    """1 x 1, shift, 1 x 1 in the place of a convolution, or why they cannot stand there.

    Args:
        expansion: e: there are M = e K channels between, K those of the layer's output.
        places: how many channels each place of the kernel has: "best" as the largest singular values of the layer's
            weight want it, "equal" as in the paper, what is over going to the middle.
        start: "factors" takes the layer's weight apart; "random" draws new weights.
        between: "norm" for a batch norm and a rectifier behind the first 1 x 1, as in the paper; "linear" for nothing.
    """
    if reason := misfit(layer):
        return reason
    width, kernel = max(1, round(expansion * layer.out_channels)), layer.kernel_size[0]
    left, right, splits = taken_apart(layer.weight.detach().double(), width, places)
    into = nn.Conv2d(layer.in_channels, len(right), 1, bias=False).to(layer.weight)
    out = nn.Conv2d(len(right), layer.out_channels, 1, layer.stride[0], bias=layer.bias is not None).to(layer.weight)
    if start == "factors":
        fill(into, right[:, :, None, None])
        fill(out, left[:, :, None, None], layer.bias)
    norm = [nn.BatchNorm2d(len(right)).to(layer.weight), nn.ReLU()] if between == "norm" else []
    return nn.Sequential(into, *norm, Shift2d(splits, kernel), out)


def misfit(layer: nn.Conv2d) -> str:
    """Why a convolution is no sum of shifted 1 x 1 ones as wide as its input; empty if it is."""
    kernel = layer.kernel_size[0]
    if layer.groups > 1:
        return f"it has groups={layer.groups} already"
    if layer.kernel_size != (kernel, kernel) or kernel % 2 == 0 or not 1 < kernel <= 9:
        return f"its kernel is {layer.kernel_size}: shifts stand for odd squares from 3 x 3 to 9 x 9"
    if layer.stride[0] != layer.stride[1]:
        return f"its stride is {layer.stride}: shifts stand for equal ones"
    same = layer.padding == "same" or layer.padding == (kernel // 2, kernel // 2)
    if not same or layer.dilation != (1, 1) or layer.padding_mode != "zeros":
        return f"shifts stand for a padding of {kernel // 2} zeros and no dilation"
    return ""


def taken_apart(weight: Tensor, width: int, places: Literal["best", "equal"]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """A weight (K, C, k, k) as (K, M), (M, C) and the number of channels at each place, M the width at most."""
    taps = weight.flatten(2).permute(2, 0, 1)
    u, s, v = torch.linalg.svd(taps, full_matrices=False)
    count, rank = s.shape
    if places == "best":
        chosen = s.flatten().argsort(descending=True, stable=True)[:width] // rank
        splits = torch.bincount(chosen, minlength=count)
    else:
        splits = torch.full((count,), width // count)
        splits[count // 2] += width % count
        splits = splits.clamp(max=rank)
    kept = [(p, r) for p, many in enumerate(splits.tolist()) for r in range(many)]
    left = torch.stack([u[p, :, r] * s[p, r].sqrt() for p, r in kept], 1)
    right = torch.stack([v[p, r] * s[p, r].sqrt() for p, r in kept])
    return left, right, tuple(splits.tolist())
