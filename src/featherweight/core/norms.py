"""Running statistics of batch norms, taken again after the network before them has changed."""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn

from featherweight.core.task import Task, run

RUNNING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def settle_norms(model: nn.Module, task: Task, *, batches: int = 64) -> nn.Module:
    """Takes means and variances of all batch norms anew, in place, over calibration batches; the rest is in eval mode.

    Training with noise, masks or gates leaves statistics of another network than the one without them. Every batch has
    the same weight. Networks without running statistics are left as they are.

    Raises:
        MissingNeed: the task has neither calibration nor training data.
    """
    norms = [m for m in model.modules() if isinstance(m, RUNNING) and m.track_running_stats]
    if not norms:
        return model
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the mean of all batches
    with torch.no_grad():
        for batch in islice(task.calibrating(), batches):
            run(model, task, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, training in modes.items():
        module.training = training
    return model
