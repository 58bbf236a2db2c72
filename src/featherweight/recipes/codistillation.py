"""Codistillation: copies of a network on shards of the data learn from old checkpoints of one another."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, final

import torch
from annotated_types import Ge
from torch import Tensor, nn

from featherweight.allowed import Amount, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core import processes
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


@final
class Paced:
    """A shard whose passes have so many batches, where it may have one less: it goes on where the last pass ended."""

    def __init__(self, batches: Iterable[Batch], count: int) -> None:
        self.stream, self.count = endless(batches), count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(self.stream, self.count)


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

    Checkpoints, batch norms' statistics included, are exchanged every so many steps, and used after a burn-in. Under
    `accelerate launch` with as many processes as copies each process trains one, on its own shard, and sends its
    checkpoints to the others, as in the paper; the outcome is that of one process which trains all in turns.

    Departs from the paper: in one process all copies train in turns, and in a number of processes that is not theirs
    each process trains all copies on its part of their shards; the first starts from the weights given, the
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
    steps, spread = itertools.count(), processes.count() == copies
    mine = processes.index() if spread else 0
    part = (processes.index(), processes.count()) if not spread else (0, 1)

    def exchanged(progress: float) -> None:
        if next(steps) % exchange == 0 and progress >= burn_in and weight:
            for i, one in enumerate(everyone if spread else []):
                processes.same_network(one, source=i)
            stale[:] = [copy.deepcopy(one).eval().requires_grad_(False) for one in everyone]

    def learner(i: int) -> Step:
        stream = endless(shards[i], *part)

        def step(net: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
            if i == mine:
                with processes.shared():
                    exchanged(progress)
            given = batch if i == mine or not disjoint else next(stream)
            output, target = run(net if i == mine else everyone[i], task, given)
            terms = {"labels": loss_of(task, output, target)}
            if stale:
                mean = mean_logits([predicted(one, task, given) for j, one in enumerate(stale) if j != i])
                seen = {"": prediction(output)}
                terms["peers"] = weight * softened(seen, {"": mean}, given, progress, temperature=1.0)
            return terms

        return step

    def train_one(i: int, others: Sequence[int]) -> None:
        sharded = task if not disjoint else replace(task, train=Paced(shards[i], -(-batches // copies)))
        also = [(list(everyone[j].parameters()), learner(j)) for j in others]
        task.fit(everyone[i], sharded, epochs=epochs, lr=lr, optimizer=optimizer, step=learner(i), also=also)

    if not spread:
        train_one(0, range(1, copies))
        return model
    for i, one in enumerate(everyone):
        processes.same_network(one, source=i)
    with processes.apart():
        train_one(mine, ())
    processes.same_network(model, source=0)
    processes.same_draws()
    return model


def endless(batches: Iterable[Batch], index: int = 0, count: int = 1) -> Iterator[Batch]:
    """The batches, over and over; of these every `count`-th from the place `index` on."""
    return itertools.islice(itertools.chain.from_iterable(itertools.repeat(batches)), index, None, count)


def mean_logits(logits: list[Tensor]) -> Tensor:
    """Logits of the mean of the probabilities."""
    return torch.stack([z.log_softmax(1) for z in logits]).logsumexp(0)
