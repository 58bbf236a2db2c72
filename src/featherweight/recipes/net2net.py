"""A trained network grows: wider and deeper, with the function that it has, and then learns on."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from featherweight.allowed import Amount, Positive
from featherweight.catalogue import recipe
from featherweight.core.channels import Channels, channel_groups
from featherweight.core.fit import Optimizers
from featherweight.core.fold import rectified
from featherweight.core.forms import ACTIVATIONS, activation_form, bake, mask_zeros, masked_names
from featherweight.core.ledger import note, skip
from featherweight.core.norms import undo_norms
from featherweight.core.surgery import WhereWeighted, swap, targets
from featherweight.core.task import Task
from featherweight.core.widening import again, widen_channels
from featherweight.errors import BadOption, CompressionError

GROWING: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def grows(options: Mapping[str, Any]) -> None:
    """Refuses a network that stays as it is."""
    if options["width"] == 1 and not options["depth"]:
        raise BadOption("width=1 and depth=0 leave the network as it is: raise one of them")


@recipe(
    paper="Chen, Goodfellow and Shlens, ICLR 2016, arXiv:1511.05641",
    family="distill",
    needs={"labels", "train"},
    small={"epochs": 1},
    rules=(grows,),
)
def net2net(
    model: nn.Module,
    task: Task,
    *,
    width: Annotated[float, Interval(ge=1, le=16)] = 1.5,
    depth: Annotated[int, Interval(ge=0, le=8)] = 1,
    noise: Amount = 0.01,
    kernel: Annotated[int, Ge(1)] = 3,
    epochs: Amount = 10,
    lr: Positive = 1e-4,
    optimizer: Optimizers = None,
    where: WhereWeighted = None,
) -> nn.Module:
    """Copies units of layers (Net2WiderNet), inserts layers that compute the identity (Net2DeeperNet), trains on.

    It makes a network larger, not smaller: the start of a student that turned out too small, or a wider network for
    other methods to prune.

    Wider: with g(j) = j for the old units and drawn at random for new ones, a layer becomes `U_i = W_i[g]`, its biases
    and batch norms alike, and the next one `U_{i+1} = W_{i+1}[:, g] / |{k: g(k) = g(j)}|`. Layers whose units go
    together (residual sums, depthwise convolutions) share one g; the groups of a grouped convolution grow equally.

    Deeper: phi(I phi(v)) = phi(v) for rectifiers phi, so behind each one that follows a layer stands a new layer with
    the weight I and, where there was a batch norm, one that undoes itself: mu and sigma^2 are the data's, gamma =
    sqrt(sigma^2 + eps), beta = mu.

    Departs from the paper: copies stand beside their originals, not at the end, which is another order of the same
    units; where the next layer reads units through
    anything that does not share out (a layer norm over them, attention) they are left alone, and that is said; new
    convolutions have one kernel size wherever they stand.

    Args:
        width: every chosen layer has this many times its outputs, those of the network excepted; 1 leaves it out.
        depth: how many new layers behind each chosen one that a rectifier follows; 0 leaves it out.
        noise: standard deviation of what is added to the weights of copies, in units of that of their layer's weights:
            with 0, copies that no dropout tells apart stay equal for ever.
        kernel: size of new convolutions, an odd number.
        epochs: of training the larger network; 0 hands it back with the function that it had, up to the noise.
        lr: learning rate; the paper has a tenth of that of the first training.
        optimizer: as in `fit`.
        where: which layers.

    Raises:
        BadOption: nothing is to grow, an even kernel, activations on grids, or no linear or convolution layer.
        CompressionError: nothing could grow.
        BadData: there are no data that new batch norms could take their statistics from.
    """
    if kernel % 2 == 0:
        raise BadOption(f"kernel={kernel}: an identity needs a middle, pass an odd number")
    if any(activation_form(m, at) is not None for m in model.modules() for at in ACTIVATIONS):
        raise BadOption("the model's activations are quantized, each on its own grid: grow it before that")
    chosen = list(targets(model, where, GROWING))
    masked = masked_names(model)
    bake(model)
    wider = widen(model, task, chosen, width, noise) if width > 1 else 0
    places = deepened(model, task, chosen) if depth else {}
    mask_zeros(model, masked)
    if not wider and not places:
        raise CompressionError(
            "no layer could get wider, and none stands before a rectifier (see what is said of each): "
            "choose another method, or other layers"
        )
    norms = [norm for path, told in places.items() for norm in insert(model, path, *told, depth, kernel)]
    undo_norms(model, task, norms)
    note(f"{wider} units copied, {depth * len(places)} identity layers inserted")
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="train larger") if epochs else model


# --- wider ------------------------------------------------------------------------------------------------------------


def widen(model: nn.Module, task: Task, chosen: Sequence[str], width: float, noise: float) -> int:
    """Copies units of the chosen layers, in place, and returns how many; what would move the outputs stays."""
    channels = channel_groups(model, task.inputs())
    drawn = {
        group.layers: draw(channels, torch.tensor(group.channels), width)
        for group in channels.groups
        if not set(chosen).isdisjoint(group.layers)
    }
    if not drawn:
        return 0
    if wrong := widen_channels(model, copies := most(drawn), channels):
        for layers, one in list(drawn.items()):
            if alone := widen_channels(copy.deepcopy(model), one, channels):
                skip(", ".join(layers), f"its units are not copied: {alone}")
                del drawn[layers]
        wrong = widen_channels(model, copies := most(drawn), channels) if drawn else wrong
    if wrong:
        note(f"no units are copied: {wrong}")
        return 0
    shake(model, channels, copies, noise)
    return sum(int(again(ids, copies).sum()) for ids in channels.outputs.values())


def most(drawn: Mapping[Any, Tensor]) -> Tensor:
    """Copies of each channel, of several draws the most."""
    return torch.stack(list(drawn.values())).amax(0)


def draw(channels: Channels, members: Tensor, width: float) -> Tensor:
    """How many times each channel is there afterwards (count,), `width` times as many of these members in all.

    The originals of new ones are drawn at random, with replacement. Vectors that must stay equally long get their
    copies at the same places; where that is not enough, every member gets equally many.
    """
    copies = torch.ones(channels.count, dtype=torch.long)
    families = [f for f in channels.equal if any(torch.isin(ids, members).any() for ids in f)]
    vectors = families[0] if families else (members,)
    size = len(vectors[0])
    times = torch.randint(size, (max(1, math.floor((width - 1) * size + 1e-9)),)).bincount(minlength=size)
    for ids in vectors:
        copies[ids[ids >= 0]] += times[: len(ids)][ids >= 0]
    gains = [{int((copies[ids[ids >= 0]] - 1).sum()) for ids in family} for family in families]
    if any(len(gain) > 1 for gain in gains):
        copies = torch.where(torch.isin(torch.arange(channels.count), members), math.ceil(width), 1)
    return copies


@torch.no_grad()
def shake(model: nn.Module, channels: Channels, copies: Tensor, noise: float) -> None:
    """Adds noise to the weights of copied units, not to those of their originals; zeros stay zeros."""
    for path, ids in channels.outputs.items():
        layer = model.get_submodule(path)
        if not noise or not isinstance(layer, GROWING):
            continue
        weight: Tensor = layer.weight  # type: ignore[assignment]
        copied = again(ids, copies).to(weight.device).view(-1, *[1] * (weight.dim() - 1))
        weight += noise * weight.std() * torch.randn_like(weight) * (copied & (weight != 0))


# --- deeper -----------------------------------------------------------------------------------------------------------


def deepened(model: nn.Module, task: Task, chosen: Sequence[str]) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Where layers are inserted: behind the module at a path, the layer that is or precedes it, and the rectifier."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = rectified(model, task.inputs())
    kept = {path: told for path, told in found.items() if paths[id(told[0])] in chosen and isinstance(told[0], GROWING)}
    if without := [path for path in chosen if path not in {paths[id(layer)] for layer, _ in kept.values()}]:
        note(f"no identity layers behind {', '.join(without)}: no rectifier alone reads what they put out")
    return kept


def insert(model: nn.Module, path: str, layer: nn.Module, last: nn.Module, depth: int, kernel: int) -> list[nn.Module]:
    """Puts `depth` rectified identity layers behind the module at a path, in place; returns their batch norms."""
    host = model.get_submodule(path)
    parts, norms = [host], []
    for _ in range(depth):
        parts += [copy.deepcopy(last), identity(layer, kernel, bias=host is layer)]
        if host is not layer:
            norms.append(fresh_norm(host))
            parts.append(norms[-1])
    swap(model, path, nn.Sequential(*parts))
    return norms


def identity(layer: nn.Module, kernel: int, *, bias: bool) -> nn.Module:
    """A layer of the kind of the given one that hands on what that one puts out."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    size, dims = len(weight), weight.dim() - 2
    new: nn.Module
    if isinstance(layer, nn.Linear):
        new = nn.Linear(size, size, bias)
        start = torch.eye(size)
    else:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        new = kind(size, size, kernel, padding=kernel // 2, bias=bias)
        start = nn.init.dirac_(torch.empty(size, size, *[kernel] * dims))
    with torch.no_grad():
        new.weight.copy_(start)
        if isinstance(new.bias, Tensor):
            new.bias.zero_()
    return new.to(weight)


def fresh_norm(norm: Any) -> nn.Module:
    """A batch norm of the size and settings of another one."""
    kind = next(k for k in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) if isinstance(norm, k))
    return kind(norm.num_features, eps=norm.eps, momentum=norm.momentum).to(norm.running_mean)
