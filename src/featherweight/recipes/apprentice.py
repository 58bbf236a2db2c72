"""Apprentice: a network on few bits learns from one of full precision, together with it, from it, or continuing it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from featherweight.allowed import Amount, Bits, Count, Positive
from featherweight.catalogue import Slot, recipe
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.peers import predicted
from featherweight.core.restart import reinitialise
from featherweight.core.task import Batch, Task, device_of, eval_mode, loss_of, prediction, run
from featherweight.core.taught import teacher_of
from featherweight.ingredients.match.softened import softened
from featherweight.quantize import Grid, Range, quantize


@recipe(
    paper="Mishra and Marr, ICLR 2018, arXiv:1711.05852",
    family="distill",
    needs={"labels", "train", "teacher"},
    shrinks={"bits"},
    small={"epochs": 1, "keep_first_last": False},
)
def apprentice(
    model: nn.Module,
    task: Task,
    *,
    scheme: Literal["A", "B", "C"] = "C",
    weights: Annotated[str, Slot("grid")] | Grid | None = "ternary",
    weight_bits: Bits = 2,
    acts: Annotated[str, Slot("range")] | Range | None = "minmax",
    act_bits: Bits = 8,
    keep_first_last: bool = True,
    calibration_batches: Count = 16,
    beta: Amount = 0.5,
    gamma: Amount = 0.5,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Trains through the grids on `beta H(y, p_A) + gamma KL(p_T || p_A)`, the temperature 1.

    Scheme A trains the teacher along, on `H(y, p_T)`, both from new weights. In scheme B the teacher stays as it is and
    the apprentice starts from new weights. In scheme C it starts from the weights given, on their grids.
    Source: Apprentice: Using Knowledge Distillation Techniques to Improve Low-Precision Network Accuracy.

    Departs from the paper: the divergence in place of the cross-entropy of the teacher's probabilities, which has the
    same gradient as these are constants; beta and gamma are from memory; Adam, fewer epochs.

    Args:
        scheme: A, B or C.
        weights: grid of the weights (slot `grid`), None leaves them float.
        weight_bits: bits of a weight.
        acts: range of the activations (slot `range`), None leaves them float.
        act_bits: bits of an activation.
        keep_first_last: leave the first and the last layer that run in float.
        calibration_batches: how many batches the activation ranges are taken from.
        beta: weight of the labels.
        gamma: weight of the teacher.
        epochs: passes over the training data.
        lr: learning rate.
        optimizer: as in `fit`.
    """
    teacher = teacher_of(model, task)
    if scheme == "A":
        teacher = reinitialise(copy.deepcopy(teacher)).to(device_of(model)).requires_grad_(True).train()
    if scheme in ("A", "B"):
        reinitialise(model)
    note(f"scheme {scheme}: the teacher {'trains along' if scheme == 'A' else 'stays as it is'}")

    def step(student: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        output, target = run(student, task, batch)
        if scheme == "A":
            shown = predicted(teacher, task.of_teacher(), batch)
        else:
            with eval_mode(teacher):
                shown = prediction(run(teacher, task.of_teacher(), batch)[0])
        seen = {"": prediction(output)}
        terms = {"labels": beta * loss_of(task, output, target)} if beta else {}
        if gamma:
            terms["teacher"] = gamma * softened(seen, {"": shown.to(seen[""].device)}, batch, progress, temperature=1.0)
        return terms

    def teaching(student: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        return {"teacher": loss_of(task, *run(teacher, task.of_teacher(), batch))}

    given = task

    def both(model: nn.Module, task: Task, *, epochs: float, **options: Any) -> nn.Module:
        options |= {"step": step, "label": "apprentice"}
        options |= {"also": [(list(teacher.parameters()), teaching)]} if scheme == "A" else {}
        return given.fit(model, given, epochs=epochs, **options)

    return quantize(
        model,
        replace(task, fit=both),
        weights=weights,
        weight_bits=weight_bits,
        acts=acts,
        act_bits=act_bits,
        keep_first_last=keep_first_last,
        calibration_batches=calibration_batches,
        epochs=epochs,
        lr=lr,
        optimizer=optimizer,
    )
