"""Several teachers: their averaged probabilities, and by vote which of two samples is the more like a third."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.ensemble import Ensemble, members_of
from featherweight.core.features import matched, squared_distances, vectors
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.surgery import Layer
from featherweight.core.task import Task, first
from featherweight.core.taught import teacher_of
from featherweight.distill import Term, learn
from featherweight.ingredients.match.softened import softened


@final
class Triplets(nn.Module):
    """`1 / |Tr| sum [delta + s_ijk (d_S(i, j) - d_S(i, k))]_+` over random triplets of a batch, s the teachers' vote.

    d is the squared distance of features of norm 1; s_ijk is 1 if most teachers have j nearer to i than k, -1 if most
    have not; triplets without a majority are left out.

    Args:
        guided, hints: the student's layer, and each teacher's.
        count: how many triplets of a batch.
        margin: delta.
    """

    def __init__(self, guided: str, hints: Sequence[str], count: int = 500, margin: float = 0.2) -> None:
        super().__init__()
        self.guided, self.hints, self.count, self.margin = guided, list(hints), count, margin
        self.__ingredient__ = ("match", {"samples": 3})

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Any, progress: float
    ) -> Tensor:
        ours = distances(student[self.guided])
        i, j, k = triplets(len(ours), self.count).to(ours.device)
        votes = torch.stack([(d[i, j] < d[i, k]).double() for d in (distances(teacher[h]) for h in self.hints)])
        sign = (votes.mean(0) - 0.5).sign().to(ours)
        hinge = (self.margin + sign * (ours[i, j] - ours[i, k])).clamp_min(0)
        return (hinge * sign.abs()).sum() / sign.abs().sum().clamp_min(1)


def distances(features: Tensor) -> Tensor:
    """Squared distances between the samples' features, each of norm 1."""
    return squared_distances(F.normalize(vectors(features), dim=1))


def triplets(samples: int, count: int) -> Tensor:
    """Indices i, j, k of random triplets of three different samples, (3, count).

    >>> i, j, k = triplets(3, 100)
    >>> bool(((i != j) & (j != k) & (i != k)).all())
    True
    """
    return torch.rand(count, samples).topk(3, dim=1).indices.T


@recipe(
    paper="You, Xu, Xu and Tao, KDD 2017",
    family="distill",
    needs={"labels", "train", "teacher"},
    small={"epochs": 1},
)
def multi_teacher_triplet(
    model: nn.Module,
    task: Task,
    *,
    guided: Annotated[str, Layer("student")] | None = None,
    temperature: Positive = 4.0,
    alpha: Amount = 1.0,
    beta: Amount = 1.0,
    triplets: Count = 500,
    margin: Positive = 0.2,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Trains on `H(y, p_S) + alpha t^2 KL(mean_m p_m^t || p_S^t) + beta hinge`, see `Triplets`.

    The teachers are the members of the task's ensemble; one teacher votes alone.
    Source: Learning from Multiple Teacher Networks.

    Departs from the paper: constants are from memory; the teachers' votes have equal weights, which the paper learns;
    triplets are drawn at random from each batch; features are those of the last layer before the logits; Adam.

    Args:
        guided: the student's layer that is compared; the last one before the logits when left out.
        temperature: t.
        alpha: weight of the teachers' averaged probabilities.
        beta: weight of the triplets.
        triplets: how many of a batch.
        margin: delta.
        epochs: passes over the training data.
        lr: learning rate.
        optimizer: as in `fit`.
    """
    members = members_of(teacher_of(model, task))
    batch = first(task.calibrating(), "training")
    found = [matched(model, member, task, batch, "last")[0] for member in members]
    guided = guided or found[0][0]
    several = len(members) > 1
    hints = [f"members.{m}.{hint}" if several else hint for m, (_, hint) in enumerate(found)]
    note(f"{len(members)} teacher(s) vote on triplets of {guided}" + ("" if several else ": one alone decides"))
    if several:
        task = replace(task, teacher=Ensemble(members, temperature=temperature))
    terms = {
        "softened": Term(partial(softened, temperature=temperature), alpha),
        "triplets": Term(Triplets(guided, hints, triplets, margin), beta, [(guided, hint) for hint in hints]),
    }
    return learn(model, task, terms, epochs=epochs, lr=lr, optimizer=optimizer)
