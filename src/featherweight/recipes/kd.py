"""Knowledge distillation: the student learns the teacher's softened class probabilities."""

from __future__ import annotations

from functools import partial

from torch import nn

from featherweight.allowed import Amount, File, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.task import Task
from featherweight.distill import distill
from featherweight.ingredients.match.softened import softened


@recipe(
    paper="Hinton, Vinyals and Dean, 2015, arXiv:1503.02531",
    family="distill",
    needs={"labels", "train", "teacher"},
    small={"epochs": 1},
)
def kd(
    model: nn.Module,
    task: Task,
    *,
    temperature: Positive = 4.0,
    alpha: Share = 0.9,
    weight: Amount | None = None,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    teacher_cache: File | None = None,
) -> nn.Module:
    """Trains on `(1 - alpha) H(y, p_S) + alpha t^2 KL(p_T^t || p_S^t)`, the teacher's probabilities softened by t.

    With `weight` the loss is `H(y, p_S) + weight H(p_T^t, p_S^t)`, whose gradients are 1 / (1 - alpha) times as large
    at weight = alpha t^2 / (1 - alpha). Its entropy of the teacher, which has no gradient, is left out.

    Departs from the paper: the defaults (t=4, alpha=0.9) are those of later benchmarks; the paper has t=20 on MNIST.

    Args:
        temperature: t, above 1 softens; applied to both networks.
        alpha: share of the teacher, the labels have the rest.
        weight: the other way to say alpha; absorbs t^2.
        epochs: passes over the training data.
        lr: learning rate.
        optimizer: as in `fit`.
        teacher_cache: folder in which the teacher's outputs are kept, as in `distill`.
    """
    match = partial(softened, temperature=temperature)
    mix = (1 - alpha, alpha) if weight is None else (1.0, weight / temperature**2)
    return distill(
        model,
        task,
        match=match,
        labels=mix[0],
        weight=mix[1],
        epochs=epochs,
        lr=lr,
        optimizer=optimizer,
        teacher_cache=teacher_cache,
    )
