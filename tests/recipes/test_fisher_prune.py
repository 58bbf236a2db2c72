"""Theis et al. 2018: half the mean squared gate gradient of each sample; at a true minimum the rise of the loss."""

import pytest
import torch
from test_taylor_act import closed
from torch import nn

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.site import Site
from featherweight.core.study import Study
from featherweight.core.task import Task, evaluate
from featherweight.ingredients.score.fisher import fisher

prune_fisher = entry("fisher_prune")


def well_specified(n=4000, units=6, classes=3):
    """Labels drawn from a softmax model, and the same model at the minimum of its loss on them, in float64."""
    torch.manual_seed(0)
    x = torch.randn(n, units, dtype=torch.float64)
    truth = 0.2 * torch.randn(units, classes, dtype=torch.float64)  # closing a unit is a small change
    y = torch.multinomial((x @ truth).softmax(1), 1).flatten()
    model = nn.Sequential(nn.Linear(units, units, bias=False), nn.Linear(units, classes, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(units))
    weight = model[1].weight
    nn.init.zeros_(weight)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, tolerance_grad=1e-10, tolerance_change=0)

    def step():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(step)
    assert weight.grad.abs().max() < 1e-6
    return model, Task(train=[(x, y)], valid=[(x, y)])


def test_at_the_minimum_of_a_well_specified_model_it_is_the_increase_of_the_loss():
    model, task = well_specified()
    study = Study(model, task, ["0"], 1)
    scores, whole = fisher(Site("0", model[0], study=study)), study.loss()
    increases = torch.tensor([closed(study, "0", k, 6) - whole for k in range(6)]).double()
    assert (increases > 0).all()
    assert ((scores / increases - 1).abs() < 0.15).all(), scores / increases


def test_it_is_optimal_brain_damage_with_the_fisher_diagonal():
    model, task = well_specified(n=500)
    x, y = task.train[0]
    scores = fisher(Site("0", model[0], study=Study(model, task, ["0"], 1)))
    gate = torch.ones(6, dtype=torch.float64, requires_grad=True)
    diagonal = torch.zeros(6, dtype=torch.float64)
    for n in range(len(x)):
        loss = nn.functional.cross_entropy(model[1](model[0](x[n : n + 1]) * gate), y[n : n + 1])
        diagonal += torch.autograd.grad(loss, gate)[0].square() / len(x)
    torch.testing.assert_close(scores, 0.5 * diagonal * gate.detach() ** 2)


@pytest.mark.parametrize("size", [8, 32, 96])
def test_the_batch_size_says_nothing(size):
    model, task = fit(small_cnn(), small_task(), epochs=1), small_task()
    batches = [(task.train.x[:96][i : i + size], task.train.y[:96][i : i + size]) for i in range(0, 96, size)]
    study = Study(model, Task(train=batches, valid=batches), ["3"], len(batches))
    whole = Study(model, Task(train=[(task.train.x[:96], task.train.y[:96])], valid=batches), ["3"], 1)
    torch.testing.assert_close(fisher(Site("3", model[3], study=study)), fisher(Site("3", model[3], study=whole)),
                               rtol=1e-3, atol=1e-9)  # fmt: skip


def test_it_prunes_in_rounds_recovers_and_minds_the_price():
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=1e-2)
    before = evaluate(model, task).value
    prune_fisher(model, task, prune_ratio=0.5, rounds=4, epochs=2, finetune=6, lr=1e-2, round_to=1)
    assert model[0].out_channels + model[3].out_channels == 12
    assert evaluate(model, task).value >= before - 0.1
    dear = small_cnn()
    prune_fisher(dear, task, prune_ratio=7 / 24, flops=1e3, rounds=1, epochs=0, finetune=0, round_to=1)
    assert (dear[0].out_channels, dear[3].out_channels) == (8, 9), "maps of the second layer take more operations"
