"""Molchanov et al. 2019: squared gradients of gates behind the norms, batch by batch; near the squared true change."""

import pytest
import torch
from scipy.stats import spearmanr
from test_taylor_act import closed
from torch import nn

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.site import Site
from featherweight.core.study import Study
from featherweight.core.task import evaluate
from featherweight.errors import CompressionError
from featherweight.ingredients.score.filter_norm import filter_norm
from featherweight.ingredients.score.taylor_squared import taylor_squared

taylor = entry("taylor_fo_sq")


def test_it_is_the_squared_gradient_of_a_batchs_loss_by_a_gate_behind_the_norm():
    model, task = fit(small_cnn(), small_task(), epochs=1).eval(), small_task()
    found = taylor_squared(Site("3", model[3], study=Study(model, task, ["3"], 3)))
    expected = torch.zeros(16)
    for x, y in list(task.train)[:3]:
        gate = torch.ones(1, 16, 1, 1, requires_grad=True)
        loss = nn.functional.cross_entropy(model[5:](model[:5](x).detach() * gate), y)
        expected += torch.autograd.grad(loss, gate)[0].flatten().square() / 3
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-9)


def test_it_is_the_sum_over_the_channel_of_activation_times_gradient_and_0_for_a_closed_gate():
    model, task = fit(small_cnn(), small_task(), epochs=1).eval(), small_task()
    with torch.no_grad():
        model[4].weight[6], model[4].bias[6] = 0, 0
    found = taylor_squared(Site("3", model[3], study=Study(model, task, ["3"], 1)))
    x, y = next(iter(task.train))
    behind = model[:5](x).detach().requires_grad_(True)
    nn.functional.cross_entropy(model[5:](behind), y).backward()
    torch.testing.assert_close(found, (behind * behind.grad).detach().sum((0, 2, 3)).square().double(), rtol=1e-4,
                               atol=1e-9)  # fmt: skip
    assert found[6] == 0


def test_near_the_squared_true_change_and_nearer_than_sizes_of_weights():
    task = small_task()
    model = fit(small_cnn(), task, epochs=4, lr=1e-2)
    study = Study(model, task, ["3"], 3)
    site, whole = Site("3", model[3], study=study), study.loss()
    truth = [(closed(study, "3", k, 16) - whole) ** 2 for k in range(16)]
    rho = {score: spearmanr(score(site), truth).statistic for score in (taylor_squared, filter_norm)}
    assert rho[taylor_squared] > 0.8
    assert rho[taylor_squared] > rho[filter_norm] + 0.2


def test_it_prunes_in_rounds_and_recovers():
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=1e-2)
    before = evaluate(model, task).value
    taylor(model, task, prune_ratio=0.5, rounds=4, epochs=2, finetune=6, lr=1e-2, round_to=1)
    assert model[0].out_channels + model[3].out_channels == 12
    assert evaluate(model, task).value >= before - 0.1


def test_layers_that_the_loss_does_not_see_are_named():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(i, o) for i, o in ((64, 8), (64, 8), (8, 4)))

        def forward(self, x):
            x = x.flatten(1)
            self.b(x)
            return self.c(self.a(x).relu())

    with pytest.raises(CompressionError, match="loss does not depend on b: leave it out by where="):
        taylor(Aside(), small_task(), rounds=1, epochs=0, finetune=0)
