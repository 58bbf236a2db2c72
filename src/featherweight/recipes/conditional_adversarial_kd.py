"""A learned loss: a discriminator of logits, which also knows the classes, teaches the student beside the labels."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.allowed import Amount, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.adversary import Discriminator, from_teacher
from featherweight.core.features import rows, scores
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.task import Batch, Task, device_of, eval_mode, first, loss_of, prediction, run
from featherweight.core.taught import teacher_of
from featherweight.errors import BadOption


@recipe(
    paper="Xu, Hsu and Huang, BMVC 2018, arXiv:1709.00513",
    family="distill",
    needs={"labels", "train", "teacher"},
    small={"epochs": 1},
)
def conditional_adversarial_kd(
    model: nn.Module,
    task: Task,
    *,
    adversarial: Amount = 1.0,
    absolute: Amount = 1.0,
    smooth: Share = 0.1,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Trains on `H(y, p_S) + |z_S - z_T|_1 - log r(z_S) - log c_y(z_S)` and in turn the discriminator (r, c) of logits.

    The discriminator maximises `log r(z_T) + log(1 - r(z_S)) + log c_y(z_T) + log c_y(z_S)`, r the probability that
    logits are the teacher's and c_y that of their class.
    Source: Training Shallow and Thin Networks for Acceleration via Knowledge Distillation with Conditional Adversarial
    Networks.

    Departs from the paper: constants are from memory: the layers of the discriminator (128, 256, 128), equal weights;
    no dropout in it; "from the teacher" has the probability 0.9, not 1, so that it does not win at once; |.|_1 is the
    mean over classes; the discriminator has the student's optimizer, Adam.

    Args:
        adversarial: weight of the two learned terms.
        absolute: weight of the distance of logits.
        smooth: how far below 1 the discriminator's target for the teacher lies.
        epochs: passes over the training data.
        lr: learning rate of both.
        optimizer: as in `fit`, of both.
    """
    teacher = teacher_of(model, task)
    with eval_mode(model):
        classes = rows(prediction(run(model, task, first(task.train or (), "training"))[0])).shape[1]
    if classes < 2:
        raise BadOption("the model puts out one number: this method needs the scores of at least two classes")
    judge = Discriminator(classes, classes).to(device_of(model))
    note(f"the discriminator has {sum(p.numel() for p in judge.parameters()):,} parameters, in training only")

    def logits(student: nn.Module, batch: Batch) -> tuple[Any, Any, Tensor, Tensor]:
        output, target = run(student, task, batch)
        with eval_mode(teacher):
            shown = prediction(run(teacher, task.of_teacher(), batch)[0]).to(device_of(model))
        return output, target, *scores({"": prediction(output)}, {"": shown})

    def learn(student: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        output, target, ours, theirs = logits(student, batch)
        return {"labels": loss_of(task, output, target)} | misleading(
            judge, ours, theirs, target, adversarial, absolute
        )

    def judged(student: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        _, target, ours, theirs = logits(student, batch)
        return {"discriminator": telling(judge, ours.detach(), theirs, target, smooth)}

    also = [(list(judge.parameters()), judged)]
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, step=learn, also=also, label="distill")


def misleading(
    judge: Discriminator, ours: Tensor, theirs: Tensor, y: Tensor, adversarial: float, absolute: float
) -> dict[str, Tensor]:
    """The student's terms: the distance of logits (n, classes), `-log r(z_S)` and `-log c_y(z_S)`."""
    terms = {"absolute": absolute * (ours - theirs).abs().mean()} if absolute else {}
    if adversarial:
        origin, classes = judge(ours)
        terms["origin"] = adversarial * from_teacher(origin, 1.0)
        terms["category"] = adversarial * F.cross_entropy(classes, y.flatten())
    return terms


def telling(judge: Discriminator, ours: Tensor, theirs: Tensor, y: Tensor, smooth: float = 0.0) -> Tensor:
    """The discriminator's loss."""
    (real, real_classes), (fake, fake_classes) = judge(theirs), judge(ours)
    origin = from_teacher(real, 1.0 - smooth) + from_teacher(fake, 0.0)
    return origin + F.cross_entropy(real_classes, y.flatten()) + F.cross_entropy(fake_classes, y.flatten())
