"""LeCun et al. 1989: the saliency is the increase of the loss where curvature is diagonal, and beats magnitudes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import Batches, small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import bake
from featherweight.core.site import Site
from featherweight.core.study import Study
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadData, MissingNeed
from featherweight.ingredients.score.obd_saliency import obd_saliency

obd = entry("obd")
ONE_SHOT = {"rounds": 1, "epochs": 0, "finetune": 0}


def regression(x: torch.Tensor, noise: float = 0.1) -> tuple[nn.Module, Task, torch.Tensor]:
    """A linear network at the minimum of its squared error, and the Hessian there."""
    w = torch.linspace(-2, 3, x.shape[1]).view(-1, 1).to(x)
    y = x @ w + noise * torch.randn(len(x), 1).to(x)
    model = nn.Sequential(nn.Linear(x.shape[1], 1, bias=False)).to(x.dtype)
    model[0].weight.data.copy_(torch.linalg.lstsq(x, y).solution.T)
    data = Batches(x, y, 64)
    return model, Task(train=data, valid=data, loss=F.mse_loss), 2 * x.T @ x / len(x)


def saliency(model: nn.Module, task: Task) -> torch.Tensor:
    return obd_saliency(Site("0", model[0], study=Study(model, task, ["0"], 100))).view(-1)


def increase(model: nn.Module, task: Task, at: int) -> float:
    """How much the loss grows when one weight is deleted, and the others stay."""
    pruned = copy.deepcopy(model)
    pruned[0].weight.data[0, at] = 0
    losses = [float(F.mse_loss(m(task.train.x), task.train.y).detach()) for m in (model, pruned)]
    return losses[1] - losses[0]


def test_the_saliency_is_the_increase_of_the_loss_of_a_quadratic():
    x = torch.randn(256, 7, dtype=torch.float64) * torch.tensor([0.1, 0.5, 1, 2, 4, 0.3, 1.5])
    model, task, _ = regression(x)
    predicted = saliency(model, task)
    for at in range(7):
        assert float(predicted[at]) == pytest.approx(increase(model, task, at), rel=1e-6, abs=1e-9)


def test_with_correlated_inputs_it_is_never_below_what_surgery_would_cost():
    x = torch.randn(256, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    model, task, hessian = regression(x)
    surgeon = model[0].weight.detach().view(-1).square() / (2 * torch.linalg.inv(hessian).diagonal())
    predicted = saliency(model, task)
    assert bool((predicted >= surgeon * (1 - 1e-9)).all())
    assert float((predicted / surgeon).max()) > 1.5


def test_it_finds_what_magnitudes_cannot_where_inputs_differ_in_scale():
    x = torch.randn(256, 20) * torch.logspace(-1.5, 1.5, 20)
    model, task, _ = regression(x)
    losses = []
    for name in ("obd", "magnitude_iterative"):
        pruned = copy.deepcopy(model)
        entry(name)(pruned, task, sparsity=0.5, scope="global", **ONE_SHOT)
        assert int((bake(pruned)[0].weight == 0).sum()) == 10
        losses.append(float(F.mse_loss(pruned(x), task.train.y).detach()))
    assert losses[0] < 0.05 * losses[1]


def test_on_a_trained_classifier_it_does_not_lose_more_than_magnitudes():
    losses = {"obd": 0.0, "magnitude_iterative": 0.0}
    for seed in range(3):
        torch.manual_seed(seed)
        task = small_task()
        model = fit(small_cnn(), task, epochs=8, lr=1e-2).eval()
        for name in losses:
            pruned = copy.deepcopy(model)
            entry(name)(pruned, task, sparsity=0.7, scope="global", **ONE_SHOT)
            with torch.no_grad():
                losses[name] += float(torch.stack([task.loss(pruned(x), y) for x, y in task.valid]).mean())
    assert losses["obd"] < losses["magnitude_iterative"]


def test_the_method_removes_a_few_at_a_time_and_retrains():
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=1e-2)
    before = evaluate(model, task).value
    seen = []

    def watched(model, task, **options):
        seen.append(sum(int((model[i].weight == 0).sum()) for i in (0, 3, 8)))
        return fit(model, task, **options)

    task = small_task(fit=watched)
    obd(model, task, rounds=3, epochs=6, finetune=2, lr=1e-2)
    total = 72 + 1152 + 64
    assert seen == [int(0.25 * total), int(0.5 * total), int(0.75 * total), int(0.75 * total)]
    assert evaluate(bake(model), task).value >= before - 0.1


def test_bad_input():
    model, task = small_cnn(), small_task()
    with pytest.raises(MissingNeed, match="needs data"):
        obd_saliency(Site.of(torch.ones(2, 2)))
    broken = small_task(loss=lambda output, target: output.sum() * torch.nan)
    with pytest.raises(BadData, match="not finite"):
        obd(model, broken, **ONE_SHOT)
    assert evaluate(model, task).value >= 0
