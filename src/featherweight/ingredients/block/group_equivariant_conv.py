"""Group equivariant convolutions: a filter looks in four directions, or eight with mirrors, for one set of weights.

Source: Cohen and Welling, Group Equivariant Convolutional Networks, ICML 2016, arXiv:1602.07576. A first layer lifts
images to functions on the group G (p4: turns by 90 degrees; p4m: mirror images as well), further ones take such
functions to such functions:

    [f * psi](x, r) = sum_{y, i} f_i(y) psi_i(r^-1 (y - x))
    [f * psi](x, r) = sum_{y, i, s} f_i(y, s) psi_i(r^-1 (y - x), r^-1 s)

Turning the input turns every map and exchanges those of the group: output r at T_u x is output u^-1 r at x. The maps
of C planar channels are those of C / |G| functions, so a layer between functions has 1 / |G| of the parameters of the
planar one that it replaces, and as many multiplications. A function has one bias, for all of its maps.

Where whole networks are rewritten, a batch norm over functions has one scale and one set of statistics for all maps of
a function, and a linear layer behind them reads their mean (or maximum) over the group and the places that are left:
then the scores are the same however the image is turned. That is exact where each convolution and pooling of a stride s
ends with its last window at the edge, (size + 2 padding - kernel) % s = 0, which an even size with a stride of 2 and a
kernel of 3 does not; and for all other layers that treat channels and directions alike, as rectifiers do.

Departs from the paper: filters and biases start from those of the trained planar network, as the nearest equivariant
ones (the mean over the group of what each makes of its map, undone); channels are grouped as they stand; kernels of
even size turn about their middle; the pooling over the group stands in front of each linear layer, with a mean by
default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featherweight.catalogue import ingredient
from featherweight.core.channels import Channels, channel_groups
from featherweight.core.ledger import note, skip
from featherweight.core.rotations import ORDERS
from featherweight.core.structured import from_dense
from featherweight.core.surgery import altered, swap

Lattice = Literal["p4", "p4m"]
Replaced = Mapping[str, nn.Module]


def around(
    model: nn.Module, inputs: Any, *, group: Lattice = "p4", pool: Literal["mean", "max"] = "mean", **others: Any
) -> Callable[[Replaced], None]:
    """What makes the rest of a network fit its new convolutions, given these by path, in place."""
    channels, order = channel_groups(model, inputs), ORDERS[group]

    def finish(replaced: Replaced) -> None:
        reads = functions(channels, replaced)
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.BatchNorm2d) and reads(channels.axes.get((f"{path}.weight", 0))):
                share_norm(model, path, module, order)
            elif isinstance(module, nn.Linear) and reads(channels.inputs.get(path)):
                pool_before(model, path, module, channels, replaced, order, pool)

    return finish


@ingredient(
    "block",
    kind="block",
    family="distill",
    paper="Cohen and Welling, ICML 2016, arXiv:1602.07576",
    around=around,
    first=True,
)
def group_equivariant_conv(
    layer: nn.Conv2d, *, group: Lattice = "p4", pool: Literal["mean", "max"] = "mean", lifting: bool | None = None
) -> nn.Module | str:
    """The equivariant convolution nearest to a planar one, or why there is none.

    Channel c |G| + g of its output is the map of function c at the element g = turns + 4 mirrors.

    Args:
        group: "p4" (four turns) or "p4m" (and their mirror images).
        pool: how a linear layer behind the functions sees them, "mean" or "max" over group and places.
        lifting: whether its inputs are images; by default, where their number is no multiple of |G|.
    """
    order, k = ORDERS[group], layer.kernel_size[0]
    lifting = bool(layer.in_channels % order) if lifting is None else lifting
    if layer.groups > 1:
        return f"it has groups={layer.groups}: choose networks of ordinary convolutions"
    if layer.out_channels % order or (not lifting and layer.in_channels % order):
        return (
            f"{layer.in_channels} inputs and {layer.out_channels} outputs are no multiples of {order}, as {group} needs"
        )
    squares = (layer.kernel_size, layer.stride, layer.dilation)
    if any(a != b for a, b in squares) or (isinstance(layer.padding, tuple) and len({*layer.padding}) > 1):
        return "its kernel, stride, dilation or padding is not the same in both directions"
    return from_dense(layer, ("rotated", order, k, int(lifting)))


def functions(channels: Channels, replaced: Replaced) -> Callable[[Tensor | None], bool]:
    """Whether a vector of channels is made of outputs of new convolutions alone."""
    known = torch.zeros(channels.count + 1, dtype=torch.bool)
    for path in replaced:
        known[channels.outputs[path]] = True
    known[-1] = False
    return lambda ids: ids is not None and bool(known[ids].all())


@torch.no_grad()
def share_norm(model: nn.Module, path: str, norm: nn.BatchNorm2d, order: int) -> None:
    """Gives all maps of a function one scale and one set of statistics, in place: means of those that they had."""
    if reason := altered(norm):
        skip(path, f"its maps of a function stay apart, so turned images have other scores: {reason}")
        return
    shared = nn.BatchNorm3d(norm.num_features // order, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name, tensor in norm.state_dict().items():
        value = tensor.unflatten(0, (-1, order)).mean(1) if tensor.dim() else tensor
        shared.state_dict()[name].copy_(value)
    parts = nn.Unflatten(1, (shared.num_features, order)), shared, nn.Flatten(1, 2)
    device = next(model.parameters())
    swap(model, path, nn.Sequential(*parts).to(device))


@torch.no_grad()
def pool_before(
    model: nn.Module,
    path: str,
    layer: nn.Linear,
    channels: Channels,
    replaced: Replaced,
    order: int,
    pool: Literal["mean", "max"],
) -> None:
    """Puts a pooling over the group, and the places that are left, in front of a linear layer, in place."""
    ids = channels.inputs[path]
    each = len(ids) // len(ids.unique())
    if reason := altered(layer) or (
        "" if torch.equal(ids, ids[::each].repeat_interleave(each)) else "places come first"
    ):
        skip(path, f"nothing is pooled before it, so turned images have other scores: {reason}")
        return
    size = len(ids) // each // order
    new = nn.Linear(size, layer.out_features, layer.bias is not None).to(layer.weight)
    rows = layer.weight.unflatten(1, (size, -1))
    new.weight.copy_(rows.sum(2))
    if layer.bias is not None:
        new.bias.copy_(layer.bias)
    over: nn.Module = nn.AdaptiveAvgPool1d(1) if pool == "mean" else nn.AdaptiveMaxPool1d(1)
    swap(model, path, nn.Sequential(nn.Unflatten(1, (size, order * each)), over, nn.Flatten(1), new))
    note(f"{path} reads the {pool} of {order * each} values for each of {size} functions")
