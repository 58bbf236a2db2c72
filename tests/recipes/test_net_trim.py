"""Aghasi et al. 2017: constraints hold, nothing allowed changes no output, more allowed is less size, the optimum."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, mask_of
from featherweight.core.ledger import recording
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadData
from featherweight.recipes.net_trim import before_relu, missed, projected, sampled, trim

net_trim = entry("net_trim")


def layer(rows=80, columns=20, outputs=4):
    x = torch.cat([torch.randn(rows, columns).double(), torch.ones(rows, 1)], 1)
    weight = torch.randn(outputs, columns + 1).double() * (torch.rand(outputs, columns + 1) < 0.5)
    return x, x @ weight.mT, weight


def solved(x, y, omega, epsilon, **options):
    free = torch.ones(y.shape[1], x.shape[1], dtype=torch.bool)
    options = {"rho": 10.0, "size": 0.5, "iterations": 4000, "free": free, **options}
    return trim(x, y, omega, options.pop("free"), epsilon=epsilon, **options)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("epsilon", [0.02, 0.2])
def test_the_constraints_hold_and_weights_are_smaller_and_sparser(relu, epsilon):
    x, y, weight = layer()
    omega = y > 0 if relu else torch.ones_like(y, dtype=torch.bool)
    found = solved(x, y, omega, epsilon)
    reached = x @ found.mT
    off = ((reached - y) * omega).norm(dim=0)
    assert (off <= epsilon * (y * omega).norm(dim=0) * (1 + 1e-4)).all()
    assert float(torch.where(omega, -1.0, reached).max()) < 1e-3
    assert float(found[:, :-1].abs().sum()) < float(weight[:, :-1].abs().sum())
    assert float((found == 0).double().mean()) > 0.2


@pytest.mark.parametrize("relu", [True, False])
def test_nothing_allowed_keeps_the_outputs_and_is_the_linear_program(relu):
    x, y, _ = layer(rows=25)  # fewer constraints than would fix the weights
    omega = y > 0 if relu else torch.ones_like(y, dtype=torch.bool)
    found = solved(x, y, omega, 0.0)
    assert missed(x, y, omega, found) < 1e-3
    for j in range(4):
        on = omega[:, j].numpy()
        at = x.numpy()
        columns = at.shape[1]
        cost = np.r_[np.ones(2 * columns)]
        cost[[columns - 1, 2 * columns - 1]] = 0  # the bias is free
        both = np.c_[at, -at]
        reference = linprog(
            cost, both[~on] if (~on).any() else None, np.zeros((~on).sum()) if (~on).any() else None,
            both[on], y[on, j].numpy(), bounds=(0, None),
        )  # fmt: skip
        assert float(found[j, :-1].abs().sum()) == pytest.approx(reference.fun, rel=5e-3)


def test_a_layer_with_fewer_weights_than_it_has_is_recovered():
    x, y, weight = layer(rows=200)
    found = solved(x, y, torch.ones_like(y, dtype=torch.bool), 0.0)
    torch.testing.assert_close(found, weight, atol=1e-4, rtol=0)
    assert torch.equal(found[:, :-1] != 0, weight[:, :-1] != 0)


def test_what_a_relu_cuts_off_leaves_room():
    x, y, _ = layer()
    sizes = [
        float(solved(x, y, omega, 0.05)[:, :-1].abs().sum()) for omega in (y > 0, torch.ones_like(y, dtype=torch.bool))
    ]
    assert sizes[0] < 0.97 * sizes[1]


def test_the_size_of_the_weights_falls_as_more_error_is_allowed():
    x, y, _ = layer()
    sizes = [float(solved(x, y, y > 0, e)[:, :-1].abs().sum()) for e in (0.0, 0.01, 0.05, 0.2, 0.5, 0.9)]
    assert all(later < earlier for earlier, later in pairwise(sizes))


def test_the_projection_is_the_nearest_allowed_point():
    t, y = torch.randn(30, 3).double(), torch.randn(30, 3).double()
    bound = torch.tensor([0.0, 0.5, 1e3])
    v = projected(t, y, y > 0, bound)
    assert torch.equal(v[:, 0][y[:, 0] > 0], y[:, 0][y[:, 0] > 0])
    assert float(((v - y) * (y > 0)).norm(dim=0)[1]) == pytest.approx(0.5)
    assert torch.equal(v[:, 2][y[:, 2] > 0], t[:, 2][y[:, 2] > 0])
    assert torch.equal(v[y <= 0], t[y <= 0].clamp_max(0))


def test_relus_are_found_behind_layers():
    model = small_cnn().eval()
    assert before_relu(model, small_task(), ["0", "3", "8"]) == set()
    folded = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 4)
    )
    assert before_relu(folded, small_task(), ["0", "2", "4"]) == {"0"}


def test_rows_are_a_bounded_part_of_all():
    rows = ((torch.full((10, 2), float(i)), torch.zeros(10, 1)) for i in range(100))
    x, y = sampled(rows, 50)
    assert x.shape == (50, 3)
    assert y.shape == (50, 1)
    assert len(x[:, 0].unique()) > 25
    with pytest.raises(BadData, match="no rows"):
        sampled([], 50)


def test_trims_a_trained_network_and_keeps_what_it_says():
    task = small_task()
    model = fit(small_mlp(), task, epochs=6, lr=1e-2).eval()
    trimmed, masked = copy.deepcopy(model), copy.deepcopy(model)
    with recording() as ledger:
        net_trim(trimmed, task, epsilon=0.1)
    assert "1: " in ledger.notes[0]
    zeros = {path: int((trimmed.get_submodule(path).weight == 0).sum()) for path in ("1", "3")}
    assert zeros["1"] > 0.6 * 2048
    with torch.no_grad():
        for path, count in zeros.items():
            weight = masked.get_submodule(path).weight
            weight.view(-1)[weight.abs().flatten().argsort()[:count]] = 0
    truth = model(task.valid.x).detach()
    errors = [float((m(task.valid.x) - truth).square().mean().detach()) for m in (trimmed, masked)]
    assert errors[0] < 0.5 * errors[1]
    assert evaluate(trimmed, task).value >= 0.95


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_batch_norm_is_folded_and_masks_stay(mode):
    task = small_task()
    model = fit(small_cnn(), task, epochs=4, lr=1e-2).eval()
    keep = torch.rand(16, 8, 3, 3) > 0.3
    attach(model[3], Mask(keep))
    net_trim(model, task, mode=mode, iterations=200, samples=300)
    assert isinstance(model[1], nn.Identity)
    assert not (mask_of(model[3]) & ~keep).any()
    assert torch.equal(mask_of(model[3]), model[3].weight != 0)
    assert evaluate(model, task).value >= 0.9


def test_layers_that_cannot_be_solved_are_named():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 4))
    with recording() as ledger:
        net_trim(model, small_task(), iterations=50)
    assert "2 groups" in ledger.skipped["1"]
    broken = Batches(torch.full((4, 1, 8, 8), torch.nan), torch.zeros(4).long())
    with pytest.raises(BadData, match="not finite"):
        net_trim(small_mlp(), Task(valid=broken, calibration=broken))
