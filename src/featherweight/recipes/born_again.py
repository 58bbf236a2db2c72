"""Born-again networks: a network with new weights learns from the one before it, for some generations."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Literal

from torch import nn

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.restart import reinitialise
from featherweight.core.task import Task
from featherweight.core.taught import teacher_of
from featherweight.distill import Term, learn
from featherweight.ingredients.match.dark_knowledge import permuted, weighted_by_confidence
from featherweight.ingredients.match.softened import softened


@recipe(
    paper="Furlanello, Lipton, Tschannen, Itti and Anandkumar, ICML 2018, arXiv:1805.04770",
    family="distill",
    needs={"labels", "train", "teacher"},
    small={"generations": 1, "epochs": 6, "lr": 0.01},
)
def born_again(
    model: nn.Module,
    task: Task,
    *,
    generations: Count = 3,
    form: Literal["kd", "permuted", "confidence"] = "kd",
    labels: Amount = 1.0,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Generation k, with new weights, trains on `H(y, p_k) + KL(p_{k-1} || p_k)`; generation 0 is the teacher.

    The forms ask which part of that helps: `permuted` (DKPP) shuffles the teacher's probabilities but the largest,
    `confidence` (CWTM) uses them as weights of the samples alone, in place of the labels' term.

    Departs from the paper: fewer epochs, Adam; generations are not averaged in the end (make an ensemble of runs for
    that); masks of the model are kept.

    Args:
        generations: how many networks follow one another.
        form: what is learned from the generation before.
        labels: weight of the labels; 0 learns from the generation before alone.
        epochs: passes of each generation.
        lr: learning rate.
        optimizer: as in `fit`.
    """
    teacher = teacher_of(model, task)
    term = {
        "kd": Term(partial(softened, temperature=1.0)),
        "permuted": Term(permuted),
        "confidence": Term(weighted_by_confidence),
    }[form]
    for generation in range(1, generations + 1):
        reinitialise(model)
        taught = replace(task, teacher=teacher, teacher_split=task.teacher_split if generation == 1 else None)
        share = 0.0 if form == "confidence" else labels
        learn(model, taught, {form: term}, labels=share, epochs=epochs, lr=lr, optimizer=optimizer)
        note(f"generation {generation} learned from generation {generation - 1}")
        teacher = copy.deepcopy(model)
    return model
