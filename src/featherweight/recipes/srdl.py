"""Self-referenced deep learning: half the epochs make the teacher of a new start of the same network."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

from torch import nn

from featherweight.allowed import Amount, Positive
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.restart import reinitialise
from featherweight.core.task import Task
from featherweight.distill import Term, learn
from featherweight.ingredients.match.softened import softened


@recipe(
    paper="Lan, Zhu and Gong, ACCV 2018, arXiv:1811.09598",
    family="distill",
    needs={"labels", "train"},
    small={"epochs": 12, "lr": 0.01},
)
def srdl(
    model: nn.Module,
    task: Task,
    *,
    temperature: Positive = 3.0,
    weight: Positive = 1.0,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Half the epochs on labels; a random restart; half on `H(y, p_S) + t^2 KL(p_T^t || p_S^t)`, p_T the first half's.

    Each half has a complete schedule of the learning rate; together they have as many steps as plain training.
    Source: Self-Referenced Deep Learning.

    Departs from the paper: the temperature is not settled (3 from memory); the network of the first half is kept as
    teacher, where the paper stores its predictions, so that augmented inputs fit; the first half starts from the
    weights given; Adam.

    Args:
        temperature: t.
        weight: of the divergence.
        epochs: passes of both halves together.
        lr: learning rate at the start of each half.
        optimizer: as in `fit`.
    """
    task.fit(model, task, epochs=epochs / 2, lr=lr, optimizer=optimizer)
    taught = replace(task, teacher=copy.deepcopy(model), teacher_split=None)
    reinitialise(model)
    terms = {"self": Term(partial(softened, temperature=temperature), weight)}
    return learn(model, taught, terms, epochs=epochs / 2, lr=lr, optimizer=optimizer)
