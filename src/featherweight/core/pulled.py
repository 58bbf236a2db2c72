"""A training step that pulls weights towards targets: the middle of ADMM and of the augmented Lagrangian."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from featherweight.core.fit import Step
from featherweight.core.site import Site
from featherweight.core.task import Batch, Task, run


def pulled(task: Task, found: Mapping[str, Site], targets: Mapping[str, Tensor], strength: float) -> Step:
    """The task's loss plus `strength / 2 * ||weight - target||^2` (Frobenius) of every site, as two named terms."""
    held = {path: target.to(found[path].weight) for path, target in targets.items()}

    def step(model: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        output, target = run(model, task, batch)
        distances = [(getattr(site.module, site.name) - held[path]).square().sum() for path, site in found.items()]
        return {"loss": task.loss(output, target), "pull": strength / 2 * torch.stack(distances).sum()}

    return step
