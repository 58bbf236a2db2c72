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
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from featherweight.catalogue import ingredient
from featherweight.core.lowrank import decompose, truncated
from featherweight.errors import BadOption

N = "[1-9][0-9]*"
WORDS = rf"^((?P<s>S|Conv2x2)|G\((?P<g>N|{N})\)|B\((?P<b>{N})\)|BG\((?P<bb>{N}),(?P<bg>{N})\))$"
BlockName = Annotated[str, Field(pattern=WORDS, examples=["G(N)", "G(8)", "B(2)", "BG(2,4)", "Conv2x2", "S"])]
"""A block of this file, with numbers for the letters but N."""
Between = Literal["norm", "linear"]
"""What stands between the parts of a block: a batch norm and a rectifier, or nothing."""
Start = Literal["factors", "random"]


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
        parts, here = [weight[:, :, ::2, ::2]], 0
    elif plan.bottleneck:
        parts, here = bottleneck(weight, len(weight) // plan.bottleneck, plan.groups), 1
    else:
        parts, here = list(grouped(weight, plan.groups or weight.shape[1])), 0
    convs = [convolution(layer, part, spatial=i == here, last=part is parts[-1]) for i, part in enumerate(parts)]
    if plan.corners:
        convs[0].dilation = (2, 2)
    for conv, part in zip(convs, parts, strict=True):
        if start == "factors":
            conv.weight.data.copy_(part)
    if start == "factors" and layer.bias is not None and convs[-1].bias is not None:
        convs[-1].bias.data.copy_(layer.bias)
    if len(convs) == 1:
        return convs[0]
    inner = [[conv, nn.BatchNorm2d(conv.out_channels).to(layer.weight), nn.ReLU()] for conv in convs[:-1]]
    steps = [step for one in inner for step in (one if between == "norm" else one[:1])]
    return nn.Sequential(*steps, convs[-1])


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


def convolution(layer: nn.Conv2d, weight: Tensor, *, spatial: bool, last: bool) -> nn.Conv2d:
    """A convolution with the shape of this weight; the `spatial` one has the layer's geometry, the `last` its bias."""
    names = ("stride", "padding", "dilation", "padding_mode") if spatial else ()
    geometry: dict[str, Any] = {name: getattr(layer, name) for name in names}
    out, into, height, width = weight.shape
    groups = out // into if spatial and not last else 1
    new = nn.Conv2d(
        into * groups, out, (height, width), groups=groups, bias=last and layer.bias is not None, **geometry
    )
    return new.to(layer.weight)


def grouped(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """A weight (K, C, k, k) as a grouped convolution (C, C / g, k, k) and a 1 x 1 (K, C, 1, 1), nearest in each group.

    The inputs of a group, as a matrix (K, n k^2), get the best approximation of rank n = C / g: exact where K <= n.

    >>> spatial, point = grouped(torch.ones(3, 4, 3, 3), 4)
    >>> tuple(spatial.shape), tuple(point.shape), round(float((point[:, 0, 0] * spatial[0, 0, 0, 0])[0]), 4)
    ((4, 1, 3, 3), (3, 4, 1, 1), 1.0)
    """
    outputs, inputs, *kernel = weight.shape
    each = inputs // groups
    spatial, point = weight.new_zeros(inputs, each, *kernel), weight.new_zeros(outputs, inputs)
    for i in range(groups):
        part = slice(i * each, (i + 1) * each)
        left, right = truncated(weight[:, part].flatten(1), each)
        found = slice(i * each, i * each + left.shape[1])  # fewer where there are fewer outputs
        point[:, found], spatial[found] = left, right.view(-1, each, *kernel)
    return spatial, point[:, :, None, None]


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
        whole, point = grouped(whole, groups)
        last = last @ point.flatten(1)
    return [first[:, :, None, None], whole, last[:, :, None, None]]
