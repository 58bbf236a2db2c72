"""Pruning by the importance that life-long learning gives to weights: EWC, synaptic intelligence, MAS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive
from featherweight.catalogue import recipe
from featherweight.core.curvature import fisher_diagonal, ggn_diagonal, output_sensitivity, some_batches
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note, skip
from featherweight.core.masks import free, hidden, largest, masks, set_masks, settle, told
from featherweight.core.site import Site, sites
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task
from featherweight.errors import BadOption

Tensors = dict[str, Tensor]


@recipe(
    paper="Kirkpatrick et al., PNAS 2017, arXiv:1612.00796; Zenke et al., ICML 2017, arXiv:1703.04200; "
    "Aljundi et al., ECCV 2018, arXiv:1711.09601",
    family="prune",
    needs={"labels", "train"},
    shrinks={"weights"},
    small={"epochs": 1, "finetune": 1},
)
def lifelong_importance(
    model: nn.Module,
    task: Task,
    *,
    by: Literal["si", "ewc", "mas"] = "si",
    sparsity: Fraction = 0.9,
    scope: Literal["global", "layer"] = "global",
    damping: Positive = 0.1,
    fisher: Literal["labels", "model"] = "labels",
    calibration_batches: Count = 8,
    epochs: Amount = 4,
    finetune: Amount = 8,
    lr: Positive = 0.01,
    optimizer: Optimizers = "sgd",
    where: WhereWeighted = None,
) -> nn.Module:
    """Scores weights by what life-long learning protects so as not to forget; masks the lowest, and fine-tunes.

    "ewc" (James Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017): `F w^2 / 2`
    with `F` the mean of the squared gradients of log p by w. "si" (Friedemann Zenke, Ben Poole, Surya Ganguli,
    "Continual Learning Through Synaptic Intelligence", ICML 2017): while training, `omega = sum_t -g dw`, and
    `Omega = omega / (Delta^2 + damping)` with `Delta` the way that the weight went; the score is `Omega w^2`. "mas"
    (Rahaf Aljundi et al., "Memory Aware Synapses", ECCV 2018): `E |d ||f(x)||^2 / dw|` times `|w|`; of these it alone
    scores without labels.

    Departs from the paper: none of the three prunes; the score is each one's penalty for setting the weight to zero
    (for "mas", which weighs squared changes there, to first order in w). The paths of "si" are those of `epochs` of
    training that start from the weights that come, where the paper follows a task from its first step. A weight whose
    path raised the loss has a negative score.

    Args:
        by: which importance.
        sparsity: fraction of the weights removed.
        scope: "global" ranks all chosen layers together, "layer" each apart.
        damping: xi of "si", which keeps weights that hardly moved from being infinitely important.
        fisher: of "ewc": gradients of the loss at the "labels" (empirical), or their expectation over what the "model"
            predicts, which is the diagonal that optimal brain damage uses.
        calibration_batches: batches that "ewc" and "mas" look at, a few hundred samples.
        epochs: of the training that "si" follows; the others need none, and have none.
        finetune: epochs with the mask, the learning rate falling to zero.
        lr: learning rate of both.
        optimizer: "sgd" (default), "adam" or "adamw".
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: an option outside its range, no layer whose weights are free, or "si" without training.
        BadData: scores are NaN, or the loss is not finite.
    """
    found = sites(model, where)
    allowed = masks(found)
    if by == "si":
        found = movable(found)
        omega, moved = path_integral(model, task, found, epochs=epochs, lr=lr, optimizer=optimizer)
        if not any(one.any() for one in omega.values()):
            raise BadOption(
                f"si follows weights while they train, but in epochs={epochs:g} none has moved: raise epochs, or "
                "choose ewc or mas (a fit of your own must call after_backward and after_step)"
            )
        scores = {p: omega[p] / (moved[p].square() + damping) * hidden(site).cpu().double().square()
                  for p, site in found.items()}  # fmt: skip
    else:
        scores = importance(model, task, found, by, fisher, calibration_batches)
    goals = dict.fromkeys(found, sparsity)
    set_masks(model, found, largest(scores, goals, within=allowed, together=scope == "global"))
    settle(model, found)
    note(told(found))
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def importance(
    model: nn.Module, task: Task, found: Mapping[str, Site], by: str, fisher: str, batches: int | None
) -> Tensors:
    """The scores of "ewc", `F w^2 / 2`, or of "mas", of each weight's shape, float64."""
    data = some_batches(task, batches)
    size = {path: site.weight.cpu().double().abs() for path, site in found.items()}
    if by == "mas":
        return {p: one * size[p] for p, one in output_sensitivity(model, task, found, data).items()}
    diagonal = fisher_diagonal if fisher == "labels" else ggn_diagonal
    return {p: one * size[p].square() / 2 for p, one in diagonal(model, task, found, data).items()}


def movable(found: Mapping[str, Site]) -> dict[str, Site]:
    """The sites whose weights themselves are trained.

    Raises:
        BadOption: there are none.
    """
    for path, site in found.items():
        if free(site) is None:
            skip(path, "another form holds its weight, so that it has no path of its own")
    able = {path: site for path, site in found.items() if free(site) is not None}
    if not able:
        raise BadOption("no chosen layer has weights that are free to move: choose ewc or mas, or bake the model first")
    return able


def path_integral(
    model: nn.Module, task: Task, found: Mapping[str, Site], *, epochs: float, lr: float, optimizer: Optimizers
) -> tuple[Tensors, Tensors]:
    """Trains, and returns `sum_t -g dw` (how much each weight lowered the loss) and how far each went, float64."""
    weights = {path: held for path, site in found.items() if (held := free(site)) is not None}
    start = {path: held.detach().cpu().double() for path, held in weights.items()}
    omega = {path: torch.zeros_like(one) for path, one in start.items()}
    before: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(progress: float) -> None:
        for path, held in weights.items():
            grad = torch.zeros_like(held) if held.grad is None else held.grad
            before[path] = (held.detach().clone(), grad.detach().clone())

    def add(progress: float) -> None:
        for path, held in weights.items():
            was, grad = before[path]
            omega[path] -= (grad.double() * (held.detach().double() - was.double())).cpu()

    follow: dict[str, Callable[[float], None]] = {"after_backward": remember, "after_step": add}
    task.fit(
        model, task, epochs=epochs, lr=lr, optimizer=optimizer, decay="constant", label="follow the paths", **follow
    )
    return omega, {path: held.detach().cpu().double() - start[path] for path, held in weights.items()}
