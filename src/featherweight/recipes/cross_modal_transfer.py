"""Cross modal distillation: a network of one modality learns from pairs what the network of another one has learned."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from torch import nn

from featherweight.allowed import Amount, Positive
from featherweight.catalogue import recipe
from featherweight.core.draws import undrawn
from featherweight.core.features import matched
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.surgery import Layer
from featherweight.core.task import Task, eval_mode, first, loss_of, run
from featherweight.core.taught import teacher_of
from featherweight.distill import below, distill
from featherweight.ingredients.match.feature_distance import feature_distance


@recipe(
    paper="Gupta, Hoffman and Malik, CVPR 2016, arXiv:1507.00448",
    family="distill",
    needs={"train", "teacher"},
    small={"transfer_epochs": 1, "epochs": 1},
)
def cross_modal_transfer(
    model: nn.Module,
    task: Task,
    *,
    guided: Annotated[str, Layer("student")] | None = None,
    hint: Annotated[str, Layer("teacher")] | None = None,
    transfer_epochs: Amount = 10,
    transfer_lr: Positive = 1e-3,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Stage 1 minimises `||t(psi(b)) - phi(a)||^2` over pairs (a, b) without labels; stage 2 trains on labels of b.

    phi is a layer of the teacher, which sees the modality a (`task.teacher_split` says what that is of a batch), psi a
    layer of the model, which sees b; t is the identity, or a 1x1 convolution where their channels differ. Pairs are the
    task's calibration batches, labelled or not, or the training batches where there are none.
    Source: Cross Modal Distillation for Supervision Transfer.

    Departs from the paper: only its abstract and secondary sources were available. The mean over units in place of the
    sum; maps of unequal size are pooled to the smaller; layers that are not named are the last maps of both networks;
    the layers above start from the weights given; the fusion of both modalities' networks is left to the user; Adam.

    Args:
        guided: the model's layer, psi.
        hint: the teacher's layer, phi.
        transfer_epochs: passes over the pairs.
        transfer_lr: learning rate of stage 1.
        epochs: passes over the labelled training data; 0 leaves stage 2 out.
        lr: learning rate of stage 2.
        optimizer: as in `fit`.

    Raises:
        MissingNeed: stage 2 needs labels, and the training data have none.
    """
    teacher, pairs = teacher_of(model, task), task.calibrating()
    if epochs:
        check_labels(model, task)
    batch = first(pairs, "paired")
    if guided is None or hint is None:
        ours, theirs = matched(model, teacher, task, batch, "deep")[0]
        guided, hint = guided or ours, hint or theirs
    note(f"the teacher's layer {hint}, of its modality, guides the model's layer {guided}, of the model's")
    distill(
        model,
        replace(task, train=pairs),
        match=feature_distance,
        pairs=[(guided, hint)],
        labels=0,
        weight=1,
        whole=False,
        epochs=transfer_epochs,
        lr=transfer_lr,
        optimizer=optimizer,
        params=below(model, task, batch, guided),
    )
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer)


def check_labels(model: nn.Module, task: Task) -> None:
    """Refuses training data without the labels that stage 2 needs, before stage 1 has taken its time."""
    with undrawn(), eval_mode(model):
        loss_of(task, *run(model, task, first(task.train or (), "training")))
