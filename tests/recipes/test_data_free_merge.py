"""Srinivas and Babu 2015: equal neurons merge without a trace and without data; the output moves within the bound."""

import copy
import itertools

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.channels import channel_groups
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, mask_of
from featherweight.core.ledger import recording
from featherweight.core.merging import makers, mergeable
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption
from featherweight.recipes.data_free_merge import knee, sequence

data_free_merge = entry("data_free_merge")
X = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
BARE = Task(valid=[(X, torch.zeros(16).long())])


def duplicated(model: nn.Module, maker: int, reader: int, pairs, scale: float = 1.0) -> None:
    """Makes neuron b of a pair (a, b) like a, and splits what reads it at random."""
    with torch.no_grad():
        for a, b in pairs:
            model[maker].weight[b] = scale * model[maker].weight[a]
            model[maker].bias[b] = scale * model[maker].bias[a]


def test_the_first_merge_is_of_the_duplicate_and_leaves_no_trace():
    model = small_mlp()
    duplicated(model, 1, 3, [(4, 20)])
    before = model(X)
    with recording() as ledger:
        data_free_merge(model, BARE, prune_ratio=1 / 32, round_to=1)
    assert model[1].out_features == 31
    torch.testing.assert_close(model(X), before, rtol=1e-6, atol=1e-6)
    assert "1: 1 of 32 neurons merged into others" in ledger.notes


@pytest.mark.parametrize("flat", [True, False])
def test_filters_and_what_a_flattened_map_reads_merge_too(flat):
    head = [nn.Flatten(), nn.Linear(6 * 36, 4)] if flat else [nn.Conv2d(6, 3, 3), nn.Flatten()]
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), *head)
    duplicated(model, 0, 2, [(0, 3), (0, 5), (1, 4)])
    before = model(X)
    data_free_merge(model, BARE, prune_ratio=0.5, round_to=1)
    assert model[0].out_channels == 3
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-6)


def test_the_saliency_is_that_of_the_paper_and_not_symmetric():
    rows, readers = torch.randn(5, 7).double(), torch.randn(5, 3).double()
    pairs = {
        (i, j): float(readers[j].square().mean() * (rows[i] - rows[j]).square().sum())
        for i, j in itertools.permutations(range(5), 2)
    }
    (member, into), *_ = sequence(rows, readers, False)[0]
    assert (into, member) == min(pairs, key=pairs.get)
    assert float(sequence(rows, readers, False)[1][0]) == pytest.approx(min(pairs.values()))


def test_every_step_takes_the_least_pair_of_what_is_left():
    rows, readers = torch.randn(6, 4).double(), torch.randn(6, 2).double()
    merges, least = sequence(rows, readers, False)
    alive = set(range(6))
    for (member, into), saliency in zip(merges, least.tolist(), strict=True):
        pairs = {
            (i, j): float(readers[j].square().mean() * (rows[i] - rows[j]).square().sum())
            for i, j in itertools.permutations(alive, 2)
        }
        assert saliency == pytest.approx(min(pairs.values()))
        assert (into, member) == min(pairs, key=pairs.get)
        readers[into] += readers[member]
        alive.remove(member)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.Sigmoid()])
def test_the_output_moves_no_more_than_the_bound(activation):
    model = nn.Sequential(nn.Linear(10, 12), activation, nn.Linear(12, 5))
    x = torch.randn(2000, 10)
    rows = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach().double()
    (member, into), *_ = sequence(rows, model[2].weight.detach().mT.double(), False)[0]
    a = model[2].weight.detach()[:, member].double()
    before = model(x)
    data_free_merge(model, Task(valid=[(x, torch.zeros(2000))]), prune_ratio=1 / 12, round_to=1)
    moved = (model(x) - before).detach().double().square().mean(0)
    seen = torch.cat([x, torch.ones(2000, 1)], 1).double().square().sum(1).mean()
    assert (moved <= a.square() * (rows[member] - rows[into]).square().sum() * seen).all()
    assert model[0].out_features == 11


def test_multiples_are_the_same_with_a_relu_if_directions_are_compared():
    model = small_mlp()
    duplicated(model, 1, 3, [(2, 9), (2, 30), (7, 8)], scale=3.0)
    before = model(X)
    loose = copy.deepcopy(model)
    data_free_merge(model, BARE, prune_ratio=3 / 32, normalise=True, round_to=1)
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-6)
    data_free_merge(loose, BARE, prune_ratio=3 / 32, round_to=1)
    assert float((loose(X) - before).abs().max().detach()) > 1e-3
    tanh = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 4))
    with pytest.raises(BadOption), recording() as ledger:
        data_free_merge(tanh, BARE, normalise=True)
    assert "but for a factor" in ledger.skipped["1"]


def test_without_a_ratio_merging_stops_where_saliencies_bend():
    assert knee(torch.tensor([0.0] * 10 + [5.0, 8.0, 10.0])) == 10
    assert knee(torch.tensor([1.0, 0.0, 0.0])) >= 0
    model = small_mlp()
    duplicated(model, 1, 3, [(i, 20 + i) for i in range(12)])
    data_free_merge(model, BARE, round_to=1)
    assert 12 <= 32 - model[1].out_features < 30


def test_batch_norm_is_folded_and_data_are_not_looked_at():
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=1e-2).eval()
    before = evaluate(model, task).value
    data_free_merge(model, Task(valid=task.valid, example_inputs=X[:2]), prune_ratio=0.25, round_to=1)
    assert (model[0].out_channels, model[3].out_channels) == (6, 12)
    assert isinstance(model[1], nn.Identity)
    assert evaluate(model, task).value >= before - 0.15


class Branches(nn.Module):
    """Two halves of a layer's outputs go through different activations; a sum couples two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 8), nn.Linear(8, 8)
        self.c, self.d, self.out = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        left, right = self.a(x.flatten(1)).chunk(2, 1)
        x = self.b(torch.cat([left.relu(), right.sigmoid()], 1))
        return self.out(x + self.d(self.c(x).relu()))


def test_channels_that_are_used_in_different_ways_stay():
    model = Branches().eval()
    channels = channel_groups(model, X)
    with recording() as ledger:
        found = mergeable(model, channels, BARE)
    assert "cannot become one" in ledger.skipped["a"]
    assert {stage.name for stage in found} == {"b", "c"}
    stage = next(s for s in found if s.name == "b")
    assert {maker.name for maker in makers(stage, channels)} == {"b.weight", "b.bias", "d.weight", "d.bias"}
    with recording() as ledger:
        data_free_merge(model, BARE, prune_ratio=0.5, round_to=1)
    assert "more than one layer (b, d)" in ledger.skipped["b"]
    assert model.c.out_features == 3


def test_masks_come_back():
    model = small_mlp()
    attach(model[3], Mask(torch.rand(4, 32) > 0.5))
    data_free_merge(model, BARE, prune_ratio=0.25, round_to=1)
    assert mask_of(model[3]).shape == (4, 24)
    assert float((model[3].weight == 0).double().mean()) > 0.2
