"""Cheap convolutions of Moonshine: grouped, bottlenecked or spread ones, each in the place of an ordinary one.

Source: Crowley, Gray and Storkey, Moonshine: Distilling with Cheap Convolutions, NeurIPS 2018, arXiv:1711.02613,
table 1. With C inputs, K outputs and a kernel of k x k, the parameters are

- `S`, the layer as it is: C K k^2
- `G(g)`, k x k in g groups C -> C, then 1 x 1: C^2 k^2 / g + C K
- `G(N)`, the same with a group for each channel: C k^2 + C K
- `B(b)`, 1 x 1 to K / b channels, k x k among them, 1 x 1 to K: C K / b + (K / b)^2 k^2 + K^2 / b
- `BG(b,g)`, the same with the k x k in g groups: C K / b + (K / b)^2 k^2 / g + K^2 / b
- `Conv2x2`, the four corners of a 3 x 3 alone: 4 C K

The authors' code calls blocks by the number of channels in a group (its G8B2 has K / b / 8 groups); here, as in the
paper, g is the number of groups.

Departs from the paper: blocks may start from the layer that they replace, and may have nothing between their parts;
ACDC and the depthwise convolution followed by one over channels, which the authors tried and left, are not here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from featherweight.catalogue import ingredient
from featherweight.core.blocks import Between, Start, convolution, fill, in_a_row
from featherweight.core.lowrank import decompose, grouped
from featherweight.errors import BadOption

N = "[1-9][0-9]*"
WORDS = rf"^((?P<s>S|Conv2x2)|G\((?P<g>N|{N})\)|B\((?P<b>{N})\)|BG\((?P<bb>{N}),(?P<bg>{N})\))$"
BlockName = Annotated[str, Field(pattern=WORDS, examples=["G(N)", "G(8)", "B(2)", "BG(2,4)", "Conv2x2", "S"])]
"""A block of this file, with numbers for the letters but N."""


@dataclass(frozen=True)
class Plan:
    """A block in numbers: a bottleneck (0: none), and groups (0: one for each channel) of its k x k convolution."""

    bottleneck: int
    groups: int
    corners: bool = False

    @staticmethod
    def of(word: str) -> Plan:
        """The block that a word names."""
        found = re.match(WORDS, word)
        if found is None:
            raise BadOption(f"block={word!r}: must be one such as G(N), G(8), B(2), BG(2,4), Conv2x2 or S")
        if found["s"]:
            return Plan(0, 1, corners=word == "Conv2x2")
        if found["g"]:
            return Plan(0, 0 if found["g"] == "N" else int(found["g"]))
        return Plan(int(found["b"] or found["bb"]), int(found["bg"] or 1))


@ingredient(
    "block", kind="block", family="architecture", paper="Crowley, Gray and Storkey, NeurIPS 2018, arXiv:1711.02613"
)
def moonshine_blocks(
    layer: nn.Conv2d, *, block: BlockName = "G(N)", start: Start = "factors", between: Between = "norm"
) -> nn.Module | str:
    """The cheap block in the place of a convolution, or why it cannot stand there.

    It has the layer's inputs, outputs and bias; its k x k convolution has the stride, padding and dilation.

    Args:
        block: which one; S leaves the layer alone.
        start: "factors" takes the layer's weight apart: groups by an SVD of each, bottlenecks by Tucker-2, a Conv2x2 by
            leaving out the middle; with between="linear" that is the layer itself where the block is wide enough.
            "random" draws new weights.
        between: "norm" for a batch norm and a rectifier between the parts, as in the paper; "linear" for nothing.
    """
    plan = Plan.of(block)
    if reason := misfit(layer, block, plan):
        return reason
    weight = layer.weight.detach().double()
    if plan.corners:
        return corners(layer, start)
    groups = plan.groups or layer.in_channels
    if plan.bottleneck:
        parts, here = bottleneck(weight, len(weight) // plan.bottleneck, groups), 1
    else:
        parts, here = list(grouped(weight, groups, weight.shape[1] // groups)), 0
    return in_a_row(layer, parts, spatial=here, groups=groups, start=start, between=between)


def misfit(layer: nn.Conv2d, block: str, plan: Plan) -> str:
    """Why a layer cannot become this block; empty if it can."""
    wide = layer.out_channels // plan.bottleneck if plan.bottleneck else layer.in_channels
    if block == "S":
        return "the block S is the layer as it is"
    if layer.groups > 1:
        return f"it has groups={layer.groups} already"
    if plan.corners:
        three = tuple(layer.kernel_size) == (3, 3) and tuple(layer.dilation) == (1, 1)
        return "" if three else "a Conv2x2 stands for a 3 x 3 convolution without dilation"
    if plan.bottleneck and layer.out_channels % plan.bottleneck:
        return f"its {layer.out_channels} outputs are no multiple of the bottleneck of {block}"
    if plan.groups and wide % plan.groups:
        return f"{wide} channels do not fall into the groups of {block}"
    return ""


def corners(layer: nn.Conv2d, start: Start) -> nn.Conv2d:
    """The four corners of a 3 x 3 convolution as one of 2 x 2, spread by a dilation of 2."""
    weight = layer.weight.detach()[:, :, ::2, ::2]
    new = convolution(layer, weight, 1, spatial=True, last=True)
    new.dilation = (2, 2)
    if start == "factors":
        fill(new, weight, layer.bias)
    return new


def bottleneck(weight: Tensor, width: int, groups: int = 1) -> list[Tensor]:
    """A weight (K, C, k, k) as 1 x 1 to `width` channels, k x k in groups, 1 x 1: Tucker-2, its core grouped.

    Where the width is more than the weight has channels, further ones are drawn at random and nothing reads them yet.
    """
    outputs, inputs, *kernel = weight.shape
    core, out, into = decompose(weight, min(width, outputs), min(width, inputs))
    whole = weight.new_zeros(width, width, *kernel)
    whole[: core.shape[0], : core.shape[1]] = core
    first = torch.randn(width, inputs).to(weight) * float(weight.std())
    first[: into.shape[1]] = into.T
    last = weight.new_zeros(outputs, width)
    last[:, : out.shape[1]] = out
    if groups > 1:
        whole, point = grouped(whole, groups, width // groups)
        last = last @ point.flatten(1)
    return [first[:, :, None, None], whole, last[:, :, None, None]]
