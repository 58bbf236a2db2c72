"""Cross-layer matrices, 1x1 matching, two stages, an offline KL divergence and a random ensemble: a thesis's system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated

from torch import nn

from featherweight.allowed import Amount, Positive
from featherweight.catalogue import Slot, fill, recipe
from featherweight.core.ensemble import Average, Ensemble, members_of
from featherweight.core.features import matched
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.plan import Plan
from featherweight.core.task import Task, first
from featherweight.core.taught import teacher_of
from featherweight.distill import Adapter, Term, below, learn
from featherweight.errors import BadOption
from featherweight.ingredients.match.gram_matrices import Between, gram_matrices
from featherweight.ingredients.match.softened import softened


@recipe(
    paper="Chou, Chiu and Liao, APSIPA Transactions on Signal and Information Processing, 2021, e18",
    family="distill",
    needs={"labels", "train", "teacher"},
    small={"feature_epochs": 1, "epochs": 1},
)
def chou_full(
    model: nn.Module,
    task: Task,
    *,
    plan: Annotated[str, Slot("plan")] | Plan = "two_stage_kd",
    average: Annotated[str, Slot("average")] | Average = "offline_random_ensemble",
    adapter: Annotated[str, Slot("adapter")] | Adapter = "one_by_one_match",
    between: Between = "all",
    pairs: Sequence[tuple[str, str]] | None = None,
    feature_weight: Positive = 1.0,
    weight: Positive = 1.0,
    temperature: Positive = 1.0,
    feature_epochs: Amount = 5,
    feature_lr: Positive = 1e-3,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Stage 1 fits Gram matrices between all layers to the teacher's; stage 2 minimises `H(y, p_S) + KL(p_T || p_S)`.

    The p_T of several teachers (`Task(teacher=Ensemble([...]))`) is their random average. The matrices are those of the
    first teacher alone: channels of networks that were trained apart are not in the same order.

    Departs from the paper: only the abstract of the thesis was available; what its five parts are in detail is
    inferred, see `cross_layer_matrix`, `one_by_one_match`, `two_stage_kd`, `offline_kl`, `offline_random_ensemble`. It
    starts from the student's weights as they are, and has fewer steps.

    Args:
        plan: the stages: two_stage_kd, or joint.
        average: how several teachers are weighted (slot `average`).
        adapter: joins layers of unequal widths; trained along, then dropped.
        between: which layers have a matrix: all pairs, consecutive ones (FSP), those with a layer between, all and each
            with itself.
        pairs: (student's layer, teacher's layer) in order; the first layer and the last one with maps of each size when
            left out.
        feature_weight: weight of the matrices, beside outputs and labels in the plan joint.
        weight: weight of the divergence.
        temperature: of the divergence.
        feature_epochs: passes of a stage of features alone.
        feature_lr: its learning rate.
        epochs: passes of the stage that has labels.
        lr: its learning rate.
        optimizer: as in `fit`.
    """
    members = members_of(teacher_of(model, task))
    batch = first(task.calibrating(), "training")
    pairs = pairs if pairs is not None else matched(model, members[0], task, batch, "stages")
    if not pairs:
        raise BadOption(
            "chou_full compares layers, and pairs= names none: leave it out, or pass (student's, teacher's)"
        )
    one = replace(task, teacher=members[0])
    several, prefix = one, ""
    if len(members) > 1:
        several, prefix = replace(task, teacher=Ensemble(members, fill("average", average), temperature)), "members.0."
    else:
        note("there is one teacher, so that the random average of teachers is that teacher")
    gram = partial(gram_matrices, between=between, scale="mean")
    kl = {"kl": Term(partial(softened, temperature=temperature), weight)}

    for stage in fill("plan", plan)():
        if stage.features and not stage.labels:
            trunk = below(model, task, batch, pairs[-1][0])
            learn(
                model,
                one,
                {"cross-layer": Term(gram, pairs=pairs)},
                labels=0,
                adapter=adapter,
                whole=False,
                epochs=feature_epochs,
                lr=feature_lr,
                optimizer=optimizer,
                params=trunk,
            )
        else:
            inner = [(a, prefix + b) for a, b in pairs]
            terms = {"cross-layer": Term(gram, feature_weight, inner)} if stage.features else {}
            terms |= kl if stage.outputs else {}
            learn(model, several, terms, adapter=adapter, epochs=epochs, lr=lr, optimizer=optimizer)
    return model
