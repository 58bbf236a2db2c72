"""Polyak and Wolf 2015, second method: filters that others can make are made from them, where that saves work."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from conftest import Batches, small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.cost import cost
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, mask_of
from featherweight.core.ledger import recording
from featherweight.core.reconstruct import Moments
from featherweight.core.task import Task, evaluate
from featherweight.errors import CompressionError
from featherweight.recipes.reduce_and_reuse import most_varied, no_gain, reused

reduce_and_reuse = entry("reduce_and_reuse")


def outputs(rows=200, filters=8):
    y = torch.randn(rows, filters).double() * torch.linspace(0.2, 3, filters) + 1.0
    return y, Moments.of([(y, y)])


def test_the_filters_that_vary_most_stay():
    y, moments = outputs()
    assert most_varied(moments, 3).tolist() == sorted(y.var(0).argsort()[-3:].tolist())


def test_what_is_kept_is_handed_on_and_the_rest_is_least_squares():
    y, moments = outputs()
    keep = torch.tensor([1, 4, 6])
    for ridge in (0.0, 1e-4, 1.0):
        found = reused(moments, keep, ridge)
        torch.testing.assert_close(found[keep], torch.eye(3, 4, dtype=torch.float64), atol=1e-9, rtol=0)
    design = torch.cat([y[:, keep], torch.ones(200, 1)], 1).numpy()
    expected = np.linalg.lstsq(design, y.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(reused(moments, keep, 0.0).numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_filters_that_are_combinations_of_others_are_made_from_them_exactly(kind):
    if kind == "linear":
        layer, x = nn.Linear(30, 8), torch.randn(64, 30)
    else:
        layer, x = nn.Conv2d(3, 8, 3, padding=1, stride=2, padding_mode="circular"), torch.randn(32, 3, 8, 8)
    with torch.no_grad():
        mix = 0.1 * torch.randn(4, 4)
        layer.weight[4:] = (mix @ layer.weight[:4].flatten(1)).view(layer.weight[4:].shape)
        layer.bias[4:] = torch.randn(4)  # the intercept
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(8 if kind == "linear" else 128, 4))
    before, macs = model(x), cost(model, x).macs
    data = Batches(x, torch.zeros(len(x)).long())
    task = Task(train=data, valid=data)
    loose = copy.deepcopy(model)
    reduce_and_reuse(model, task, where="0", ridge=0.0, round_to=1, finetune=0)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert model[0][0].weight.shape[0] == 4
    assert cost(model, x).macs < macs
    reduce_and_reuse(loose, task, where="0", round_to=1, finetune=0)
    torch.testing.assert_close(loose(x), before, rtol=0, atol=2e-3 * float(before.abs().max().detach()))


def test_a_layer_of_which_it_does_not_pay_is_left_alone():
    assert no_gain(nn.Conv2d(8, 8, 1), 4) != ""
    assert "adds 32 multiplications, and saves 32" in no_gain(nn.Linear(8, 8), 4)
    assert no_gain(nn.Conv2d(8, 8, 3), 4) == ""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    with recording() as ledger:
        reduce_and_reuse(model, small_task(), prune_ratio=0.25, finetune=0, where=["0", "3"])
    assert isinstance(model[0], nn.Conv2d)
    assert isinstance(model[3], nn.Sequential)
    assert "multiplications" in ledger.skipped["0"]
    with pytest.raises(CompressionError, match="pay"):
        reduce_and_reuse(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()), small_task(), prune_ratio=0.25)


def test_reduces_a_trained_network_without_losing_it():
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=1e-2).eval()
    truth, before = model(task.valid.x).detach(), cost(model, task.inputs())
    zeroed = copy.deepcopy(model)
    with recording() as ledger:
        reduce_and_reuse(model, task, round_to=1, finetune=0)
    assert "outputs are the network's" in ledger.skipped["8"]
    after = cost(model, task.inputs())
    assert after.macs < 0.7 * before.macs
    assert after.params < before.params
    assert evaluate(model, task).value >= 0.95
    with torch.no_grad():
        for conv in (zeroed[0], zeroed[3]):
            conv.weight[conv.weight.flatten(1).norm(dim=1).argsort()[: len(conv.weight) // 2]] = 0
    errors = [float((m.eval()(task.valid.x) - truth).square().mean().detach()) for m in (model, zeroed)]
    assert errors[0] < 0.3 * errors[1]
    reduce_and_reuse(model, task, prune_ratio={"3.0": 0.25}, round_to=1, finetune=1)
    assert model[3][0][0].weight.shape[0] == 6


def test_masks_of_the_filters_that_stay_are_kept():
    model = small_cnn()
    attach(model[3], Mask(torch.rand(16, 8, 3, 3) > 0.5))
    zeros = (model[3].weight == 0).clone()
    reduce_and_reuse(model, small_task(), round_to=1, finetune=1)
    keep = mask_of(model[3][0])
    assert keep.shape == (8, 8, 3, 3)
    assert {tuple(row.flatten().tolist()) for row in ~keep} <= {tuple(row.flatten().tolist()) for row in zeros}
    assert torch.equal(model[3][0].weight != 0, keep)
