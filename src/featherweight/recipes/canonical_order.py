"""Hidden units in an order that costs a coder fewer bytes: units that are alike stand beside each other.

A network computes the same in any order of its hidden units, and an adaptive coder foretells a weight from those beside
and above it. So the order is taken in which neighbours are most alike: with `f(w) = sign(w) sqrt(|w|)` of all weights
that make or read a unit, each tensor in units of its root mean square, the sum of `|f(u) - f(v)|` over units u and v
that follow one another is made small (a shortest path: nearest neighbours, then parts turned round and single units
moved, for as long as either helps). That the order of hidden units is free is of Sourya Basu, Lav R. Varshney,
"Universal Source Coding of Deep Neural Networks", DCC 2017, arXiv:1804.02800; `universal_source_coding` is what that
paper does with it.

Departs from the paper: which order is best for a coder that learns from neighbours is our own; the paper's coder needs
a sorted one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featherweight.allowed import Whole
from featherweight.catalogue import recipe
from featherweight.coding.container import bare_bytes
from featherweight.coding.packing import pack_tensor
from featherweight.core.channels import Channels, channel_groups
from featherweight.core.forms import bake, codes_of
from featherweight.core.ledger import note
from featherweight.core.reorder import Exchange, chosen, exchanges, reorder
from featherweight.core.surgery import WEIGHTED, WhereWeighted
from featherweight.core.task import Task
from featherweight.core.trace import weight_tensors
from featherweight.errors import CompressionError

Floats = NDArray[np.float64]
LEAST = 1e-9  # by how much a path has to become shorter


@recipe(
    paper="Basu and Varshney, DCC 2017, arXiv:1804.02800",
    family="code",
    coder="context_mixing",
    small={"tries": 2},
)
def canonical_order(model: nn.Module, task: Task, *, tries: Whole = 0, where: WhereWeighted = None) -> nn.Module:
    """Puts hidden units that are alike beside each other; the network computes what it did, in fewer bytes.

    Run it after pruning and quantization to one grid, but before `trellis`: its paths follow the order of weights.

    Args:
        tries: further orders to try, each one unit or some of a layer moved at random, and kept unless the bare file
            grows: worth it where each byte counts and a file is written fast.
        where: whose units; those of all linear and convolution layers when left out.

    Raises:
        BadOption: no units may trade places.
        TraceError: the network cannot be traced.
        CompressionError: the file would grow, or all units are in this order as they are.
    """
    before = copy.deepcopy(bake(model))
    channels = channel_groups(model, task.inputs())
    found = chosen(exchanges(model, channels), model, where)
    for one in found:
        units = likeness(model, channels, one)
        distance = torch.cdist(units, units, p=1).numpy()
        reorder(model, channels, one.members, torch.from_numpy(shortest(distance, int(units.abs().sum(1).argmax()))))
    old, new = written(before), written(model)
    if new > old:
        raise CompressionError(f"the file would grow ({old} -> {new} bytes): run canonical_order before quantization")
    note(f"weights on grids: {old} -> {new} bytes" if old else "no weight is on a grid yet: what quantizes them gains")
    if tries:
        first, last = climb(model, channels, found, tries)
        note(f"{tries} further orders were tried: {first} -> {last} bytes as a bare file")
    return model


def climb(model: nn.Module, channels: Channels, found: Sequence[Exchange], tries: int) -> tuple[int, int]:
    """Random changes of the order, each kept unless the bare file grows; its bytes before and after."""
    first = last = bare_bytes(model)
    for _ in range(tries):
        one = found[int(torch.randint(len(found), ()))]
        order = changed(len(one.members))
        reorder(model, channels, one.members, order)
        size = bare_bytes(model)
        if size > last:
            reorder(model, channels, one.members, order.argsort())
        last = min(size, last)
    return first, last


def changed(count: int) -> Tensor:
    """An order of so many units in which two have changed places, one has moved, or some stand the other way round."""
    order = list(range(count))
    i, j = torch.randperm(count)[:2].tolist()
    kind = int(torch.randint(3, ()))
    if kind == 0:
        order[i], order[j] = order[j], order[i]
    elif kind == 1:
        order.insert(j, order.pop(i))
    else:
        part = slice(min(i, j), max(i, j) + 1)
        order[part] = order[part][::-1]
    return torch.tensor(order)


def written(model: nn.Module) -> int:
    """The bytes of all weights that are on a grid."""
    found = 0
    for module in model.modules():
        if isinstance(module, WEIGHTED):
            codes, weight = codes_of(module), module.get_parameter("weight")
            if codes is not None or 4 * len(weight.unique()) <= weight.numel():
                found += len(pack_tensor(weight, codes, coder="context_mixing"))
    return found


def likeness(model: nn.Module, channels: Channels, one: Exchange) -> Tensor:
    """The roots, signed, of all weights that make or read each unit, (units, numbers), float64."""
    parts, weights = [], weight_tensors(model)
    for (name, dim), ids in channels.axes.items():
        if weights[name].dim() > 1 and weights[name].is_floating_point() and torch.isin(ids, one.members).any():
            weight = weights[name].detach().to("cpu", torch.float64).movedim(dim, 0).flatten(1)
            size = weight.square().mean().sqrt().clamp_min(1e-30)
            places = torch.stack([(ids == c).nonzero().flatten() for c in one.members.tolist()])
            parts.append((weight.sign() * (weight.abs() / size).sqrt())[places].flatten(1))
    return torch.cat(parts, 1)


def shortest(distance: Floats, start: int) -> NDArray[np.int64]:
    """A short path through all points, from their distances; not the shortest of all.

    >>> points = np.array([[0.0], [5.0], [1.0], [4.0]])
    >>> shortest(np.abs(points - points.T), 0).tolist()
    [0, 2, 3, 1]
    """
    count = len(distance)
    closed = np.zeros((count + 1, count + 1))  # a point that is near to all others makes a path of a tour
    closed[:count, :count] = distance
    tour = np.array([count, *nearest(distance, start)])
    for _ in range(count):
        tour, turned = turn_parts(closed, tour)
        tour, moved = move_points(closed, tour)
        if not (turned or moved):
            break
    return np.roll(tour, -int(np.flatnonzero(tour == count)[0]))[1:]


def nearest(distance: Floats, start: int) -> list[int]:
    """A path that goes on to the nearest point that is left."""
    path, apart = [start], distance.astype(np.float64)
    for _ in range(len(distance) - 1):
        apart[:, path[-1]] = np.inf
        path.append(int(apart[path[-1]].argmin()))
    return path


def turn_parts(distance: Floats, tour: NDArray[np.int64]) -> tuple[NDArray[np.int64], bool]:
    """Turns the part behind each point round whose turning makes the tour shortest, if any does."""
    tour, better = tour.copy(), False
    for i in range(len(tour) - 1):
        ends = np.arange(i + 1, len(tour))
        behind = tour[(ends + 1) % len(tour)]
        change = distance[tour[i], tour[ends]] + distance[tour[i + 1], behind]
        change = change - distance[tour[i], tour[i + 1]] - distance[tour[ends], behind]
        best = int(change.argmin())
        if change[best] < -LEAST:
            tour[i + 1 : ends[best] + 1] = tour[i + 1 : ends[best] + 1][::-1].copy()
            better = True
    return tour, better


def move_points(distance: Floats, tour: NDArray[np.int64]) -> tuple[NDArray[np.int64], bool]:
    """Moves each point to where it lengthens the tour least, if that is elsewhere."""
    better = False
    for point in tour.tolist():
        rest = np.roll(tour, -int(np.flatnonzero(tour == point)[0]))[1:]  # from the one behind to the one before
        behind = np.roll(rest, -1)
        change = distance[rest, point] + distance[point, behind] - distance[rest, behind]
        best = int(change.argmin())
        if change[best] < change[-1] - LEAST:  # the last gap is where it stands
            tour, better = np.insert(rest, best + 1, point), True
    return tour, better
