"""Maxout pruning: of the neurons that compete in a maxout unit, those that win least often go, one after the other."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.capture import observe
from featherweight.core.channels import Channels, channel_groups, remove_channels
from featherweight.core.fit import Optimizers
from featherweight.core.flow import Step, follow
from featherweight.core.forms import bake, mask_zeros, masked_names, own_modules
from featherweight.core.ledger import note, skip
from featherweight.core.reconstruct import Moments, augmented, layer_rows, put, refusal
from featherweight.core.surgery import WhereLinearOrConv2d, swap, targets
from featherweight.core.task import Task, as_call, eval_mode
from featherweight.errors import BadOption, CompressionError

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
POOLS = (nn.MaxPool1d, nn.MaxPool3d)


@recipe(
    paper="Moya Rueda et al., GCPR 2017, arXiv:1707.06838",
    family="prune",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"pieces": 2, "epochs": 1, "lr": 0.01},
)
def maxout_neuron(
    model: nn.Module,
    task: Task,
    *,
    pieces: Count = 4,
    keep: Count = 1,
    epochs: Amount = 5,
    lr: Positive = 0.01,
    optimizer: Optimizers = "sgd",
    calibration_batches: Count = 64,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Removes from every unit `h_j = max_i z_ji` the neuron that wins least often, retrains, and repeats until `keep`.

    Fernando Moya Rueda, Rene Grzeszick, Gernot A. Fink, "Neuron Pruning for Compressing Deep Networks using Maxout
    Architectures", GCPR 2017. The relevance of a neuron is the number of samples for which it is the maximum of its
    unit; the layer keeps its width, the next one its size. A maxout unit is a linear layer (or a 2d convolution) with a
    max-pooling over neighbouring outputs: `nn.MaxPool1d(k)` or, over channels, `nn.MaxPool3d((k, 1, 1))`.

    In a network without such units, hidden layers become maxout layers first: every `pieces` neighbouring neurons with
    their ReLUs become one unit, the layer behind them reads one value in place of `pieces` and is refitted to its
    outputs in the original network by least squares, and all is trained for `epochs`.

    Departs from the paper: it trains maxout networks from scratch, the conversion is ours and needs its training to
    recover; samples for which several neurons are the maximum count in equal parts for each, so that units that are all
    equal do not favour the first; also convolutions, where the network has no hidden linear layers or `where` says so
    (every place of a map is a sample); the learning rate of every stage falls along a cosine.

    Args:
        pieces: how many neurons become one unit, in a network without maxout; what is over is removed.
        keep: how many neurons every unit keeps; 1 leaves linear layers.
        epochs: training after the conversion, and again after every removal.
        lr: learning rate, falling to zero in every training.
        optimizer: as in `fit`.
        calibration_batches: batches on which wins are counted.
        where: which layers; when left out all maxout layers, without any the hidden linear layers, without those
            convolutions.

    Raises:
        BadOption: there are neither maxout layers nor hidden layers with a ReLU module of their own.
        TraceError: a network that must be converted cannot be traced.
        CompressionError: no unit has more than `keep` neurons.
    """
    masked = masked_names(model)
    bake(model)

    def train(label: str) -> None:
        mask_zeros(model, masked)
        task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label=label)
        bake(model)

    units = maxout_units(model, task, where)
    if not units:
        convert(model, task, pieces, where, {path for path, _ in masked}, calibration_batches)
        train("maxout")
        units = maxout_units(model, task, where)
    most = max(unit.pieces for unit in units)
    if most <= keep:
        raise CompressionError(f"no maxout unit has more than keep={keep} neurons: lower keep, or raise pieces")
    for left in range(most - 1, keep - 1, -1):
        now = [unit for unit in maxout_units(model, task, where) if unit.pieces > left]
        for unit, won in zip(now, wins(model, task, now, calibration_batches), strict=True):
            remove_least(model, unit, won)
        train(f"{left} neurons a unit")
    mask_zeros(model, masked)
    return model


@final
@dataclass(frozen=True)
class Unit:
    """A layer, the batch norm behind it (or ""), and the module that takes the maximum of `pieces` of its outputs."""

    layer: str
    norm: str
    act: str
    pieces: int


def maxout_units(model: nn.Module, task: Task, where: Any = None) -> list[Unit]:
    """The maxout layers of a model, in the order in which they are called."""
    found = chains(model, task, POOLS)
    if where is not None and found:
        chosen = targets(model, where)
        found = [unit for unit in found if unit.layer in chosen]
    return [unit for unit in found if unit.pieces > 1]


def chains(model: nn.Module, task: Task, acts: tuple[type[nn.Module], ...]) -> list[Unit]:
    """Layers whose outputs, behind a batch norm if any, only one such module reads; each is called once."""
    single = {path: m for path, m in own_modules(model) if path and not any(True for _ in m.children())}
    flow = follow(model, task.inputs(), {p: m for p, m in single.items() if not isinstance(m, nn.Identity)})
    readers: dict[int, list[Step]] = {}
    for step in flow.steps:
        for number in step.reads:
            readers.setdefault(number, []).append(step)
    calls = [step.layer for step in flow.steps]
    found = []
    for step in flow.steps:
        if not isinstance(single.get(step.layer or ""), nn.Linear | nn.Conv2d):
            continue
        path = [step, *_single_readers(step, readers, 2)]
        norm = path[1].layer if len(path) > 1 and isinstance(single.get(path[1].layer or ""), NORMS) else None
        last = path[2 if norm else 1] if len(path) > (2 if norm else 1) else None
        act = single.get(last.layer or "") if last else None
        if last and isinstance(act, acts) and all(calls.count(p) == 1 for p in (step.layer, norm, last.layer) if p):
            layer = single[step.layer or ""]
            found.append(Unit(step.layer or "", norm or "", last.layer or "", _pieces(layer, act)))
    return [unit for unit in found if unit.pieces]


def _single_readers(step: Step, readers: Mapping[int, list[Step]], depth: int) -> Iterator[Step]:
    """What alone reads a step's output, what alone reads that, and so on."""
    for _ in range(depth):
        following = readers.get(step.makes[0], [])
        if len(following) != 1:
            return
        step = following[0]
        yield step


def _pieces(layer: nn.Module, act: nn.Module) -> int:
    """Over how many neighbouring outputs a module takes the maximum; 1 for a ReLU, 0 for another pooling."""
    if isinstance(act, nn.ReLU):
        return 1
    pool = cast(nn.MaxPool1d | nn.MaxPool3d, act)
    kernel = pool.kernel_size if isinstance(pool.kernel_size, tuple) else (pool.kernel_size,)
    stride = pool.stride if isinstance(pool.stride, tuple) else (pool.stride,)
    plain = pool.padding in (0, (0,) * len(kernel)) and kernel == stride and not pool.ceil_mode
    over_channels = isinstance(layer, nn.Linear) or (len(kernel) == 3 and kernel[1:] == (1, 1))
    return (
        kernel[0] if plain and over_channels and isinstance(pool, nn.MaxPool3d) == isinstance(layer, nn.Conv2d) else 0
    )


def pool_of(layer: nn.Module, pieces: int) -> nn.Module:
    """The maximum over neighbouring outputs of a layer."""
    if pieces == 1:
        return nn.Identity()
    return nn.MaxPool1d(pieces) if isinstance(layer, nn.Linear) else nn.MaxPool3d((pieces, 1, 1))


def wins(model: nn.Module, task: Task, units: list[Unit], batches: int) -> list[Tensor]:
    """For how many samples (and places of a map) each neuron is the maximum of its unit, (units, pieces)."""
    counts: dict[str, Tensor] = {}
    by_act = {unit.act: unit for unit in units}

    def see(path: str, z: Tensor) -> None:
        unit = by_act[path]
        along = -1 if isinstance(model.get_submodule(unit.layer), nn.Linear) else 1
        competing = z.detach().unflatten(along, (-1, unit.pieces)).movedim(-1 if along == -1 else 2, -1)
        competing = competing.movedim(-2 if along == -1 else 1, 0).flatten(1, -2)  # (units, samples, pieces)
        best = (competing == competing.amax(-1, keepdim=True)).double()
        counts[path] = counts.get(path, 0) + (best / best.sum(-1, keepdim=True)).sum(1).cpu()

    observe(model, list(by_act), task, islice(task.calibrating(), batches), see, label="wins")
    return [counts[unit.act] for unit in units]


def remove_least(model: nn.Module, unit: Unit, won: Tensor) -> None:
    """Removes, in place, the neuron of every unit that won least often; the unit's width stays."""
    keep = torch.ones(won.shape, dtype=torch.bool).scatter(1, won.argmin(1, keepdim=True), False).flatten()
    for path in (unit.layer, unit.norm):
        if path:
            swap(model, path, with_outputs(model.get_submodule(path), keep))
    swap(model, unit.act, pool_of(model.get_submodule(unit.layer), unit.pieces - 1))
    lost = float(won.min(1).values.sum() / won.sum())
    note(f"{unit.layer}: {int(keep.sum())} of {len(keep)} neurons left, {lost:.1%} of the wins went")


def with_outputs(module: nn.Module, keep: Tensor) -> nn.Module:
    """A copy of a layer or batch norm with some of its outputs."""
    new, rows = copy.deepcopy(module), keep.nonzero().flatten()
    for name, p in list(new.named_parameters(recurse=False)):
        setattr(new, name, nn.Parameter(p.detach()[rows.to(p.device)], requires_grad=p.requires_grad))
    for name, buffer in list(new.named_buffers(recurse=False)):
        if buffer.dim():
            setattr(new, name, buffer[rows.to(buffer.device)])
    for name in ("out_features", "out_channels", "num_features"):
        if hasattr(new, name):
            setattr(new, name, len(rows))
    return new


# --- from ReLU to maxout ---------------------------------------------------------------------------------------------


def convert(model: nn.Module, task: Task, pieces: int, where: Any, masked: set[str], batches: int) -> None:
    """Joins every `pieces` neighbouring hidden neurons and their ReLUs to one maxout unit, layer after layer, in place.

    Raises:
        BadOption: no layer can be converted.
    """
    original, found = copy.deepcopy(model), chains(model, task, (nn.ReLU,))
    if where is not None:
        chosen = targets(model, where)
        found = [unit for unit in found if unit.layer in chosen]
    elif linear := [unit for unit in found if isinstance(model.get_submodule(unit.layer), nn.Linear)]:
        found = linear
    done = 0
    for unit in found:
        reason = _convert(model, task, unit, pieces, original, masked, batches)
        if reason:
            skip(unit.layer, f"it does not become a maxout layer: {reason}")
        done += not reason
    if not done:
        raise BadOption(
            "maxout_neuron needs maxout layers, or hidden linear layers or convolutions with an nn.ReLU of their own "
            "behind them, whose outputs nothing but layers reads: choose a method that masks weights, such as "
            "magnitude_iterative, or one that removes channels, such as pfec_l1"
        )
    note(f"{done} layers became maxout layers of {pieces} neurons a unit")


def _convert(
    model: nn.Module, task: Task, unit: Unit, pieces: int, original: nn.Module, masked: set[str], batches: int
) -> str:
    """Converts one layer, in place; returns why not, and leaves it, where that cannot be done."""
    channels = channel_groups(model, task.inputs())
    if unit.layer not in channels.outputs:
        return "its outputs are not known"
    if len(channels.outputs[unit.layer]) < 2 * pieces:
        return f"it has {len(channels.outputs[unit.layer])} neurons"
    if reason := _shared(model, channels, unit):
        return reason
    if over := len(channels.outputs[unit.layer]) % pieces:
        weakest = model.get_submodule(unit.layer).weight.flatten(1).norm(dim=1).argsort()[:over]  # type: ignore[operator]
        remove_channels(model, {unit.layer: weakest}, channels=channels)
        channels = channel_groups(model, task.inputs())
    old = {unit.act: model.get_submodule(unit.act)}
    swap(model, unit.act, pool_of(model.get_submodule(unit.layer), pieces))
    behind = _readers(channels, channels.outputs[unit.layer])
    free = {}
    for path in behind:
        old[path] = model.get_submodule(path)
        swap(model, path, joined(old[path], channels.inputs[path], channels.outputs[unit.layer], pieces))
        weight: Any = model.get_submodule(path).weight
        free[path] = (weight != 0 if path in masked else torch.ones_like(weight, dtype=torch.bool)).flatten(1).cpu()
    args, kwargs = as_call(task.inputs())
    try:
        with eval_mode(model):
            model(*args, **kwargs)
    except RuntimeError as error:  # the user's code counts on the old number of channels
        for path, module in old.items():
            swap(model, path, module)
        return f"the model's code does not follow ({str(error).splitlines()[0][:100]})"
    for path in behind:
        _refit(model, path, task, free[path], original, batches)
    return ""


def _shared(model: nn.Module, channels: Channels, unit: Unit) -> str:
    """Why the outputs of a layer cannot be joined; empty if only that layer, its norm and plain layers hold them."""
    ids = channels.outputs[unit.layer]
    if bool((ids < 0).any()) or len(ids.unique()) < len(ids):
        return "its outputs cannot be removed"
    behind = _readers(channels, ids)
    for (name, _), vector in channels.axes.items():
        path = name.rpartition(".")[0]
        if path not in (unit.layer, unit.norm, *behind) and torch.isin(vector, ids).any():
            return f"{path} works on its outputs too"
    for path in behind:
        layer = model.get_submodule(path)
        if not isinstance(layer, nn.Linear | nn.Conv2d) or getattr(layer, "groups", 1) != 1:
            return f"{path}, a {type(layer).__name__}, reads it"
    return "" if behind else "nothing reads it"


def _readers(channels: Channels, ids: Tensor) -> list[str]:
    return [path for path, vector in channels.inputs.items() if torch.isin(vector, ids).any()
            and not (path in channels.outputs and torch.equal(channels.outputs[path], vector))]  # fmt: skip


def joined(layer: nn.Module, inputs: Tensor, ids: Tensor, pieces: int) -> nn.Module:
    """A copy of a layer that reads one value in place of every `pieces` neighbouring channels; their weights add up.

    Args:
        inputs: the channel of each of the layer's inputs.
        ids: the channels that are joined, in order.
    """
    place = {channel: i for i, channel in enumerate(ids.tolist())}
    seen: dict[int, int] = {}
    columns: dict[tuple[int, int, bool], int] = {}
    target = []
    for i, channel in enumerate(inputs.tolist()):
        turn = seen[channel] = seen.get(channel, -1) + 1  # behind a flattening every place of a map has its own input
        key = (place[channel] // pieces, turn, True) if channel in place else (i, 0, False)
        target.append(columns.setdefault(key, len(columns)))
    new, weight = copy.deepcopy(layer), cast(Tensor, layer.weight).detach()
    summed = weight.new_zeros(len(weight), len(columns), *weight.shape[2:])
    summed.index_add_(1, torch.tensor(target, device=weight.device), weight)
    new.weight = nn.Parameter(summed)
    setattr(new, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(columns))
    return new


def _refit(model: nn.Module, path: str, task: Task, free: Tensor, original: nn.Module, batches: int) -> None:
    """Least squares of a layer to what it put out in the original network, masked weights left alone."""
    layer = model.get_submodule(path)
    if reason := refusal(layer):
        note(f"{path} was not refitted: {reason}")
        return
    moments = Moments.of(layer_rows(model, path, task, islice(task.calibrating(), batches), original=original))
    bias = torch.full((len(free), 1), isinstance(layer.bias, Tensor))
    put(layer, moments.refit(augmented(layer), torch.cat([free, bias], 1), 1e-4))
