"""Codistillation: copies of a network on shards of the data learn from old checkpoints of one another."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Annotated, final

import torch
from annotated_types import Ge
from torch import Tensor, nn

from featherweight.allowed import Amount, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers, Step
from featherweight.core.ledger import note
from featherweight.core.peers import fresh, predicted
from featherweight.core.task import Batch, Task, device_of, length, loss_of, prediction, run
from featherweight.errors import BadData
from featherweight.ingredients.match.softened import softened


@final
class Shard:
    """Every n-th batch of the data from the i-th on; as often as they can be gone through."""

    def __init__(self, batches: Iterable[Batch], index: int, count: int) -> None:
        self.batches, self.index, self.count = batches, index, count

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(iter(self.batches), self.index, None, self.count)


@recipe(
    paper="Anil, Pereyra, Passos, Ormandi, Dahl and Hinton, ICLR 2018, arXiv:1804.03235",
    family="distill",
    needs={"labels", "train"},
    small={"epochs": 2, "exchange": 1, "burn_in": 0.0},
)
def codistillation(
    model: nn.Module,
    task: Task,
    *,
    copies: Annotated[int, Ge(2)] = 2,
    weight: Amount = 1.0,
    burn_in: Share = 0.15,
    exchange: Annotated[int, Ge(1)] = 50,
    disjoint: bool = True,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Trains n copies on `H(y, p_i) + lambda KL(mean_{j != i} p_j || p_i)` of old checkpoints; one is kept.

    Checkpoints, batch norms' statistics included, are exchanged every so many steps, and used after a burn-in.

    Departs from the paper: all copies train in one process, in turns; the first starts from the weights given, the
    others from new ones; the divergence in place of the cross-entropy, which has the same gradient; checkpoints predict
    in evaluation mode; the shards are every n-th batch, so that a loader which shuffles changes them from epoch to
    epoch, and one pass over a shard counts as an epoch.

    Args:
        copies: n.
        weight: lambda.
        burn_in: share of the steps before the copies look at one another.
        exchange: steps between exchanges of checkpoints.
        disjoint: each copy trains on batches of its own; False shares all.
        epochs: passes of each copy over its shard.
        lr: learning rate.
        optimizer: as in `fit`.

    Raises:
        BadData: there are fewer training batches than copies.
    """
    everyone = [model, *(fresh(model).to(device_of(model)).train() for _ in range(copies - 1))]
    train = task.train if task.train is not None else []
    batches = length(train) or sum(1 for _ in train)
    if disjoint and batches < copies:
        raise BadData(f"{batches} training batches make no {copies} shards: pass more batches, or disjoint=False")
    shards = [Shard(train, i, copies) if disjoint else train for i in range(copies)]
    note(f"{copies} copies learn from one another's checkpoints, exchanged every {exchange} steps; the first is kept")
    stale: list[nn.Module] = []
    steps = itertools.count()

    def exchanged(progress: float) -> None:
        if next(steps) % exchange == 0 and progress >= burn_in and weight:
            stale[:] = [copy.deepcopy(one).eval().requires_grad_(False) for one in everyone]

    def learner(i: int) -> Step:
        stream = endless(shards[i])

        def step(net: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
            if i == 0:
                exchanged(progress)
            mine = batch if i == 0 or not disjoint else next(stream)
            output, target = run(net if i == 0 else everyone[i], task, mine)
            terms = {"labels": loss_of(task, output, target)}
            if stale:
                mean = mean_logits([predicted(one, task, mine) for j, one in enumerate(stale) if j != i])
                seen = {"": prediction(output)}
                terms["peers"] = weight * softened(seen, {"": mean}, mine, progress, temperature=1.0)
            return terms

        return step

    sharded = task if not disjoint else replace(task, train=shards[0])
    also = [(list(everyone[i].parameters()), learner(i)) for i in range(1, copies)]
    return task.fit(model, sharded, epochs=epochs, lr=lr, optimizer=optimizer, step=learner(0), also=also)


def endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, over and over."""
    while True:
        yield from batches


def mean_logits(logits: list[Tensor]) -> Tensor:
    """Logits of the mean of the probabilities."""
    return torch.stack([z.log_softmax(1) for z in logits]).logsumexp(0)
