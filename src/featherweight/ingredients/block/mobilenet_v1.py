"""Depthwise separable convolutions: one kernel or a few for each input channel, then a 1 x 1 over all of them.

Source: Howard, Zhu, Chen, Kalenichenko, Wang, Weyand, Andreetto and Adam, MobileNets: Efficient Convolutional Neural
Networks for Mobile Vision Applications, 2017, arXiv:1704.04861, eqs. 3 to 5. With m kernels a channel a layer C -> K
has C m k^2 + C m K parameters, 1 / K + 1 / k^2 of what it had for m = 1, and as large a part of its multiplications.

Departs from the paper: it takes the place of convolutions of a trained network, from whose weights it may start (for
each input channel the m largest singular values of the matrix of K x k^2, exact for m = min(K, k^2) without anything
between the two); the batch norm and rectifier behind the 1 x 1 are those that the network has; several kernels a
channel; the multipliers of width and resolution are those of the network, not of the block.
"""

from __future__ import annotations

from torch import nn

from featherweight.allowed import Count
from featherweight.catalogue import ingredient
from featherweight.core.blocks import Between, Start, in_a_row
from featherweight.core.lowrank import grouped


@ingredient("block", kind="block", family="architecture", paper="Howard et al., 2017, arXiv:1704.04861")
def mobilenet_v1(
    layer: nn.Conv2d, *, multiplier: Count = 1, start: Start = "factors", between: Between = "norm"
) -> nn.Module | str:
    """A depthwise convolution and a 1 x 1 in the place of a convolution, or why they cannot stand there.

    The depthwise one has the layer's stride, padding and dilation, the 1 x 1 its bias.

    Args:
        multiplier: m, kernels for each input channel.
        start: "factors" takes the layer's weight apart; "random" draws new weights.
        between: "norm" for a batch norm and a rectifier between the two, as in the paper; "linear" for nothing.
    """
    if layer.groups > 1:
        return f"it has groups={layer.groups} already"
    parts = grouped(layer.weight.detach().double(), layer.in_channels, multiplier)
    return in_a_row(layer, parts, spatial=0, groups=layer.in_channels, start=start, between=between)
