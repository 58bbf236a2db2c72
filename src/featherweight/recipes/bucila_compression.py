"""Model compression: a student learns what an ensemble says of data made up near the real ones; no labels needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.ensemble import members_of
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.restart import reinitialise
from featherweight.core.task import Batch, Task
from featherweight.core.taught import teacher_of
from featherweight.distill import Term, learn
from featherweight.errors import BadData
from featherweight.ingredients.match.squared_probabilities import squared_probabilities


@final
class Shuffled:
    """Batches of samples in memory, in a new order at every pass; under a name where the network wants one."""

    def __init__(self, x: Tensor, size: int, key: str | None) -> None:
        self.x, self.size, self.key = x, size, key

    def __len__(self) -> int:
        return (len(self.x) + self.size - 1) // self.size

    def __iter__(self) -> Iterator[Batch]:
        for part in self.x[torch.randperm(len(self.x))].split(self.size):
            yield (part,) if self.key is None else {self.key: part}


@recipe(
    paper="Bucila, Caruana and Niculescu-Mizil, KDD 2006",
    family="distill",
    needs={"train", "teacher"},
    small={"copies": 1, "epochs": 6, "restart": True, "lr": 0.01},
)
def bucila_compression(
    model: nn.Module,
    task: Task,
    *,
    copies: Count = 10,
    swap: Share = 0.3,
    locality: Positive = 2.0,
    real: bool = True,
    restart: bool = False,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Makes data with MUNGE, has the teacher (an ensemble) say what it thinks of them, and fits its probabilities.

    Departs from the paper: MUNGE's steps are from memory; every attribute is continuous and is not rescaled; its
    neighbours are searched among all training inputs, which are held in memory. Teachers score classes; an ensemble
    gives the mean of its members' probabilities. It starts from the weights given unless told otherwise. Adam.

    Args:
        copies: k, how many copies of the data are made.
        swap: p, the probability that an attribute is redrawn.
        locality: s; the redrawn attribute is spread by the distance of two neighbours' attributes, divided by s.
        real: the real inputs are learned too.
        restart: draw new weights first, as the paper does; a student with the teacher's weights has nothing to learn.
        epochs: passes over all the data.
        lr: learning rate.
        optimizer: as in `fit`.

    Raises:
        BadData: the network has more than one input, or none of real numbers.
    """
    teacher = teacher_of(model, task)
    x, size, key = gathered(task, task.train or ())
    made = [munge(x, swap, locality) for _ in range(copies)]
    note(f"{copies * len(x):,} inputs made from {len(x):,}, labelled by {len(members_of(teacher))} network(s)")
    data = Shuffled(torch.cat([x, *made] if real else made), size, key)
    if restart:
        reinitialise(model)
    terms = {"probabilities": Term(squared_probabilities)}
    return learn(model, replace(task, train=data), terms, labels=0, epochs=epochs, lr=lr, optimizer=optimizer)


def gathered(task: Task, batches: Iterable[Batch]) -> tuple[Tensor, int, str | None]:
    """All inputs, the size of a batch, and the name of the input if the network is called by names.

    Raises:
        BadData: there is not exactly one input of real numbers.
    """
    parts, name = [], None
    for batch in batches:
        args, kwargs, _ = task.split(batch)
        given: list[tuple[str | None, Any]] = [*((None, a) for a in args), *kwargs.items()]
        if len(given) != 1 or not isinstance(given[0][1], Tensor) or not given[0][1].is_floating_point():
            raise BadData("data are made up for networks with one input of real numbers: choose kd for this one")
        name = given[0][0]
        parts.append(given[0][1])
    if not parts:
        raise BadData("the data are empty: at least one batch is needed")
    return torch.cat(parts), max(map(len, parts)), name


def munge(x: Tensor, swap: float, locality: float) -> Tensor:
    """Samples near those of x (n, ...), whose attributes are as in x: MUNGE.

    Every sample e meets its nearest neighbour e'; each attribute a is with probability p drawn anew in both, e_a from
    N(e'_a, sd) and e'_a from N(e_a, sd), with sd = |e_a - e'_a| / s.
    """
    flat, made = x.flatten(1), x.flatten(1).clone()
    nearest = neighbours(flat)
    for i, j in enumerate(nearest.tolist()):
        a, b = made[i].clone(), made[j].clone()
        hit = torch.rand_like(a) < swap
        spread = (a - b).abs() / locality
        made[i] = torch.where(hit, b + spread * torch.randn_like(a), a)
        made[j] = torch.where(hit, a + spread * torch.randn_like(a), b)
    return made.view_as(x)


def neighbours(x: Tensor, chunk: int = 1024) -> Tensor:
    """The index of the nearest other row of x (n, d), (n,)."""
    found = []
    for start in range(0, len(x), chunk):
        distances = torch.cdist(x[start : start + chunk], x)
        rows = torch.arange(len(distances))
        distances[rows, start + rows] = torch.inf
        found.append(distances.argmin(1))
    return torch.cat(found)
