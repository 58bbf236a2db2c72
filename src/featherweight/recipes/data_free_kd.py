"""Distillation without data: inputs are made up that excite the teacher as its classes did on average, then learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.features import exact, rows
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.progress import track
from featherweight.core.task import Task, device_of, eval_mode, prediction, run
from featherweight.core.taught import teacher_of
from featherweight.distill import Term, learn, unchanged
from featherweight.errors import BadData, BadOption
from featherweight.ingredients.match.softened import softened
from featherweight.recipes.bucila_compression import Shuffled, gathered


@dataclass(frozen=True)
class Metadata:
    """What is kept of the data: for each class the mean and a factor of the covariance of the teacher's logits.

    `factors` L have `L L^T` = covariance. Of the inputs: shape of one, mean, standard deviation, name where the network
    is called by names.
    """

    means: Mapping[int, Tensor]
    factors: Mapping[int, Tensor]
    shape: tuple[int, ...]
    mean: float
    std: float
    key: str | None


@recipe(
    paper="Lopes, Fenu and Starner, 2017, arXiv:1710.07535",
    family="distill",
    needs={"calibration", "teacher"},
    small={"inputs": 8, "steps": 5, "batch": 16, "epochs": 2},
)
def data_free_kd(
    model: nn.Module,
    task: Task,
    *,
    inputs: Count = 640,
    steps: Count = 1000,
    input_lr: Positive = 0.05,
    batch: Count = 64,
    temperature: Positive = 8.0,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Makes up inputs of every class from the teacher's metadata, then minimises `KL(p_T^t || p_S^t)` on them alone.

    Logits a* are drawn from the normal distribution that the class had, and an input is moved until the mean of
    `(relu(a*) - relu(a(x)))^2` is small. The calibration data serve for the metadata and for nothing else.
    Source: Data-Free Knowledge Distillation for Deep Neural Networks.

    Departs from the paper: of its metadata only those of the layer before the softmax (`top_layer`); classes are those
    that the teacher sees, not labels; made-up inputs start from the data's mean and standard deviation, which count as
    metadata, where the paper has fixed ones; 640 inputs a class, the paper has 300 batches of 64.

    Args:
        inputs: made up for each class.
        steps: of Adam on each batch of inputs.
        input_lr: its learning rate.
        batch: how many inputs are made, and learned, at once.
        temperature: t, of teacher and student.
        epochs: passes over what was made up.
        lr: learning rate of the student.
        optimizer: as in `fit`, of the student.

    Raises:
        BadData: the network has more than one input, or none of real numbers.
        BadOption: it does not score two classes.
    """
    teacher = teacher_of(model, task)
    known = metadata(teacher, task)
    make = partial(made_up, teacher, task, known, count=inputs, steps=steps, lr=input_lr, batch=batch)
    made = [x for c in known.means for x in make(c)]
    note(f"{sum(map(len, made)):,} inputs of {len(known.means)} classes made up; no data were learned")
    data = Shuffled(torch.cat(made), batch, known.key)
    terms = {"teacher": Term(partial(softened, temperature=temperature), 1 / temperature**2)}  # without t^2
    return learn(model, replace(task, train=data), terms, labels=0, epochs=epochs, lr=lr, optimizer=optimizer)


def metadata(teacher: nn.Module, task: Task) -> Metadata:
    """What the calibration data leave behind.

    Raises:
        BadData, BadOption: as the method.
    """
    x, _, key = gathered(task, task.calibrating())
    found = []
    with eval_mode(teacher):
        for part in task.calibrating():
            found.append(rows(prediction(run(teacher, task, part)[0])).cpu())
    logits = torch.cat(found)
    if logits.shape[1] < 2:
        raise BadOption("the teacher puts out one number: this method needs the scores of at least two classes")
    if len(logits) != len(x):
        raise BadData("the teacher scores positions, not whole inputs: choose a method that learns from data")
    said = logits.argmax(1)
    members = {int(c): logits[said == c] for c in said.unique()}
    return Metadata(
        means={c: a.mean(0) for c, a in members.items()},
        factors={c: factor(a) for c, a in members.items()},
        shape=tuple(x.shape[1:]),
        mean=float(x.mean()),
        std=float(x.std()),
        key=key,
    )


def factor(a: Tensor) -> Tensor:
    """L with `L L^T` = covariance of rows a (n, d); of their variances alone where it is not positive definite.

    >>> factor(torch.tensor([[0.0, 0.0], [2.0, 0.0]])).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    spread = a - a.mean(0)
    covariance = spread.T @ spread / len(a)
    found, failed = torch.linalg.cholesky_ex(covariance)
    return found if int(failed) == 0 else covariance.diagonal().sqrt().diag()


def made_up(
    teacher: nn.Module, task: Task, known: Metadata, c: int, count: int, *, steps: int, lr: float, batch: int
) -> list[Tensor]:
    """Batches of inputs that excite the teacher as class c does."""
    device, found = device_of(teacher), []
    for start in track(range(0, count, batch), f"inputs of class {c}", -(-count // batch)):
        size = min(batch, count - start)
        wanted = known.means[c] + torch.randn(size, len(known.means[c])) @ known.factors[c].T
        x = (known.mean + known.std * torch.randn(size, *known.shape)).to(device).requires_grad_(True)
        adam = torch.optim.Adam([x], lr=lr)
        with unchanged(teacher):
            for _ in range(steps):
                given = (x,) if known.key is None else {known.key: x}
                a = exact(prediction(run(teacher, task, given)[0]))
                loss = (wanted.to(a).relu() - a.relu()).square().mean()
                (x.grad,) = torch.autograd.grad(loss, x)
                adam.step()
        found.append(x.detach().cpu())
    return found
