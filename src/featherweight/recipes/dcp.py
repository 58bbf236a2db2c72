"""Discrimination-aware channel pruning: channels are added one by one, where the loss of the task and of the layer ask.

Zhuangwei Zhuang, Mingkui Tan, Bohan Zhuang, Jing Liu, Yong Guo, Qingyao Wu, Junzhou Huang, Jinhui Zhu,
"Discrimination-aware Channel Pruning for Deep Neural Networks", NeurIPS 2018, arXiv:1810.11809. P auxiliary losses,
evenly placed, classify by `F = AvgPool(ReLU(BN(O_p)))`: `L_S^p = CE(theta^T F, y)` (eq. 5). Stage p (the last of P + 1
uses the loss of the network, L_f) fine-tunes network and theta by `L_S^p + L_f`, then prunes the layers up to its loss,
by `L = L_M + lambda L_S^p`, `L_M = 1/2Q sum |O^b - O|^2` (eq. 2 to 6). In a layer no channel is read at first; the one
with the largest `|dL/dW_k|_F` is added (algorithm 2) and the weights on the channels so far are optimised, until there
are enough, or until `|L(t-1) - L(t)| / L(0) <= eps` (DCP-Adapt).

Departs from the paper: a channel that is added starts with the weights that it had, if these lower the loss, else with
zeros; steps are those of gradient descent with a line search on a fixed set of batches, so that L never rises; O^b are
the outputs of the network as its stage fine-tuned it; of channels that several layers read (residual sums) the losses
and gradients of all readers count; an auxiliary classifier gives outputs of the network's own shape, so that any loss
can stand in for cross entropy; kept channels are rounded up.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive
from featherweight.catalogue import recipe
from featherweight.core.channels import channel_groups, remove_channels
from featherweight.core.fit import Optimizers
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.layerwise import Stage, called, keep_zero, kept_by_masks, stages
from featherweight.core.ledger import note
from featherweight.core.surgery import WEIGHTED
from featherweight.core.task import Batch, Task, device_of, eval_mode, prediction, run, to_device
from featherweight.core.widths import NO_CHANNELS, check_some, fewer, rounded
from featherweight.errors import BadData, BadOption


@recipe(
    paper="Zhuang et al., NeurIPS 2018, arXiv:1810.11809",
    family="prune",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"epochs": 1, "finetune": 1, "round_to": 1, "calibration_batches": 1, "steps": 1, "losses": 1},
)
def dcp(
    model: nn.Module,
    task: Task,
    *,
    prune_ratio: Fraction = 0.5,
    tolerance: Amount | None = None,
    losses: Count = 2,
    balance: Amount = 1.0,
    steps: Count = 2,
    calibration_batches: Count = 4,
    round_to: Count = 16,
    epochs: Positive = 1,
    finetune: Amount = 10,
    lr: Positive = 0.01,
    optimizer: Optimizers = "sgd",
) -> nn.Module:
    """Builds every layer's input up again from the channels that lower the losses most, and removes the others.

    Args:
        prune_ratio: fraction of the channels of every group that goes, before rounding.
        tolerance: DCP-Adapt: a layer gets no more channels when the last one lowered the loss by less than this share
            of the loss without any; the ratio is then the least that goes.
        losses: how many auxiliary losses there are, P (the paper: 2 or 3).
        balance: weight of the auxiliary loss beside the error of the layer's outputs, lambda.
        steps: steps of gradient descent after every channel.
        calibration_batches: on how many batches of the training data channels are chosen.
        round_to: wider layers keep a multiple of this many channels; 1 removes exactly the fraction.
        epochs: passes of fine-tuning before every stage.
        finetune: passes at the end (the paper: 400 on CIFAR-10).
        lr: learning rate of both.
        optimizer: of both, as in `fit`.

    Raises:
        BadOption: there are no channels that could be chosen.
        TraceError: the network cannot be traced.
        CompressionError: no channel could be removed.
    """
    masked, keeps = masked_names(model), kept_by_masks(model)
    channels = channel_groups(bake(model), task.inputs())
    gone = torch.empty(0, dtype=torch.long)

    def hold(progress: float = 1.0) -> None:
        keep_zero(model, channels, gone, keeps)

    groups = stages(model, channels, task)
    if not groups:
        raise BadOption(NO_CHANNELS)
    order = [path for path in called(model, task) if isinstance(model.get_submodule(path), WEIGHTED)]
    batches = list(islice(task.train or (), calibration_batches))
    for part in placed(groups, order, losses):
        loss = auxiliary(model, task, part.at, balance)
        trained = [*model.parameters(), *([] if loss.head is None else loss.head.parameters())]
        task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, params=trained, step=loss.step,
                 after_step=hold, label=f"fine-tune for {part.at or 'the outputs'}")  # fmt: skip
        hold()
        loss = replace(loss, original=copy.deepcopy(model), batches=batches)
        for stage in part.groups:
            stay = fewer(len(stage.members), prune_ratio, round_to)
            if stay == len(stage.members):
                continue
            before = {path: weight_of(model, path).detach().clone() for path in stage.readers}
            chosen, others = added(model, stage, loss, stay, steps, tolerance, keeps)
            doomed = rounded(channels, stage.members[others], round_to)
            back = [m for m in others if stage.members[m] not in doomed]
            columns(model, stage, back, before)
            gone = torch.cat([gone, doomed])
            hold()
            note(f"{stage.name}: {len(chosen)} of {len(stage.members)} channels chosen")
    check_some(len(gone), channels, round_to)
    remove_channels(model, gone, channels=channels)
    mask_zeros(model, masked)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


@final
@dataclass(frozen=True)
class Part:
    """A stage of the method: the layer behind which its loss stands (None: the network's own), the groups it prunes."""

    at: str | None
    groups: list[Stage]


def placed(groups: list[Stage], order: list[str], losses: int) -> list[Part]:
    """Auxiliary losses evenly among the layers (in the order in which they run), each with the groups read up to it."""
    at = [order[max(1, round(i * len(order) / (losses + 1))) - 1] for i in range(1, losses + 1)]
    parts = [Part(path, []) for path in dict.fromkeys(at)] + [Part(None, [])]
    for group in groups:
        read = order.index(next(iter(group.readers)))
        next(part for part in parts if part.at is None or read <= order.index(part.at)).groups.append(group)
    return [part for part in parts if part.groups]


class Head(nn.Module):
    """An auxiliary classifier: batch norm, ReLU, the mean over positions, a linear layer; outputs of a given shape."""

    def __init__(self, width: int, last: bool, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.last, self.shape = last, shape
        self.norm, self.linear = nn.BatchNorm1d(width), nn.Linear(width, torch.Size(shape).numel())

    def forward(self, features: Tensor) -> Tensor:
        rows = (features.movedim(-1, 1) if self.last else features).flatten(2) if features.dim() > 2 else features
        flat = self.norm(rows).relu()
        return self.linear(flat.mean(2) if flat.dim() > 2 else flat).view(len(flat), *self.shape)


@final
@dataclass(frozen=True)
class Loss:
    """What a stage lowers: the auxiliary loss behind the layer `at`, and how far outputs are from the original's."""

    model: nn.Module
    task: Task
    at: str | None
    head: Head | None
    balance: float
    original: nn.Module | None = None
    batches: list[Batch] | None = None

    def step(self, model: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`L_S^p + L_f`, for the fine-tuning."""
        with watched(model, [self.at] if self.at else []) as seen:
            output, target = run(model, self.task, batch)
        terms = {"loss": self.task.loss(output, target)}
        if self.head is not None and self.at is not None:
            terms["auxiliary"] = self.task.loss(self.head(seen[self.at]), target)
        return terms

    def joint(self, readers: list[str], batch: Batch) -> Tensor:
        """`L_M + lambda L_S` of one batch, `L_M` summed over the layers that read."""
        assert self.original is not None
        with watched(self.model, [*readers, *([self.at] if self.at else [])]) as seen:
            output, target = run(self.model, self.task, batch)
        with torch.no_grad(), watched(self.original, readers) as wanted:
            run(self.original, self.task, batch)
        error = torch.stack([(seen[path] - wanted[path]).square().mean() / 2 for path in readers]).sum()
        guess = output if self.head is None or self.at is None else self.head(seen[self.at])
        return error + self.balance * self.task.loss(guess, target)

    def value(self, readers: list[str]) -> float:
        """The mean over the batches."""
        with torch.no_grad():
            return self._mean([float(self.joint(readers, batch)) for batch in self.batches or ()])

    def gradients(self, readers: list[str]) -> tuple[float, dict[str, Tensor]]:
        """The mean over the batches, and its gradients by the weights of the layers that read."""
        weights = [weight_of(self.model, path) for path in readers]
        total, values = [torch.zeros_like(weight) for weight in weights], []
        for batch in self.batches or ():
            loss = self.joint(readers, batch)
            values.append(float(loss.detach()))
            for summed, grad in zip(total, torch.autograd.grad(loss, weights), strict=True):
                summed.add_(grad, alpha=1 / len(self.batches or ()))
        return self._mean(values), dict(zip(readers, total, strict=True))

    @staticmethod
    def _mean(values: list[float]) -> float:
        mean = sum(values) / len(values)
        if not math.isfinite(mean):
            raise BadData(f"the loss of the training batches is {mean}: check the data and the weights")
        return mean


def auxiliary(model: nn.Module, task: Task, at: str | None, balance: float) -> Loss:
    """The loss behind a layer, with a classifier that is still to be trained."""
    if at is None:
        return Loss(model, task, None, None, balance)
    layer = model.get_submodule(at)
    with torch.no_grad(), watched(model, [at]) as seen, eval_mode(model):
        args, kwargs = to_device(task.inputs(), device_of(model))
        output = prediction(model(*args, **kwargs))
    last = isinstance(layer, nn.Linear)
    head = Head(seen[at].shape[-1 if last else 1], last, tuple(output.shape[1:]))
    return Loss(model, task, at, head.to(output), balance)


@contextmanager
def watched(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of layers, as they are before anything works on them in place."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            seen[path] = output
            return output.clone()

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in dict.fromkeys(paths)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def weight_of(model: nn.Module, path: str) -> Tensor:
    """The weight of a layer."""
    weight = model.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight


@torch.no_grad()
def columns(model: nn.Module, stage: Stage, members: Iterable[int], values: Mapping[str, Tensor] | None) -> None:
    """Sets, in place, what reads these members to what it is in `values`, or to zero."""
    for path, place in stage.readers.items():
        at = torch.isin(place[:-1], torch.tensor([*members], dtype=torch.long))
        weight = weight_of(model, path)
        weight.view(len(weight), -1)[:, at] = 0.0 if values is None else values[path].flatten(1)[:, at]


def added(
    model: nn.Module,
    stage: Stage,
    loss: Loss,
    stay: int,
    steps: int,
    tolerance: float | None,
    keeps: Mapping[tuple[str, str], Tensor],
) -> tuple[list[int], list[int]]:
    """The members that are chosen, in order, and the others, the one that is asked for least first (algorithm 2).

    The weights of the layers that read end where the choice left them: zero for the others.
    """
    readers, members = list(stage.readers), len(stage.members)
    before = {path: weight_of(model, path).detach().clone() for path in readers}
    columns(model, stage, range(members), None)
    chosen: list[int] = []
    with exact(model, loss):
        start, slopes = loss.gradients(readers)
        value, size = start, 1.0
        while True:
            scores = asked(stage, slopes)
            scores[chosen] = -torch.inf
            if len(chosen) == stay:
                break
            chosen.append(int(scores.argmax()))
            columns(model, stage, chosen[-1:], before)
            last, held = value, loss.value(readers)
            if held > value:
                columns(model, stage, chosen[-1:], None)
            for _ in range(steps):
                value, slopes = loss.gradients(readers)
                size = descended(model, stage, loss, chosen, value=value, slopes=slopes, size=size, keeps=keeps)
            value, slopes = loss.gradients(readers)
            if tolerance is not None and last - value <= tolerance * start:
                scores = asked(stage, slopes)
                break
    return chosen, [m for m in scores.argsort(stable=True).tolist() if m not in chosen]


def asked(stage: Stage, slopes: Mapping[str, Tensor]) -> Tensor:
    """`|dL/dW_k|_F` of every member, over all layers that read it."""
    total = torch.zeros(len(stage.members) + 1, dtype=torch.float64)  # the last entry is for -1
    for path, place in stage.readers.items():
        total.index_add_(0, place[:-1] % len(total), slopes[path].flatten(1).square().sum(0).cpu().double())
    return total[:-1].sqrt()


@torch.no_grad()
def descended(
    model: nn.Module,
    stage: Stage,
    loss: Loss,
    chosen: list[int],
    *,
    value: float,
    slopes: Mapping[str, Tensor],
    size: float,
    keeps: Mapping[tuple[str, str], Tensor],
) -> float:
    """One step on what reads the chosen members, halved until the loss falls; the size to begin the next with."""
    moves = {}
    for path, place in stage.readers.items():
        free = torch.isin(place[:-1], torch.tensor(chosen)).to(slopes[path].device)
        move = (slopes[path].flatten(1) * free).view_as(slopes[path])
        moves[path] = move * keeps[path, "weight"] if (path, "weight") in keeps else move
    before = {path: weight_of(model, path).clone() for path in moves}
    for _ in range(12):
        for path, move in moves.items():
            weight_of(model, path).copy_(before[path] - size * move)
        if loss.value(list(moves)) < value:
            return 2 * size
        size /= 2
    for path, weight in before.items():
        weight_of(model, path).copy_(weight)
    return size


@contextmanager
def exact(model: nn.Module, loss: Loss) -> Iterator[None]:
    """A block in which all networks are in evaluation mode."""
    networks = [net for net in (model, loss.original, loss.head) if net is not None]
    modes = {module: module.training for net in networks for module in net.modules()}
    for net in networks:
        net.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
