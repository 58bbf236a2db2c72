"""Channels that are the same become one: what makes a channel, and what reads it, added up."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.core.channels import Channels
from featherweight.core.layerwise import Stage, stages
from featherweight.core.ledger import skip
from featherweight.core.task import Task, device_of, eval_mode, to_device
from featherweight.core.trace import weight_tensors


@final
@dataclass(frozen=True)
class Maker:
    """Entries of one tensor that make the channels of a stage: `index` (members, entries) along `dim`."""

    name: str
    dim: int
    index: Tensor

    def rows(self, model: nn.Module) -> Tensor:
        """What makes each channel, (members, numbers), a copy."""
        along = weight_tensors(model)[self.name].detach().movedim(self.dim, 0)
        return along[self.index.to(along.device)].flatten(1)

    def put(self, model: nn.Module, rows: Tensor) -> None:
        """Puts rows back."""
        along = weight_tensors(model)[self.name].detach().movedim(self.dim, 0)
        along[self.index.to(along.device)] = rows.to(along).view(*self.index.shape, *along.shape[1:])


def mergeable(model: nn.Module, channels: Channels, task: Task, *, scaled: bool = False) -> list[Stage]:
    """The stages of which channels that are made alike can become one without a change of any output.

    Tried on a copy, where all channels of a stage are made like the first (with `scaled`: each a multiple of it, as a
    ReLU lets it be): what fails stays, and that is said. So a layer that sees channels in another way (a product of
    them, another activation for some) is found, whatever it is.
    """
    found = []
    whole = stages(model, channels, task, sums=False)
    for stage in (kind for mixed in whole for kind in _kinds(mixed, channels)):
        scales = torch.linspace(1, 2 if scaled else 1, len(stage.members), dtype=torch.float64)
        if len(stage.members) > 1 and _merges(copy.deepcopy(model), stage, channels, task, scales):
            found.append(stage)
        else:
            skip(stage.name, "channels that are made alike" + (" but for a factor" if scaled else "")
                 + " cannot become one in this network")  # fmt: skip
    return found


def _kinds(stage: Stage, channels: Channels) -> list[Stage]:
    """The stage, split where channels appear in other tensors, or more often."""
    places: list[list[tuple[int, int]]] = [[] for _ in stage.members]
    for number, ids in enumerate(channels.axes.values()):
        counts = torch.bincount(ids[ids >= 0], minlength=channels.count)[stage.members]
        for member, count in enumerate(counts.tolist()):
            if count:
                places[member].append((number, count))
    kinds: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for member, where in enumerate(places):
        kinds.setdefault(tuple(where), []).append(member)
    found = []
    for members in kinds.values():
        renamed = torch.full((len(stage.members) + 1,), -1)  # the last entry is for -1
        renamed[members] = torch.arange(len(members))
        readers = {path: renamed[place] for path, place in stage.readers.items()}
        reading = {path: place for path, place in readers.items() if (place >= 0).any()}
        found.append(Stage(stage.name, stage.members[members], reading))
    return found


def makers(stage: Stage, channels: Channels) -> list[Maker]:
    """Everything that makes the channels of a stage: rows of weights, biases, what norms hold; not what reads them."""
    reading = {f"{path}.weight" for path in stage.readers}
    found = []
    for (name, dim), ids in channels.axes.items():
        if (name in reading and dim == 1) or not torch.isin(stage.members, ids).all():
            continue
        order = ids.argsort(stable=True)
        at = torch.searchsorted(ids[order], stage.members)
        entries = int((ids == stage.members[0]).sum())
        found.append(Maker(name, dim, order[at[:, None] + torch.arange(entries)]))
    return found


@torch.no_grad()
def merge(model: nn.Module, stage: Stage, gone: int, into: int, scale: float = 1.0) -> None:
    """Lets what reads a member (`gone`, its place in the stage) read another, `scale` times, in place."""
    for path, place in stage.readers.items():
        weight = model.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        columns = weight.view(len(weight), -1)
        source, target = ((place == member).nonzero().flatten().to(weight.device) for member in (gone, into))
        columns[:, target] += scale * columns[:, source]
        columns[:, source] = 0


def outgoing(model: nn.Module, stage: Stage) -> Tensor:
    """What reads each member, (members, numbers), float64."""
    found = []
    for path, place in stage.readers.items():
        weight = model.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        columns = weight.detach().flatten(1).mT.to("cpu", torch.float64)
        found.append(torch.stack([columns[place[:-1] == member].flatten() for member in range(len(stage.members))]))
    return torch.cat(found, 1)


@torch.no_grad()
def _merges(model: nn.Module, stage: Stage, channels: Channels, task: Task, scales: Tensor) -> bool:
    """Whether all members, made like the first times a scale, can become the first; the model is changed."""
    for maker in makers(stage, channels):
        rows = maker.rows(model)
        maker.put(model, rows[:1] * scales.to(rows)[:, None])
    args, kwargs = to_device(task.inputs(), device_of(model))
    with eval_mode(model):
        before = [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]
        for member in range(1, len(stage.members)):
            merge(model, stage, member, 0, float(scales[member]))
        after = [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]
    return all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max())) for a, b in zip(before, after, strict=True)
    )
