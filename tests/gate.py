"""What every architecture must pass: it is wired, loses three channels in ten, and still computes what masking does."""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from architectures import Architecture
from featherweight.core.channels import Channels, channel_groups, masked_outputs, remove_channels
from featherweight.core.double import Double
from featherweight.core.task import as_call
from featherweight.core.wired import Wired
from featherweight.core.wiring import wire
from removal import gap, randomise

OUTPUT = "output of the model"


@dataclass(frozen=True)
class Found:
    """A wired network, its channels, and how long both took in seconds."""

    wired: Wired
    inputs: Any
    channels: Channels
    wiring_seconds: float
    groups_seconds: float


def found(architecture: Architecture, seed: int = 0) -> Found:
    """Builds, wires and traces an architecture with random weights."""
    torch.manual_seed(seed)
    model, inputs = randomise(architecture.build().eval(), seed), architecture.inputs()
    start = time.perf_counter()
    wired = wire(model, inputs)
    middle = time.perf_counter()
    channels = channel_groups(wired, inputs)
    return Found(wired, inputs, channels, middle - start, time.perf_counter() - middle)


def prunable(channels: Channels) -> float:
    """The share of layer outputs that can be removed, of those that do not feed an output of the model."""
    inner = {p: ids for p, ids in channels.outputs.items() if channels.pinned.get(p) != OUTPUT}
    total = sum(len(ids) for ids in inner.values())
    return sum(int((ids >= 0).sum()) for ids in inner.values()) / total if total else math.nan


def pins(channels: Channels) -> dict[str, int]:
    """How many layers hold channels that stay, by the reason; outputs of the model aside."""
    return dict(Counter(reason for reason in channels.pinned.values() if reason != OUTPUT).most_common())


def doomed(channels: Channels, fraction: float = 0.3, seed: int = 0) -> Tensor:
    """A random part of the channels, as far as it can go."""
    order = torch.randperm(channels.count, generator=torch.Generator().manual_seed(seed))
    return channels.legal(order[: int(channels.count * fraction)])


def widened(one: Found) -> Found:
    """The same in double precision."""
    inputs = pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, one.inputs)
    return replace(
        one,
        wired=copy.deepcopy(one.wired).double(),
        inputs=inputs,
        channels=replace(one.channels, example_inputs=inputs),
    )


def removal_error(one: Found) -> float:
    """Removes three channels in ten, in place; how far that is from masking, relative to the largest output."""
    gone = doomed(one.channels)
    with torch.no_grad(), Double():
        expected = masked_outputs(one.wired, one.channels, gone)
        remove_channels(one.wired, gone, channels=one.channels)
        args, kwargs = as_call(one.inputs)
        return gap(pytree.tree_leaves(one.wired(*args, **kwargs)), expected)
