"""Copies of a network that learn beside it: with weights drawn anew, and their predictions in training mode."""

from __future__ import annotations

import copy
from collections.abc import Set

import torch
from torch import Tensor, nn

from featherweight.core.restart import reinitialise
from featherweight.core.task import Batch, Task, prediction, run


def fresh(model: nn.Module) -> nn.Module:
    """A copy of the network with new weights, from torch's generator; the model stays as it is."""
    return reinitialise(copy.deepcopy(model)).train(model.training)


def predicted(model: nn.Module, task: Task, batch: Batch) -> Tensor:
    """What the network says of a batch in its present mode, as constants."""
    with torch.no_grad():
        return prediction(run(model, task, batch)[0])


def branch(model: nn.Module, shared: Set[int]) -> nn.Module:
    """A copy with new weights; modules all of whose parameters, by id, are shared are the model's own."""
    twin = fresh(model)
    for path, module in model.named_modules():
        params = [id(p) for p in module.parameters()]
        if path and params and all(p in shared for p in params):
            twin.set_submodule(path, module)
    return twin
