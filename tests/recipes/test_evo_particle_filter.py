"""Anwar et al. 2017: a population keeps its ratio, its best never gets worse, and it finds what chance misses."""

import copy

import pytest
import torch
from test_network_slimming import Residual
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach
from featherweight.core.gates import gates_of
from featherweight.core.ledger import recording
from featherweight.core.noise import linear_sites
from featherweight.core.task import Metric, evaluate
from featherweight.errors import CompressionError
from featherweight.recipes.evo_particle_filter import (
    crossed,
    evolve,
    kept_of,
    likelihoods,
    measured,
    mutated,
    populations,
    systematic,
)

evo = entry("evo_particle_filter")
FAST = {"particles": 8, "generations": 3, "finetune": 0, "batches": 2, "round_to": 1}
RATES = {"temperature": 0.05, "crossover": 0.5, "mutation": 0.1, "elites": 2}


def test_every_operator_keeps_the_ratio():
    for _ in range(200):
        a, b = (torch.rand(30).argsort() < 11 for _ in range(2))
        child = crossed(a, b)
        assert child.sum() == 11
        assert not (child & ~(a | b)).any(), "a child keeps nothing that neither parent keeps"
        assert (child | ~(a & b)).all(), "and everything that both keep"
        assert mutated(a, 0.3).sum() == 11
    assert torch.equal(mutated(a, 0.0), a)
    assert (mutated(a, 1.0) & a).sum() == 0
    assert kept_of(20, 0.95, 1) == kept_of(3, 0.99, 16) == 1


def test_resampling_follows_the_weights():
    costs = torch.tensor([0.1, 0.15, 0.3, 0.9])
    weights = likelihoods(costs, 0.05)
    assert float(weights[0] / weights[1]) == pytest.approx(2.718, rel=1e-3)
    drawn = torch.stack([torch.bincount(systematic(weights), minlength=4) for _ in range(2000)]).double()
    torch.testing.assert_close(drawn.mean(0) / 4, weights, rtol=0, atol=0.02)
    assert (drawn[:, 0] >= int(4 * weights[0])).all(), "systematic: a share of k particles is drawn k times at least"
    ranked = likelihoods(torch.tensor([30.0, 7.0, torch.nan]), 0.5)
    assert ranked.argsort().tolist() == [2, 0, 1]


def planted(units=24, useful=6):
    """Six units matter, each by another amount; the rest do nothing."""
    gain = torch.zeros(units)
    gain[torch.randperm(units)[:useful]] = torch.linspace(0.05, 0.15, useful)
    calls = []

    def costs(masks):
        calls.append(len(masks))
        return 0.7 - (masks * gain).sum(1)

    return gain > 0, costs, calls


def test_finds_the_planted_units_where_random_masks_of_equal_number_do_not():
    won = {"evolved": 0, "random": 0}
    for seed in range(10):
        torch.manual_seed(seed)
        truth, costs, calls = planted()
        best, history = evolve(costs, 24, 6, particles=40, generations=20, **RATES)
        assert (torch.tensor(history).diff() <= 0).all(), "the best never gets worse"
        assert best.sum() == 6
        won["evolved"] += bool(torch.equal(best, truth))
        masks = torch.stack([torch.rand(24).argsort().argsort() < 6 for _ in range(sum(calls))])
        won["random"] += bool(torch.equal(masks[costs(masks).argmin()], truth))
    assert won["evolved"] >= 8
    assert won["random"] <= 1


def test_the_error_is_that_of_the_network_without_the_channels_and_nothing_is_left_of_it():
    model, task = small_mlp().eval(), small_task()
    fit(model, task, epochs=4, lr=0.01)
    gates = gates_of(model, task.inputs(), {p: s.module for p, s in linear_sites(model, task).items()})
    ((name, members),) = populations(gates, {"1"})
    assert name == "1"
    closed = torch.zeros(gates.count, dtype=torch.bool)
    closed[members[::2]] = True
    with measured(model, task, gates, 3) as error:
        found = error(closed)
        whole = error(torch.zeros_like(closed))
    with torch.no_grad():
        model[3].weight[:, ::2] = 0
        x, y = (torch.cat(parts) for parts in zip(*task.train, strict=True))
        assert found == pytest.approx(float((model(x).argmax(1) != y).float().mean()))
    assert whole == 0
    cnn = small_cnn().eval()
    fit(cnn, task, epochs=1)
    before = copy.deepcopy(cnn.state_dict())
    gates = gates_of(cnn, task.inputs(), {p: s.module for p, s in linear_sites(cnn, task).items()})
    with measured(cnn, task, gates, 3) as error:
        by_batch = error(torch.zeros(gates.count, dtype=torch.bool))
        assert cnn[1].training
    assert all(torch.equal(value, before[key]) for key, value in cnn.state_dict().items())
    assert [m.momentum for m in cnn.modules() if isinstance(m, nn.BatchNorm2d)] == [0.1, 0.1]
    assert not cnn[1].training
    cnn.train()
    with torch.no_grad():
        wrong = [(cnn(x).argmax(1) != y).float().mean() for x, y in task.train]
    assert by_batch == pytest.approx(float(sum(wrong)) / len(wrong))


def test_keeps_what_predicts_and_says_how_the_error_fell():
    """Eight of sixteen hidden units are dead weight that disturbs: the search keeps the others."""
    task = small_task((16,), classes=4)
    torch.manual_seed(3)
    good = fit(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), task, epochs=30, lr=0.02)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight[::2], model[0].bias[::2] = good[0].weight, good[0].bias
        model[2].weight[:, ::2], model[2].bias[:] = good[2].weight, good[2].bias
        model[2].weight[:, 1::2] *= 100
    before = evaluate(model, task).value
    with recording() as ledger:
        evo(model, task, particles=30, generations=10, finetune=0, batches=3, round_to=1)
    assert model[0].out_features == 8
    assert before < 0.8
    assert evaluate(model, task).value > 0.95
    (text,) = [text for text in ledger.notes if "the best error went from" in text]
    first, last = (float(part) for part in text.split("went from ")[1].split(" to "))
    assert last < first


def test_coupled_channels_go_together_and_layers_that_are_not_chosen_stay():
    model = Residual()
    evo(model, small_task(), **FAST | {"prune_ratio": 0.25})
    widths = {model.stem[0].out_channels, *(block[3].out_channels for block in model.blocks), model.fc.in_features}
    assert widths == {6}
    assert [block[0].out_channels for block in model.blocks] == [12, 12]
    some = small_cnn()
    evo(some, small_task(), **FAST, where="0")
    assert (some[0].out_channels, some[3].out_channels) == (4, 16)


def test_masks_survive_other_metrics_are_ranked_and_bad_ratios_are_refused():
    model = small_cnn()
    attach(model[3], Mask(torch.rand(16, 8, 3, 3) > 0.5))
    wide = Metric("loss", per_sample=lambda o, t: 50 * nn.functional.cross_entropy(o, t, reduction="none"),
                  higher_is_better=False)  # fmt: skip
    evo(model, small_task(metric=wide), **FAST)
    assert model[3].out_channels == 8
    assert 0.3 < float((model[3].weight == 0).float().mean()) < 0.7
    with recording() as ledger, pytest.raises(CompressionError, match="removes no channel"):
        evo(small_cnn(), small_task(), **FAST | {"prune_ratio": 0.01})
    assert any("removes none" in text for text in ledger.notes)
