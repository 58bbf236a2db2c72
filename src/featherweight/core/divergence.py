"""How far a network's outputs are from those of the one that it stands in for; no labels are needed."""

from __future__ import annotations

from torch import Tensor, nn

from featherweight.core.task import Batch, Task, eval_mode, prediction, run


def answers(model: nn.Module, task: Task, batch: Batch) -> Tensor:
    """The outputs of one batch, as losses look at them, float32."""
    with eval_mode(model):
        return prediction(run(model, task, batch)[0]).float()


def divergence(wanted: Tensor, found: Tensor) -> float:
    """The mean Kullback-Leibler divergence of scores of classes, (n, classes, ...), in nats.

    Outputs of one number each are no scores: of these it is the squared error over the variance of what is wanted.

    >>> divergence(Tensor([[0.0, 0.0]]), Tensor([[1.0, 1.0]]))
    0.0
    >>> round(divergence(Tensor([[0.0], [2.0]]), Tensor([[0.5], [2.0]])), 4)
    0.125
    """
    if wanted.dim() < 2 or wanted.shape[1] < 2:
        gap = (found - wanted).double().square().mean()
        return float(gap / wanted.double().var(correction=0).clamp_min(1e-30))
    p, q = wanted.double().log_softmax(1), found.double().log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean().clamp_min(0))
