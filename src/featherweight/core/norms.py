"""Running statistics of batch norms, taken again after the network before them has changed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.core.task import Task, eval_mode, run
from featherweight.errors import BadData

RUNNING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fit_and_settle(model: nn.Module, task: Task, *, epochs: float, **options: Any) -> nn.Module:
    """Trains, and then takes the statistics of batch norms anew: those of training are behind weights that jump.

    Args:
        epochs: passes over the training data; with none the network is left as it is.
        options: as in `fit`.
    """
    task.fit(model, task, epochs=epochs, **options)
    return settle_norms(model, task) if epochs else model


def settle_norms(model: nn.Module, task: Task, *, batches: int = 64) -> nn.Module:
    """Takes means and variances of all batch norms anew, in place, over calibration batches; the rest is in eval mode.

    Training with noise, masks or gates leaves statistics of another network than the one without them. Every batch has
    the same weight. Networks without running statistics are left as they are.

    A norm that no batch reaches keeps the statistics it has.

    Raises:
        MissingNeed: the task has neither calibration nor training data.
        BadData: the calibration data are empty.
    """
    norms = [m for m in model.modules() if isinstance(m, RUNNING) and m.track_running_stats]
    if not norms:
        return model
    modes = {module: module.training for module in model.modules()}
    before = [(norm.momentum, {k: v.clone() for k, v in norm.named_buffers(recurse=False)}) for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the mean of all batches
    seen = 0
    with torch.no_grad():
        for batch in islice(task.calibrating(), batches):
            run(model, task, batch)
            seen += 1
    for norm, (momentum, old) in zip(norms, before, strict=True):
        norm.momentum = momentum
        if not int(norm.num_batches_tracked or 0):
            norm.load_state_dict(old, strict=False)
    for module, training in modes.items():
        module.training = training
    if not seen:
        raise BadData("the calibration data are empty: batch norms need at least one batch for their statistics")
    return model


def undo_norms(model: nn.Module, task: Task, norms: Sequence[nn.Module], *, batches: int = 8) -> None:
    """Makes batch norms hand on what they are given, in place: mu, sigma^2 of the data, gamma = sqrt(sigma^2 + eps),
    beta = mu.

    Raises:
        MissingNeed: the task has neither calibration nor training data.
        BadData: the data are empty, or do not reach a norm.
    """
    sums: dict[nn.Module, list[Tensor]] = {norm: [] for norm in norms}

    def look(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].detach().movedim(1, -1).flatten(0, -2).double()
        sums[norm].append(torch.stack([torch.ones_like(rows[0]), rows.mean(0), rows.square().mean(0)]) * len(rows))

    for norm in norms:
        _undo(norm, torch.tensor(0.0), torch.tensor(1.0))
    handles = [norm.register_forward_pre_hook(look) for norm in norms]
    try:
        with eval_mode(model):
            for batch in islice(task.calibrating(), batches if norms else 0):
                run(model, task, batch)
    finally:
        for handle in handles:
            handle.remove()
    for norm, seen in sums.items():
        if not seen:
            raise BadData("no data reach the new batch norms, whose statistics they give: check the training data")
        count, mean, square = torch.stack(seen).sum(0)
        _undo(norm, mean / count, (square / count - (mean / count).square()).clamp_min(0))


@torch.no_grad()
def _undo(norm: Any, mean: Tensor, var: Tensor) -> None:
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())
    norm.bias.copy_(norm.running_mean)
