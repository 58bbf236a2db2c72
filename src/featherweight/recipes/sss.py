"""Sparse structure selection: learn a factor for every channel and residual block, remove what gets the factor zero."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive
from featherweight.catalogue import recipe
from featherweight.core.channels import Channels, channel_groups
from featherweight.core.emptied import check_emptied, remove_dead
from featherweight.core.fit import DECAYS, Optimizers
from featherweight.core.fold import norms_behind
from featherweight.core.forms import Form, attach, bake, mask_zeros, masked_names
from featherweight.core.groups import makers
from featherweight.core.ledger import note, skip
from featherweight.core.residual import Branch, branches, remove_branches
from featherweight.core.task import Task
from featherweight.errors import BadOption


@recipe(
    paper="Huang and Wang, ECCV 2018, arXiv:1707.01213",
    family="prune",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"penalty": 0.1, "epochs": 8, "round_to": 1},
)
def sss(
    model: nn.Module,
    task: Task,
    *,
    penalty: Amount = 0.01,
    structures: Literal["both", "channels", "blocks"] = "both",
    momentum: Fraction = 0.9,
    epochs: Amount = 100,
    finetune: Amount = 0,
    lr: Positive = 0.1,
    optimizer: Optimizers = "sgd",
    round_to: Count = 16,
) -> nn.Module:
    """Multiplies the output of every structure by a factor, minimises `loss + penalty * sum |factor|`; zeros go.

    Zehao Huang, Naiyan Wang, "Data-Driven Sparse Structure Selection for Deep Neural Networks", ECCV 2018. Weights are
    trained as ever, the factors `s` at the same time by accelerated proximal gradient (eq. 10 to 12), eta being the
    learning rate, mu the momentum and S the soft threshold:

        z = S_{eta penalty}(s - eta grad),   v <- z - s + mu v,   s <- max(0, z + mu v),

    which gives exact zeros. Structures are channels ("neurons") and residual branches, whose factor stands before the
    addition. In the end factors are multiplied into the weights before them, and what has the factor zero is removed:
    the network computes what it computed, and needs no fine-tuning.

    Departs from the paper: factors are folded into the batch norm or layer that puts the structure out, where the paper
    folds them into the next one (the same function); no groups of a grouped convolution; channels that a residual sum
    couples share one factor; of every layer one channel stays; one strength for channels and blocks (the paper has
    either in one network); a channel with factor zero stays where rounding keeps it.

    Args:
        penalty: strength of the pull on the factors; the paper's for the blocks of ResNet-50.
        structures: what has a factor: "channels", residual "blocks" or "both".
        momentum: of the factors.
        epochs: passes of training weights and factors.
        finetune: passes after the removal.
        lr: learning rate of all, falling to zero.
        optimizer: of the weights.
        round_to: wider layers keep a multiple of this many channels; 1 removes all whose factor is zero.

    Raises:
        BadOption: the network has no such structures.
        TraceError: the network cannot be traced.
        CompressionError: no factor became zero.
    """
    masked = masked_names(model)
    bake(model)
    gates = Gates.of(model, task, structures)
    gates.attach(model)
    mask_zeros(model, masked)
    velocity = torch.zeros_like(gates.factors)

    def descend(progress: float) -> None:
        s, rate = gates.factors, lr * DECAYS["cosine"](progress)
        assert s.grad is not None
        with torch.no_grad():
            new, speed = accelerated(s, velocity, s.grad, rate=rate, penalty=penalty, momentum=momentum)
            s.copy_(gates.spared(new, s))
            velocity.copy_(speed)
        s.grad = None

    weights = [p for p in model.parameters() if p is not gates.factors]
    task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, params=weights, after_step=descend,
             label="structure selection")  # fmt: skip

    bake(model)
    s = gates.factors.detach()
    note(f"{int((s == 0).sum())} of {int(gates.used.sum())} factors are zero, {int((s > 0).sum())} are not")
    dead = (s[: gates.channels.count] == 0).nonzero().flatten()
    gone = [block for block, factor in zip(gates.blocks, s[gates.channels.count :], strict=True) if factor == 0]
    removed = remove_dead(model, task, gates.channels, dead, round_to) if len(dead) else 0
    remove_branches(model, gone, task.inputs())
    note(f"{len(gone)} of {len(gates.blocks)} residual branches removed: {', '.join(b.block for b in gone) or 'none'}")
    check_emptied(removed + len(gone), round_to)
    mask_zeros(model, masked)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def accelerated(
    s: Tensor, velocity: Tensor, gradient: Tensor, *, rate: float, penalty: float, momentum: float
) -> tuple[Tensor, Tensor]:
    """One step of accelerated proximal gradient on factors that are not negative: the factors and their velocity."""
    z = s - rate * gradient
    z = z.sign() * (z.abs() - rate * penalty).clamp_min(0)
    velocity = z - s + momentum * velocity
    return (z + momentum * velocity).clamp_min(0), velocity


@final
class Gate(Form):
    """Rows of a tensor times their factors: `index`, which broadcasts to the tensor, numbers the factors."""

    stands = ("weight",)
    index: Tensor

    def __init__(self, factors: nn.Parameter, *index: Tensor) -> None:
        super().__init__()
        self.factors = factors
        for i, one in enumerate(index):
            self.register_buffer(f"index{i}", one)

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (weight,) = free
        padded = torch.cat([self.factors, self.factors.new_ones(1)])  # the last one is for -1
        for index in self.buffers():
            weight = weight * padded[index]
        return weight


@final
@dataclass(frozen=True)
class Gates:
    """A factor for every channel, then one for every block; those of channels that have none stay 1."""

    factors: nn.Parameter
    used: Tensor
    places: dict[tuple[str, str], list[Tensor]]
    channels: Channels
    blocks: list[Branch]

    @staticmethod
    def of(model: nn.Module, task: Task, structures: str) -> Gates:
        """The factors of a network and the parameters that they multiply.

        Raises:
            BadOption: there are none.
        """
        channels = channel_groups(model, task.inputs())
        blocks = branches(model, task.inputs()) if structures != "channels" else []
        places: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        if structures != "blocks":
            _place_channels(model, task, channels, places)
        used = torch.zeros(channels.count + len(blocks), dtype=torch.bool)
        for index in (one for many in places.values() for one in many):
            used[index[index >= 0]] = True
        for number, block in enumerate(blocks, channels.count):
            used[number] = True
            layer = model.get_submodule(block.layers[-1])
            for name, value in layer.named_parameters(recurse=False):
                places[block.layers[-1], name].append(torch.full((1,) * value.dim(), number))
        if not used.any():
            what = {"both": "channels or residual blocks", "channels": "channels", "blocks": "residual blocks"}
            raise BadOption(
                f"the network has no {what[structures]} that could be removed: choose a method that masks weights, "
                "such as magnitude_iterative"
            )
        device = next(model.parameters()).device
        return Gates(nn.Parameter(torch.ones(len(used), device=device)), used, dict(places), channels, blocks)

    def attach(self, model: nn.Module) -> None:
        for (path, name), index in self.places.items():
            attach(model.get_submodule(path), Gate(self.factors, *(i.to(self.factors.device) for i in index)), at=name)

    def spared(self, new: Tensor, old: Tensor) -> Tensor:
        """The new factors where there are any; the largest of a layer stays as it was where none would be left."""
        new = torch.where(self.used.to(new.device), new, old)
        for ids in self.channels.outputs.values():
            own = ids[ids >= 0]
            if len(own) == len(ids) and bool((new[own] == 0).all()):
                first = own[old[own].argmax()]
                new[first] = old[first]
        return new


def _place_channels(
    model: nn.Module, task: Task, channels: Channels, places: dict[tuple[str, str], list[Tensor]]
) -> None:
    """Where the factors of channels stand: the batch norm behind a layer that makes them, or that layer itself."""
    norms = norms_behind(model, task.inputs())
    own, found = torch.ones(channels.count + 1, dtype=torch.bool), {}
    for part in makers(model, channels).parts:
        ids, reads = part.index.flatten(), channels.inputs.get(part.path, torch.empty(0, dtype=torch.long))
        at = norms.get(part.path, part.path)
        if (ids < 0).all() or torch.isin(ids[ids >= 0], reads).any():  # depthwise: the factor of its input is enough
            continue
        if not any(True for _ in model.get_submodule(at).named_parameters(recurse=False)):
            own[ids] = False
            skip(part.path, f"no factors: {at} has no scales that could hold them")
        found[at] = (part.path == at, part.index)
    for at, (itself, index) in found.items():
        ids = torch.where(own[index], index, -1)
        for name, value in model.get_submodule(at).named_parameters(recurse=False):
            flat = value.dim() == 1
            places[at, name].append(ids.flatten() if flat or not itself else ids)
