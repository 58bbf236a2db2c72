"""Luo et al. 2017: greedy choice by the error of the next layer, exact where channels cancel; scales only lower it."""

import copy
import itertools

import pytest
import torch
from torch import nn

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.layerwise import Contributions
from featherweight.core.ledger import recording
from featherweight.core.reconstruct import Moments
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption
from featherweight.recipes.thinet import greedy

thinet = entry("thinet")
ONLY = {"epochs": 0, "finetune": 0, "round_to": 1}


def contributions(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor | None = None) -> Contributions:
    """Of a linear layer without a bias, one column a channel."""
    weight = torch.cat([weight, torch.zeros(len(weight), 1)], 1).double()
    y = x @ weight[:, :-1].mT if y is None else y
    place = torch.tensor([*range(x.shape[1]), -1])
    return Contributions.of(Moments.of([(x, y)]), weight, place, x.shape[1])


def relative_error(x, weight, y, kept):
    error = (y - x[:, kept] @ weight[:, kept].mT).square().sum()
    return float(error / (y - y.mean(0)).square().sum())


def test_greedy_value_equals_the_error_without_the_channels():
    x, weight = torch.randn(100, 7).double(), torch.randn(3, 7).double()
    y = x @ weight.mT + 0.1 * torch.randn(100, 3)
    found = contributions(x, weight, y)
    gone = greedy(found, 5).tolist()
    for count in range(6):
        kept = [c for c in range(7) if c not in gone[:count]]
        scale = torch.tensor([float(c in kept) for c in range(7)])
        assert found.error(scale) == pytest.approx(relative_error(x, weight, y, kept), rel=1e-9)


def test_every_greedy_step_is_the_best_of_that_step():
    x, weight = torch.randn(100, 7).double(), torch.randn(3, 7).double()
    x = x @ torch.randn(7, 7).double()
    y = x @ weight.mT
    gone: list[int] = []
    for channel in greedy(contributions(x, weight), 6).tolist():
        errors = {
            c: relative_error(x, weight, y, [k for k in range(7) if k not in (*gone, c)])
            for c in range(7)
            if c not in gone
        }
        assert channel == min(errors, key=errors.get)
        gone.append(channel)


def test_two_channels_that_cancel_go_first_and_cost_nothing():
    x, weight = torch.randn(50, 6).double(), torch.ones(1, 6).double()
    x[:, 4] *= 0.1
    x[:, 2] = -x[:, 4]
    found = contributions(x, weight)
    gone = greedy(found, 2)
    assert set(gone.tolist()) == {2, 4}
    scale = torch.ones(6)
    scale[gone] = 0
    assert found.error(scale) == pytest.approx(0, abs=1e-12)


def test_scales_are_least_squares():
    x, weight = torch.randn(100, 5).double(), torch.randn(3, 5).double()
    y = x @ weight.mT + torch.randn(100, 3)
    kept = torch.tensor([True, False, True, True, False])
    found = contributions(x, weight, y).scales(kept, 0)
    design = torch.stack([(x[:, c : c + 1] * weight[:, c]).flatten() for c in (0, 2, 3)], 1)
    torch.testing.assert_close(found[kept], torch.linalg.lstsq(design, y.flatten()[:, None]).solution[:, 0])
    assert found[~kept].tolist() == [0, 0]


def test_a_dead_channel_and_one_that_nothing_reads_go_without_a_trace():
    task = small_task()
    model = fit(small_cnn(), task, epochs=3, lr=1e-2).eval()
    with torch.no_grad():
        model[1].weight[[0, 5]] = 0
        model[1].bias[[0, 5]] = 0
        model[8].weight[:, [1, 2, 7, 9]] = 0
    before = model(task.valid.x)
    thinet(model, task, prune_ratio=0.25, **ONLY)
    assert (model[0].out_channels, model[3].out_channels) == (6, 12)
    torch.testing.assert_close(model.eval()(task.valid.x), before, rtol=1e-4, atol=1e-4)


def test_a_large_filter_that_adds_little_goes_before_a_small_one_that_adds_much():
    """The norm of a filter says nothing: what the next layer makes of it does."""
    model, x = small_mlp(), torch.randn(64, 1, 8, 8)
    with torch.no_grad():
        model[1].weight[:16] *= 10
        model[1].bias[:16] *= 10
        model[3].weight[:, :16] *= 1e-3
    before = model(x)
    small = model[1].weight[16:].clone()
    thinet(model, Task(train=Batches(x, torch.zeros(64)), valid=Batches(x, torch.zeros(64))), prune_ratio=0.5, **ONLY)
    assert torch.equal(model[1].weight, small)
    torch.testing.assert_close(model(x), before, atol=0.05, rtol=0)


def test_greedy_choice_beats_random_choices_of_as_many():
    x = torch.relu(torch.randn(200, 10).double() @ torch.randn(10, 10).double())
    weight = torch.randn(4, 10).double()
    found = contributions(x, weight)
    errors = []
    for gone in itertools.combinations(range(10), 4):
        scale = torch.ones(10)
        scale[list(gone)] = 0
        errors.append(found.error(scale))
    scale = torch.ones(10)
    scale[greedy(found, 4)] = 0
    assert sum(e < found.error(scale) for e in errors) <= 0.05 * len(errors)


def test_prunes_a_trained_network_without_losing_it():
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=1e-2).eval()
    before = evaluate(model, task).value
    repaired = {}
    for refit in ("none", "scalar"):
        twin = thinet(copy.deepcopy(model), task, prune_ratio=0.5, refit=refit, **ONLY)
        repaired[refit] = float((twin(task.valid.x) - model(task.valid.x)).square().mean().detach())
    assert repaired["scalar"] < repaired["none"]
    with recording() as ledger:
        thinet(model, task, prune_ratio=0.5, epochs=1, finetune=2, round_to=1, lr=1e-2)
    assert evaluate(model, task).value >= before - 0.05
    assert (model[0].out_channels, model[3].out_channels) == (4, 8)
    assert ledger.notes[:2] == ["0: 4 of 8 channels removed", "3: 8 of 16 channels removed"]


def test_a_ratio_that_would_empty_a_layer_keeps_one_channel_and_says_so():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.ReLU(), nn.Linear(2, 4))
    thinet(model, small_task(), prune_ratio=0.99, **ONLY)
    assert model[1].out_features == 1
    with pytest.raises(BadOption, match="masks weights"):
        thinet(nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.ReLU(), nn.Linear(1, 4)), small_task(), **ONLY)


def test_the_count_is_that_of_the_fraction_and_not_one_less():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 4))
    thinet(model, small_task(), prune_ratio=0.29, **ONLY)  # 0.29 * 100 is 28.999999999999996
    assert model[1].out_features == 71
