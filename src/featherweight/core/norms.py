"""Running statistics of batch norms, taken again after the network before them has changed."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import nn

from featherweight.core.task import Task, run
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
