"""ONE: branches of one network learn from their own ensemble while they are trained; one of them is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, final

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.features import as_map, features, is_map, middle, stages
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.peers import branch
from featherweight.core.surgery import Layer
from featherweight.core.task import Batch, Task, device_of, first, loss_of, prediction, run
from featherweight.distill import below, tapped
from featherweight.errors import unknown
from featherweight.ingredients.match.softened import softened


@final
class Gate(nn.Module):
    """`softmax(ReLU(BN(FC(GAP(shared)))))`: how much each branch counts, (batch, branches)."""

    def __init__(self, width: int, branches: int) -> None:
        super().__init__()
        self.scores = nn.Sequential(nn.Linear(width, branches), nn.BatchNorm1d(branches), nn.ReLU())

    def forward(self, shared: Tensor) -> Tensor:
        pooled = as_map(shared).mean((2, 3))
        norm = self.scores[1]
        norm.train(norm.training and len(pooled) > 1)  # the statistics of one sample are none
        return self.scores(pooled).softmax(1)


@recipe(
    paper="Lan, Zhu and Gong, NeurIPS 2018, arXiv:1806.04606",
    family="distill",
    needs={"labels", "train"},
    small={"epochs": 1},
)
def one(
    model: nn.Module,
    task: Task,
    *,
    branches: Count = 3,
    split: Annotated[str, Layer("student")] | None = None,
    temperature: Positive = 3.0,
    ramp: Share = 0.27,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Trains m branches on `sum_i H(y, p_i) + H(y, p_e) + w t^2 sum_i KL(p_e^t || p_i^t)`, `z_e = sum_i g_i z_i`.

    The branches share the layers up to `split`; the gate g and the branches beside the first are dropped. The weight
    w rises as `exp(-5 (1 - progress / ramp)^2)`.
    Source: Knowledge Distillation by On-the-Fly Native Ensemble.

    Departs from the paper: the first branch and the shared layers start from the weights given, the others from new
    ones; every branch runs the shared layers anew, whose batch norms see each batch m times; Adam and fewer epochs.

    Args:
        branches: m.
        split: path of the last shared layer; the last one with maps of the last size but one, or the middle layer, when
            left out.
        temperature: t.
        ramp: share of the training in which w rises, 80 of 300 epochs in the paper.
        epochs: passes over the training data.
        lr: learning rate.
        optimizer: as in `fit`.

    Raises:
        UnknownName: there is no layer `split`.
        BadOption: the network has no layer to split at.
    """
    batch = first(task.train or (), "training")
    split = last_shared(model, task, batch, split)
    trunk = {id(p) for p in below(model, task, batch, split)}
    everyone = [model, *(branch(model, trunk).to(device_of(model)).train() for _ in range(branches - 1))]
    shape = features(model, task, batch)[split]
    gate = Gate(shape[1] if len(shape) == 4 else shape[-1], branches).to(device_of(model))
    params = list(dict.fromkeys(p for part in [*everyone, gate] for p in part.parameters()))
    own = sum(p.numel() for p in model.parameters())
    note(f"{branches} branches behind {split}; {sum(p.numel() for p in params) - own:,} parameters in training only")

    def step(net: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        seen, output, target = tapped(net, model, task, batch, [split])
        runs = [output, *(run(other, task, batch)[0] for other in everyone[1:])]
        logits = [prediction(out) for out in runs]
        ensemble = mixed(gate(seen[split]), logits)
        weight = math.exp(-5 * (1 - min(1.0, progress / ramp if ramp else 1.0)) ** 2)
        shown = {"": ensemble.detach()}
        gaps = [softened({"": z}, shown, batch, progress, temperature=temperature) for z in logits]
        return {
            "branches": torch.stack([loss_of(task, out, target) for out in runs]).sum(),
            "ensemble": loss_of(task, ensemble, target),
            "match": weight * torch.stack(gaps).sum(),
        }

    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, step=step, params=params)


def mixed(gates: Tensor, logits: Sequence[Tensor]) -> Tensor:
    """`sum_i g_i z_i` of gates (batch, m) and m logits (batch, classes, ...)."""
    shares = gates.view(*gates.shape, *[1] * (logits[0].dim() - 1))
    return (shares * torch.stack(list(logits), 1)).sum(1)


def last_shared(model: nn.Module, task: Task, batch: Batch, split: str | None) -> str:
    """The layer that was named, else the one before the last stage.

    Raises:
        UnknownName: there is no such layer.
        BadOption: there is no layer to take.
    """
    found = features(model, task, batch)
    if split is not None:
        if split not in found:
            raise unknown("layer of the student", split, found)
        return split
    ends = stages(found, "ends") if any(map(is_map, found.values())) else []
    return ends[-2] if len(ends) > 1 else middle(found, "student")
