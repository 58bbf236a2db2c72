"""FSP: the flow of features through the teacher initialises the student, which the task then trains."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from featherweight.allowed import Amount, Positive
from featherweight.catalogue import recipe
from featherweight.core.features import matched
from featherweight.core.fit import Optimizers
from featherweight.core.task import Task, first
from featherweight.core.taught import teacher_of
from featherweight.distill import Term, below, learn
from featherweight.ingredients.match.gram_matrices import gram_matrices


@recipe(
    paper="Yim, Joo, Bae and Kim, CVPR 2017",
    family="distill",
    needs={"labels", "train", "teacher"},
    small={"flow_epochs": 1, "epochs": 1},
)
def fsp(
    model: nn.Module,
    task: Task,
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    flow_epochs: Amount = 5,
    flow_lr: Positive = 1e-3,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Stage 1 fits the Gram matrices between consecutive layers to the teacher's (eq. 2); stage 2 trains on the task.

    Source: A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning.

    Departs from the paper: it starts from the student's weights as they are; each matrix is between the ends of two
    consecutive stages (the first layer counts as one), where the paper has the first and the last layer of a group;
    fewer steps; layers of unequal widths are joined by a 1x1 convolution, where the paper has equal ones.

    Args:
        pairs: (student's layer, teacher's layer) in order; the first layer and the last one with maps of each size when
            left out.
        flow_epochs: passes of stage 1.
        flow_lr: learning rate of stage 1.
        epochs: passes of stage 2.
        lr: learning rate of stage 2.
        optimizer: as in `fit`.
    """
    batch = first(task.calibrating(), "training")
    pairs = pairs if pairs is not None else matched(model, teacher_of(model, task), task, batch, "stages")
    flow = {"flow": Term(gram_matrices, pairs=pairs)}
    trunk = below(model, task, batch, pairs[-1][0]) if pairs else None
    learn(model, task, flow, labels=0, whole=False, epochs=flow_epochs, lr=flow_lr, optimizer=optimizer, params=trunk)
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer)
