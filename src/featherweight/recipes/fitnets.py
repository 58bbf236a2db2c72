"""FitNets: a middle layer of the teacher guides a middle layer of the student, then the whole student is distilled."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from torch import nn

from featherweight.allowed import Amount, Positive
from featherweight.catalogue import recipe
from featherweight.core.features import features, middle
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.surgery import Layer
from featherweight.core.task import Batch, Task, device_of, eval_mode, first, to_device
from featherweight.core.taught import teacher_of
from featherweight.distill import below, distill, tapped
from featherweight.errors import unknown
from featherweight.ingredients.match.hint import Hint
from featherweight.ingredients.match.softened import softened


@recipe(
    paper="Romero et al., ICLR 2015, arXiv:1412.6550",
    family="distill",
    needs={"labels", "train", "teacher"},
    small={"hint_epochs": 1, "epochs": 1},
)
def fitnets(
    model: nn.Module,
    task: Task,
    *,
    hint: Annotated[str, Layer("teacher")] | None = None,
    guided: Annotated[str, Layer("student")] | None = None,
    hint_epochs: Amount = 5,
    hint_lr: Positive = 1e-3,
    temperature: Positive = 3.0,
    weight: Positive = 4.0,
    last_weight: Amount = 1.0,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Stage 1 fits the guided layer to the hint through a regressor (eq. 3); stage 2 distils the whole (eq. 2).

    Stage 2 minimises `H(y, p_S) + lambda KL(p_T^t || p_S^t)`, lambda falling linearly from `weight` to `last_weight`
    (4 to 1 as for CIFAR; the paper's MNIST ends at 0).

    Departs from the paper: Adam in place of RMSprop and fewer epochs; lambda falls over the whole of stage 2, where the
    authors hold it for the first 5 of 400 epochs; no early stopping; the hint loss is a mean over units. The regressor
    has a ReLU if one batch of the hint has no negative value and is linear otherwise, where the paper gives it the
    teacher's nonlinearity; a hint with a larger map than the guided layer's is average-pooled to its size; layers
    without maps have a linear layer for regressor. Layers that are not named are chosen here, the paper's by hand.

    Args:
        hint: path of the teacher's layer; its middle one when left out.
        guided: path of the student's layer; the same path or the layer nearest the middle with maps of the hint's
            size when left out.
        hint_epochs: passes of stage 1.
        hint_lr: learning rate of stage 1.
        temperature: t of stage 2.
        weight: lambda at the start of stage 2.
        last_weight: lambda at its end.
        epochs: passes of stage 2.
        lr: learning rate of stage 2.
        optimizer: as in `fit`.
    """
    teacher = teacher_of(model, task)
    batch = first(task.calibrating(), "training")
    guided, hint = choose(model, teacher, task, batch, guided, hint)
    note(f"the teacher's layer {hint} guides the student's layer {guided}")

    with eval_mode(model), eval_mode(teacher):
        ours, theirs = (
            tapped(m, m, t, batch, [p], whole=False)[0][p]
            for m, t, p in ((model, task, guided), (teacher, task.of_teacher(), hint))
        )
    match = Hint(guided, hint, ours, to_device(theirs, device_of(model)))
    note(f"the regressor has {sum(p.numel() for p in match.parameters()):,} parameters, in training only")
    distill(
        model,
        task,
        match=match,
        pairs=[(guided, hint)],
        labels=0,
        weight=1,
        whole=False,
        epochs=hint_epochs,
        lr=hint_lr,
        optimizer=optimizer,
        params=below(model, task, batch, guided),
    )

    def annealed(progress: float) -> float:
        return (weight + (last_weight - weight) * progress) / temperature**2  # the paper's lambda absorbs t^2

    soft = partial(softened, temperature=temperature)
    return distill(model, task, match=soft, labels=1, weight=annealed, epochs=epochs, lr=lr, optimizer=optimizer)


def choose(
    student: nn.Module, teacher: nn.Module, task: Task, batch: Batch, guided: str | None, hint: str | None
) -> tuple[str, str]:
    """The pair (guided, hint): what was given, else the teacher's middle layer and the student's that fits it best.

    Raises:
        UnknownName: a path that is no layer, or that is not called.
        BadOption: a network has no layer that could be taken.
    """
    ours, theirs = features(student, task, batch), features(teacher, task.of_teacher(), batch)
    for path, shapes, whose in ((guided, ours, "student"), (hint, theirs, "teacher")):
        if path is not None and path not in shapes:
            raise unknown(f"layer of the {whose}", path, shapes)
    hint = hint or middle(theirs, "teacher")
    wanted = theirs[hint]
    fitting = {p: s for p, s in ours.items() if len(s) == len(wanted) and _size(s) == _size(wanted)}
    if guided is None:
        guided = hint if hint in fitting else middle(fitting or ours, "student", list(ours))
    return guided, hint


def _size(shape: tuple[int, ...]) -> tuple[int, ...]:
    """What the regressor cannot change: the sides of a map, the number of tokens."""
    return shape[2:] if len(shape) == 4 else shape[1:-1]
