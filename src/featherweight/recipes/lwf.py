"""Learning without forgetting: a network learns a new task, and keeps its answers for the old one on the new data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Annotated

from annotated_types import Ge
from torch import Tensor, nn

from featherweight.allowed import Amount, Positive
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.task import Batch, Task, device_of, eval_mode, first, prediction, run
from featherweight.core.taught import teacher_of
from featherweight.errors import BadData, BadOption
from featherweight.ingredients.match.softened import softened


@recipe(
    paper="Li and Hoiem, ECCV 2016, arXiv:1606.09282",
    family="distill",
    needs={"labels", "train", "teacher"},
    small={"warm_up": 1, "epochs": 1},
)
def lwf(
    model: nn.Module,
    task: Task,
    *,
    new_classes: Annotated[int, Ge(0)] = 0,
    old_weight: Amount = 1.0,
    temperature: Positive = 2.0,
    warm_up: Amount = 5,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Warms the new outputs up alone, then trains all on `lambda_o KL(p_o^t || p'_o^t) + H(y_n, p_n)`.

    The teacher is the network before: its outputs are the old task's. Outputs of the model beyond them are the new
    task's, and the labels of its classes follow the old ones (with 10 old classes the first new one has the label 10).
    Where there are none, old and new task have the same classes, and there is nothing to warm up.

    Departs from the paper: the two heads are rows of one last layer; the divergence in place of the cross-entropy of
    the recorded probabilities, which has the same gradient; these are computed as they are needed, not recorded; Adam,
    no weight decay unless the optimizer has it.

    Args:
        new_classes: how many outputs the last linear layer gets beside its own, before all else.
        old_weight: lambda_o.
        temperature: t, without the factor t^2.
        warm_up: passes over the training data for the new outputs alone; no statistics change meanwhile.
        epochs: passes of the joint training.
        lr: learning rate.
        optimizer: as in `fit`.

    Raises:
        BadOption: the model has fewer outputs than the teacher, or no last linear layer to widen.
        BadData: labels of the new task that lie among the old classes.
    """
    teacher = teacher_of(model, task)
    batch = first(task.train or (), "training")
    if new_classes:
        widen(model, classes(model, task, batch), new_classes)
    old, every = classes(teacher, task.of_teacher(), batch), classes(model, task, batch)
    if every < old:
        raise BadOption(
            f"the model has {every} outputs, the teacher, whose task it is to keep, {old}: pass new_classes="
        )
    note(f"{old} outputs keep what they said, {every - old or 'the same'} learn the new task")

    def new_loss(output: Tensor, target: Tensor) -> Tensor:
        if every == old:
            return task.loss(output, target)
        if int(target.min()) < old:
            raise BadData(
                f"the new task's labels follow those of the {old} old classes, but {int(target.min())} is there"
            )
        return task.loss(prediction(output)[:, old:], target - old)

    def joint(student: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        output, target = run(student, task, batch)
        terms = {"new": new_loss(output, target)}
        if old_weight:
            with eval_mode(teacher):
                shown = prediction(run(teacher, task.of_teacher(), batch)[0]).to(device_of(model))
            seen = {"": prediction(output)[:, :old]}
            kept = softened(seen, {"": shown}, batch, progress, temperature=temperature)
            terms["old"] = old_weight / temperature**2 * kept
        return terms

    if every > old and warm_up:
        warm(model, task, new_loss, old, every, epochs=warm_up, lr=lr, optimizer=optimizer)
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, step=joint)


def classes(model: nn.Module, task: Task, batch: Batch) -> int:
    """The number of outputs of a network."""
    with eval_mode(model):
        out = prediction(run(model, task, batch)[0])
    return out.shape[1] if out.dim() > 1 else 1


def head(model: nn.Module, outputs: int) -> tuple[str, nn.Linear]:
    """The last linear layer with so many outputs, and its path.

    Raises:
        BadOption: there is none.
    """
    found = [(p, m) for p, m in model.named_modules() if p and type(m) is nn.Linear and m.out_features == outputs]
    if not found:
        raise BadOption(f"the model has no last linear layer with {outputs} outputs: pass one that has the new outputs")
    return found[-1]


def widen(model: nn.Module, outputs: int, count: int) -> None:
    """Gives the last linear layer `count` more outputs, with new weights; the old ones stay as they are."""
    path, old = head(model, outputs)
    new = nn.Linear(old.in_features, outputs + count, bias=old.bias is not None).to(old.weight)
    for name, param in old.named_parameters():
        getattr(new, name).data[:outputs] = param.data
    model.set_submodule(path, new.train(old.training))


def warm(
    model: nn.Module,
    task: Task,
    loss: Callable[[Tensor, Tensor], Tensor],
    old: int,
    every: int,
    *,
    epochs: float,
    lr: float,
    optimizer: Optimizers,
) -> None:
    """Trains the rows of the last layer that belong to new outputs; nothing else changes."""
    _, last = head(model, every)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    model.training = True  # what is in evaluation mode beneath a model in training mode stays in it

    def step(student: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        return {"new": loss(*run(student, task, batch))}

    def only_new(progress: float) -> None:
        for param in last.parameters():
            if param.grad is not None:
                param.grad[:old] = 0

    held = copy.deepcopy(last.state_dict())
    params = list(last.parameters())
    task.fit(
        model, task, epochs=epochs, lr=lr, optimizer=optimizer, step=step, params=params, after_backward=only_new,
        label="warm up",
    )  # fmt: skip
    for name, value in held.items():  # an optimizer with weight decay moves what has no gradient, too
        last.state_dict()[name][:old] = value[:old]
    for module, training in modes.items():
        module.training = training
