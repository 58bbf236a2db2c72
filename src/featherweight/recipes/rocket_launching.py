"""Rocket launching: a light network and a booster share their first layers and learn together; the first is kept."""

from __future__ import annotations

import copy
from typing import Annotated

from annotated_types import Ge
from torch import Tensor, nn

from featherweight.allowed import Amount, Positive
from featherweight.catalogue import recipe
from featherweight.core.features import scores
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.surgery import WEIGHTED
from featherweight.core.task import Batch, Task, device_of, loss_of, prediction, run
from featherweight.core.taught import teacher_of


@recipe(
    paper="Zhou, Fan, Cui, Bian, Zhu and Gai, AAAI 2018, arXiv:1708.04106",
    family="distill",
    needs={"labels", "train", "teacher"},
    small={"epochs": 1},
)
def rocket_launching(
    model: nn.Module,
    task: Task,
    *,
    shared: Annotated[int, Ge(0)] = 1,
    hint: Amount = 0.03,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Trains `H(y, p_light) + H(y, p_booster) + lambda / B sum ||z_light - z_booster||^2`.

    The hint's gradient stops at the booster, a copy of the task's teacher; both cross-entropies reach the layers that
    are shared; batch norms are not shared. What comes back is the light network.
    Source: Rocket Launching: A Universal and Efficient Framework for Training Well-performing Light Net.

    Departs from the paper: both networks start from the weights they have; only layers at the bottom are shared, as
    many of the first ones as have the same type and shape in both; no further teacher; Adam.

    Args:
        shared: how many of the first layers with weights the two share, where they have the same shape.
        hint: lambda.
        epochs: passes over the training data.
        lr: learning rate.
        optimizer: as in `fit`.
    """
    booster = (
        copy.deepcopy(teacher_of(model, task, "rocket_launching", same_inputs=True))
        .to(device_of(model))
        .requires_grad_(True)
        .train()
    )
    paths = share(model, booster, shared)
    note(f"light network and booster share {', '.join(paths) or 'no layer'}; the booster is in training only")
    params = list(dict.fromkeys([*model.parameters(), *booster.parameters()]))

    def step(light: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        output, target = run(light, task, batch)
        boosted, _ = run(booster, task, batch)
        terms = {"light": loss_of(task, output, target), "booster": loss_of(task, boosted, target)}
        if hint:
            ours, theirs = scores({"": prediction(output)}, {"": prediction(boosted)})  # theirs are constants
            terms["hint"] = hint * (ours - theirs).square().sum(1).mean()
        return terms

    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, step=step, params=params)


def share(light: nn.Module, booster: nn.Module, count: int) -> list[str]:
    """Puts the first layers of the light network into the booster; their paths in the light network."""
    ours, theirs = ([(p, m) for p, m in net.named_modules() if isinstance(m, WEIGHTED)] for net in (light, booster))
    paths = []
    for (path, layer), (at, other) in list(zip(ours, theirs, strict=False))[:count]:
        shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (layer, other)]
        if not at or not path or str(layer) != str(other) or shapes[0] != shapes[1]:
            break
        booster.set_submodule(at, layer)
        paths.append(path)
    return paths
