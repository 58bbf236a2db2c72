"""Training beside a teacher: a step, or every training of a task, with the teacher's class probabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from featherweight.catalogue import fill
from featherweight.core.fit import Step, task_loss
from featherweight.core.ledger import note
from featherweight.core.task import Batch, Task, device_of, eval_mode, loss_of, prediction, run, to_device
from featherweight.errors import BadOption, MissingNeed


def taught(task: Task, model: nn.Module, share: float) -> Step | None:
    """`(1 - share) loss + share t^2 KL(teacher || model)`, as two named terms; None, the task's loss, without a share.

    The probabilities are softened by the temperature of the ingredient `softened`.

    Raises:
        MissingNeed: the task has no teacher.
        BadOption: the teacher is the model itself.
    """
    if not share:
        return None
    teacher, match = teacher_of(model, task, "this training"), fill("match", "softened")

    def step(student: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        output, target = run(student, task, batch)
        with eval_mode(teacher):
            shown, _ = run(teacher, task.of_teacher(), batch)
        seen, wanted = {"": prediction(output)}, {"": to_device(prediction(shown), device_of(model))}
        terms = {"labels": (1 - share) * loss_of(task, output, target)} if share < 1 else {}
        return terms | {"teacher": share * match(seen, wanted, batch, progress)}

    return step


def under_teacher(task: Task, share: float) -> Task:
    """The task, with a training loop in which the teacher has its share of every loss, whatever else is in it.

    A training that minimises L minimises `(1 - share) L + share t^2 KL(teacher || model)` on the inputs that it gave
    the model. A step that does not run the model as a whole stays as it is, and that is noted.

    Raises:
        MissingNeed: the task has no teacher.
        BadOption: the teacher scores other classes than the model.
    """
    match = fill("match", "softened")

    def fit(model: nn.Module, task: Task, *, epochs: float, **options: Any) -> nn.Module:
        teacher, calls = teacher_of(model, task, "this training"), list[tuple[Any, ...]]()
        own: Step = options.pop("step", None) or task_loss(task)

        def seen(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.append((args, kwargs, output))

        def step(student: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
            calls.clear()
            terms = own(student, batch, progress)
            if not calls:
                note("a training that does not run the network as a whole has no teacher")
                return terms
            args, kwargs, output = calls[-1]
            calls.clear()
            with eval_mode(teacher):
                given = to_device((args, kwargs), device_of(teacher))
                shown = to_device(prediction(teacher(*given[0], **given[1])), device_of(model))
            terms = {name: (1 - share) * term for name, term in terms.items()}
            return terms | {"teacher": share * match({"": prediction(output)}, {"": shown}, batch, progress)}

        hook = model.register_forward_hook(seen, with_kwargs=True)
        try:
            return before(model, task, epochs=epochs, step=step, **options)
        finally:
            hook.remove()

    before = task.fit
    return replace(task, fit=fit)


def teacher_of(model: nn.Module, task: Task, what: str = "distillation", *, same_inputs: bool = False) -> nn.Module:
    """The task's teacher, which `what` needs.

    Args:
        same_inputs: whether it must be shown what the model is shown.

    Raises:
        MissingNeed: there is none.
        BadOption: it is the student itself, has no weights, or is shown something else where it must not.
    """
    if task.teacher is None:
        raise MissingNeed(f"{what} needs a teacher, which this task does not have: pass Task(teacher=...)")
    if task.teacher is model:
        raise BadOption("the teacher is the very model that is trained: pass Task(teacher=copy.deepcopy(model))")
    if any(value.is_meta for value in (*task.teacher.parameters(), *task.teacher.buffers())):
        raise BadOption("the teacher has no weights, only their shapes (device meta): load them before it teaches")
    if same_inputs and task.teacher_split is not None:
        raise BadOption(f"{what} shows the teacher what it shows the model: leave teacher_split out of the task")
    return task.teacher
