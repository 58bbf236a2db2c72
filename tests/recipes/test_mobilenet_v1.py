"""Howard et al. 2017: cost of depthwise separable convolutions, their exact start, and what a fit on data is worth."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_task
from featherweight.core.cost import cost
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.task import evaluate
from featherweight.ingredients.block.mobilenet_v1 import mobilenet_v1
from featherweight.rewrite import exchange, rewrite


@pytest.mark.parametrize(("inputs", "outputs", "kernel", "m"), [(64, 128, 3, 1), (2, 4, 3, 1), (6, 8, 5, 2)])
def test_parameters_and_multiplications_are_those_of_the_paper(inputs, outputs, kernel, m):
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    new, x = mobilenet_v1(layer, multiplier=m, between="linear"), torch.randn(2, inputs, 6, 6)
    before, after = (cost(nn.Sequential(net), x) for net in (layer, new))
    assert after.params == inputs * m * kernel**2 + inputs * m * outputs
    assert after.params / before.params == pytest.approx(m * (1 / outputs + 1 / kernel**2))
    assert after.macs / before.macs == pytest.approx(m * (1 / outputs + 1 / kernel**2))
    assert (after.params, before.params) == (26, 72) or inputs > 2


def test_it_is_exact_with_enough_kernels_and_nearer_with_each():
    layer, x = nn.Conv2d(4, 12, 3, stride=2, padding=1).double(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    lost = [
        float((mobilenet_v1(layer, multiplier=m, between="linear")(x) - layer(x)).detach().norm()) for m in range(1, 10)
    ]
    assert all(a > b for a, b in pairwise(lost))
    assert lost[8] < 1e-10 < lost[7], "min(K, k^2) = 9"
    few = nn.Conv2d(4, 3, 3).double()
    assert torch.allclose(mobilenet_v1(few, multiplier=3, between="linear")(x), few(x), atol=1e-10)


def test_start_is_best_of_rank_one_for_each_channel():
    layer = nn.Conv2d(4, 12, 3, bias=False)
    new = mobilenet_v1(layer, between="linear")
    made = torch.einsum("oc,chw->ochw", new[1].weight[:, :, 0, 0], new[0].weight[:, 0])
    values = torch.linalg.svdvals(layer.weight.detach().transpose(0, 1).flatten(2))
    lost = (layer.weight - made).detach().square().sum((0, 2, 3))
    assert torch.allclose(lost, values[:, 1:].square().sum(1), atol=1e-5)


@pytest.mark.parametrize("between", ["norm", "linear"])
def test_fit_on_data_brings_a_block_nearer(between):
    """By the fit's own account, and at the outputs of the network; another start than the fit's is no better."""
    task = small_task()
    model = fit(small_cnn(), task, epochs=8, lr=0.01).eval()
    x, moved = task.valid.x, {}
    for refit in (0, 4):
        with recording() as told:
            new = copy.deepcopy(model)
            exchange(new, task, lambda layer: mobilenet_v1(layer, between=between), refit=refit)
        moved[refit] = float((new.eval()(x) - model(x)).detach().norm())
        assert ("when fitted" in str(told)) == bool(refit)
    assert moved[4] < 0.8 * moved[0]


def test_network_recovers():
    task = small_task()
    model = fit(small_cnn(), task, epochs=8, lr=0.01).eval()
    new = rewrite(model, task, block="mobilenet_v1", settings={"multiplier": 2}, refit=4, epochs=6, lr=0.01)
    assert evaluate(new, task).value > 0.8
    assert [type(m) for m in new[3]] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]


def test_what_is_grouped_stays():
    assert "groups=4" in mobilenet_v1(nn.Conv2d(4, 4, 3, groups=4))
