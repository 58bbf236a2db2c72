"""A training step beside a teacher: the task's loss and the teacher's class probabilities."""

from __future__ import annotations

from torch import Tensor, nn

from featherweight.catalogue import fill
from featherweight.core.fit import Step
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


def teacher_of(model: nn.Module, task: Task, what: str = "distillation") -> nn.Module:
    """The task's teacher, which `what` needs.

    Raises:
        MissingNeed: there is none.
        BadOption: it is the student itself.
    """
    if task.teacher is None:
        raise MissingNeed(f"{what} needs a teacher, which this task does not have: pass Task(teacher=...)")
    if task.teacher is model:
        raise BadOption("the teacher is the very model that is trained: pass Task(teacher=copy.deepcopy(model))")
    return task.teacher
