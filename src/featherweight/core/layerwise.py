"""Which layers read the channels of a group, what each channel adds to what they compute, and what that leaves to do.

"The input channels of a layer" of the papers are the output channels of the layers before it: channels that residual
sums or concatenations couple live and die together, so their groups are taken one by one, from the front of the network
to its back, and what is lost is summed over all layers that read the group.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from featherweight.core.channels import Channels, channel_groups, remove_channels, zero_channels
from featherweight.core.fit import Optimizers
from featherweight.core.forms import bake, mask_of, mask_zeros, masked_names
from featherweight.core.labels import components
from featherweight.core.ledger import note, skip
from featherweight.core.reconstruct import Moments, augmented, layer_rows, no_matrix, put, refusal, solved
from featherweight.core.task import Batch, Task, device_of, eval_mode, to_device
from featherweight.core.widths import NO_CHANNELS, check_some, rounded
from featherweight.errors import BadOption

Refit = Literal["none", "scalar", "full"]


@final
@dataclass(frozen=True)
class Stage:
    """Channels of one group that may go, and the layers that read them, in the order in which they run.

    `readers` gives for every column of a layer's weight (and its bias) the place of its channel in `members`, or -1.
    """

    name: str
    members: Tensor
    readers: dict[str, Tensor]


def stages(model: nn.Module, channels: Channels, task: Task, *, sums: bool = True) -> list[Stage]:
    """The groups of channels that least squares can work on, ordered by the first layer that reads each.

    Without `sums` also those that layers read of which the sums would not fit into memory.

    A channel stays, and that is said, if no linear layer or convolution reads it, if one that does cannot be
    reconstructed (groups, weights that are shared, several calls), or if a norm takes its statistics over it.
    """
    order = called(model, task)
    columns = {path: _columns(model, path, ids) for path, ids in channels.inputs.items()}
    refused = _refused(model, channels, order, sums)
    found = []
    for name, group in _groups(channels):
        for why in dict.fromkeys(refused[c] for c in group if c in refused):
            skip(name, why)
        members = torch.tensor([c for c in group if c not in refused], dtype=torch.long)
        place = torch.full((channels.count + 1,), -1)  # the last entry is for -1
        place[members] = torch.arange(len(members))
        reading = [p for p in order if p in columns and not _passes(channels, p)]
        readers = {path: place[columns[path]] for path in reading if torch.isin(columns[path], members).any()}
        if readers:
            found.append(Stage(name, members, readers))
    return sorted(found, key=lambda stage: order.index(next(iter(stage.readers))))


def _groups(channels: Channels) -> list[tuple[str, list[int]]]:
    """Channels that the same layers make, with the first of these; a norm over a concatenation couples nothing."""
    makers = {path: ids[ids >= 0] for path, ids in channels.outputs.items() if not _passes(channels, path)}
    edges = [torch.stack([ids[:-1], ids[1:]]) for ids in makers.values()]
    joined = torch.cat([*edges, torch.empty(2, 0, dtype=torch.long)], 1)
    part = components(joined[0], joined[1], channels.count)
    found: dict[int, tuple[str, list[int]]] = {}
    for path, ids in makers.items():
        for number in part[ids].unique().tolist():
            found.setdefault(number, (path, (part == number).nonzero().flatten().tolist()))
    return list(found.values())


def called(model: nn.Module, task: Task) -> list[str]:
    """The layers that a forward pass calls, in order; once for every call."""
    seen: list[str] = []
    handles = [m.register_forward_hook(lambda *_, path=p: seen.append(path)) for p, m in model.named_modules()]
    try:
        args, kwargs = to_device(task.inputs(), device_of(model))
        with eval_mode(model):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _passes(channels: Channels, path: str) -> bool:
    """Whether channels pass through a layer one by one: a norm, slopes, a depthwise convolution."""
    mixing = [name for name, dim in channels.axes if dim > 0] + list(channels.blocks)
    return not any(name.rpartition(".")[0] == path or name == path for name in mixing)


def _columns(model: nn.Module, path: str, ids: Tensor) -> Tensor:
    """The channel of every column of a layer's augmented weight: one a kernel's place, none for the bias."""
    weight = getattr(dict(model.named_modules()).get(path), "weight", None)
    each = weight[0].numel() // len(ids) if isinstance(weight, Tensor) else 1
    return torch.cat([ids.repeat_interleave(max(1, each)), torch.tensor([-1])])


def _refused(model: nn.Module, channels: Channels, order: list[str], sums: bool) -> dict[int, str]:
    """The channels that stay, and why."""
    refused: dict[int, str] = {}
    modules = dict(model.named_modules())
    read = torch.zeros(channels.count + 1, dtype=torch.bool)
    for path, ids in channels.inputs.items():
        if _passes(channels, path):
            continue
        why = unfit(model, path, order, sums=sums) if path in modules else "a second weight of its layer"
        read[ids] = True
        if why:
            refused |= dict.fromkeys(ids[ids >= 0].tolist(), f"its channels are read by {path}, {why}")
    for path, ids in channels.outputs.items():
        if isinstance(modules.get(path), nn.RNNBase):
            refused |= dict.fromkeys(ids[ids >= 0].tolist(), "a recurrent layer reads its own outputs")
    for ids, _ in channels.norms.values():
        refused |= dict.fromkeys(ids[ids >= 0].tolist(), "a norm takes its statistics over its channels")
    unread = (~read[:-1]).nonzero().flatten().tolist()
    return dict.fromkeys(unread, "no linear layer or convolution reads its channels") | refused


def unfit(model: nn.Module, path: str, order: list[str], *, sums: bool = True) -> str:
    """Why a layer cannot be repaired by itself, given the layers that a forward pass calls; empty if it can."""
    layer = model.get_submodule(path)
    if why := refusal(layer) if sums else no_matrix(layer):
        return why
    if order.count(path) != 1:
        return f"a layer that is called {order.count(path)} times, not once"
    holders = [m for m in model.modules() if m._parameters.get("weight") is layer.weight]
    return "a layer that shares its weight with another" if len(holders) > 1 else ""


@final
@dataclass(frozen=True)
class Contributions:
    """What the channels of a stage add to the layers that read them: the error of every choice of channels.

    Channel c adds `z_c` (its inputs times its weights) to a target t, the outputs that are wanted less what is not of
    the stage (bias, other inputs). Held are the sums `gram` of z_i z_j (m, m), `target` of z_i t (m,), `energy` of t t;
    those of several layers add up, each divided by the variance of its outputs, so that all errors are relative.
    `sizes` (m,) are the squared norms of the channels' weights, of all layers.
    """

    gram: Tensor
    target: Tensor
    energy: float
    sizes: Tensor

    @staticmethod
    def of(moments: Moments, weight: Tensor, place: Tensor, count: int) -> Contributions:
        """Of one layer: its sums, its augmented weight, the place of every column, the number of members."""
        where = torch.where(place < 0, count, place)
        products = (weight.mT @ weight).mul_(moments.xx)
        rows = products.new_zeros(count + 1, len(where)).index_add_(0, where, products)
        gram = rows.new_zeros(count + 1, count + 1).index_add_(1, where, rows)
        wanted = gram.new_zeros(count + 1).index_add_(0, where, (weight.mT * moments.xy).sum(1))
        energy = float(moments.yy.sum() - 2 * wanted[-1] + gram[-1, -1])
        scale = moments.n * max(float(moments.energy.sum()), 1e-30)
        sizes = gram.new_zeros(count + 1).index_add_(0, where, weight.square().sum(0))[:-1]
        return Contributions(gram[:-1, :-1] / scale, (wanted - gram[:, -1])[:-1] / scale, energy / scale, sizes)

    def __add__(self, other: Contributions) -> Contributions:
        gram, target, sizes = self.gram + other.gram, self.target + other.target, self.sizes + other.sizes
        return Contributions(gram, target, self.energy + other.energy, sizes)

    def error(self, scale: Tensor) -> float:
        """The error when channel c is scaled by `scale[c]`: ones and zeros for a choice of channels."""
        scale = scale.double()
        return float(self.energy - 2 * scale @ self.target + scale @ self.gram @ scale)

    def scales(self, kept: Tensor, ridge: float) -> Tensor:
        """The best scale of every kept channel (a boolean choice), near one; zero for the others."""
        chosen, ones = self.gram[kept][:, kept], kept.double()
        chosen.diagonal().add_(ridge * float(self.gram.diagonal().mean()))
        ones[kept] += solved(chosen, (self.target - self.gram @ ones)[kept][None])[0]
        return ones


Choose = Callable[[Contributions, int], Tensor]
"""`(contributions, count) -> places of the channels that go`, the most expendable first."""


def prune_layerwise(
    model: nn.Module,
    task: Task,
    choose: Choose,
    *,
    prune_ratio: float,
    refit: Refit,
    ridge: float,
    positions: int,
    calibration_batches: int,
    round_to: int,
    epochs: float,
    finetune: float,
    lr: float,
    optimizer: Optimizers,
) -> nn.Module:
    """Chooses channels stage by stage, repairs the layers that read them, removes all at the end, fine-tunes.

    Until the end the channels are zero, which is the same to every layer that reads them, so the network is traced
    once. Targets are the outputs of the network as it was given (after a fine-tuning in between: as it was then).

    Raises:
        BadOption: there is no channel that least squares could make up for.
        CompressionError: no channel could be removed.
    """
    masked, keeps = masked_names(model), kept_by_masks(model)
    original = copy.deepcopy(model)
    channels = channel_groups(bake(model), task.inputs())
    gone = torch.empty(0, dtype=torch.long)

    def hold(progress: float = 1.0) -> None:
        keep_zero(model, channels, gone, keeps)

    found_stages = stages(model, channels, task)
    if not found_stages:
        raise BadOption(NO_CHANNELS)
    for stage in found_stages:
        held = Sums(model, original, task, positions, calibration_batches)
        found = contributions(model, stage, held)
        wanted = choose(found, int(prune_ratio * len(stage.members) + 1e-9))
        doomed = rounded(channels, stage.members[wanted], round_to)
        if not len(doomed):
            continue
        gone = torch.cat([gone, doomed])
        hold()
        repair(model, stage, ~torch.isin(stage.members, doomed), held, refit, ridge, keeps)
        hold()  # a layer may make the channels that it reads
        note(f"{stage.name}: {len(doomed)} of {len(stage.members)} channels removed")
        if epochs:
            task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, after_step=hold, label=stage.name)
            hold()
            original = copy.deepcopy(model)
    check_some(len(gone), channels, round_to)
    remove_channels(model, gone, channels=channels)
    mask_zeros(model, masked)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def kept_by_masks(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """What earlier masks keep, by layer and tensor."""
    found = {(p, name): mask_of(model.get_submodule(p), name) for p, name in masked_names(model)}
    return {key: keep.clone() for key, keep in found.items() if keep is not None}


def keep_zero(model: nn.Module, channels: Channels, gone: Tensor, keeps: Mapping[tuple[str, str], Tensor]) -> None:
    """Zeros, in place, the channels that are gone and what earlier masks do not keep."""
    zero_channels(model, gone, channels=channels)
    for (path, name), keep in keeps.items():
        getattr(model.get_submodule(path), name).data.mul_(keep)


@final
@dataclass(frozen=True)
class Sums:
    """Where the sums of a layer come from."""

    model: nn.Module
    original: nn.Module
    task: Task
    positions: int | None
    batches: int

    def of(self, path: str) -> Moments:
        """The sums of a layer: inputs of the network as it is, outputs of the original."""
        data: Iterable[Batch] = islice(self.task.calibrating(), self.batches)
        rows = layer_rows(self.model, path, self.task, data, positions=self.positions, original=self.original)
        return Moments.of(rows)


def contributions(model: nn.Module, stage: Stage, sums: Sums) -> Contributions:
    """What the channels of a stage add, over all layers that read them."""
    found: Contributions | None = None
    for path, place in stage.readers.items():
        layer = model.get_submodule(path)
        one = Contributions.of(sums.of(path), augmented(layer), place, len(stage.members))
        found = one if found is None else found + one
    assert found is not None  # a stage has readers
    return found


def repair(
    model: nn.Module,
    stage: Stage,
    kept: Tensor,
    sums: Sums,
    refit: Refit,
    ridge: float,
    keeps: Mapping[tuple[str, str], Any] | None = None,
) -> None:
    """Fits the layers that read a stage to what they put out before, front to back, in place.

    Args:
        kept: which members stay (m,).
        refit: "full" moves every weight on a kept channel, and the bias; "scalar" scales each kept channel; "none".
        ridge: pulls towards the weights that are there, as a share of the mean square of the inputs.
        keeps: masks that the new weights leave at zero, by layer and tensor.
    """
    for path, place in stage.readers.items() if refit != "none" else ():
        layer, moments = model.get_submodule(path), sums.of(path)
        weight = augmented(layer)
        if refit == "scalar":
            found = Contributions.of(moments, weight, place, len(stage.members))
            put(layer, weight * torch.cat([found.scales(kept, ridge), torch.ones(1)])[place])
            continue
        free = torch.cat([kept, torch.tensor([True])])[place]  # what is no member may move too,
        free[:-1] &= (place[:-1] >= 0) | (weight[:, :-1] != 0).any(0)  # except what is gone already
        free[-1] = layer.bias is not None
        free = free.repeat(len(weight), 1)
        keep = (keeps or {}).get((path, "weight"))
        if keep is not None:
            free[:, :-1] &= keep.flatten(1).cpu()
        put(layer, moments.refit(weight, free, ridge))


def with_bias(keep: Tensor, bias: bool) -> Tensor:
    """What is free (outputs, columns + 1), given what is kept."""
    return torch.cat([keep, torch.full((len(keep), 1), bias)], 1)
