"""Moya Rueda et al. 2017: wins count every sample once, who never wins goes unnoticed, units keep their places."""

import copy

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.channels import channel_groups
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.task import evaluate
from featherweight.errors import BadOption, CompressionError
from featherweight.recipes.maxout_neuron import convert, joined, maxout_units, remove_least, wins

maxout = entry("maxout_neuron")


def maxout_net(pieces=4, units=6):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, units * pieces), nn.MaxPool1d(pieces), nn.Linear(units, 4))


def maxout_cnn():
    pool = nn.MaxPool3d((2, 1, 1))
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), pool, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    )


@pytest.mark.parametrize("make", [maxout_net, maxout_cnn])
def test_wins_add_up_to_the_samples(make):
    model, task = make(), small_task()
    (unit,) = maxout_units(model, task)
    (won,) = wins(model, task, [unit], 64)
    samples = 96 * (36 if make is maxout_cnn else 1)
    torch.testing.assert_close(won.sum(1), torch.full((len(won),), float(samples), dtype=torch.float64))
    with torch.no_grad():
        z = torch.cat([model[:-3](x) if make is maxout_cnn else model[:2](x) for x, _ in task.train])
    if make is maxout_net:
        best = z.view(96, 6, 4).argmax(-1)
        expected = torch.stack([(best == i).sum(0) for i in range(4)], 1)
        assert torch.equal(won.long(), expected)


def test_ties_count_in_equal_parts():
    model, task = maxout_net(), small_task()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.zero_()
        model[1].bias[:2] = 1.0
    (won,) = wins(model, task, maxout_units(model, task), 64)
    assert won[0].tolist() == [48, 48, 0, 0]
    assert won[1].tolist() == [24, 24, 24, 24]


@pytest.mark.parametrize("make", [maxout_net, maxout_cnn])
def test_a_neuron_that_never_wins_goes_without_a_trace(make):
    """Another one in every unit, so that rows that end up in the wrong place are seen."""
    model, task = make(), small_task()
    (unit,) = maxout_units(model, task)
    layer = model.get_submodule(unit.layer)
    never = torch.arange(len(layer.weight) // unit.pieces) % unit.pieces
    rows = torch.arange(len(never)) * unit.pieces + never
    with torch.no_grad():
        (model[1] if make is maxout_cnn else layer).bias[rows] = -100.0
    before = model.eval()(task.train.x)
    (won,) = wins(model, task, [unit], 64)
    assert torch.equal(won.argmin(1), never)
    remove_least(model, unit, won)
    assert model(task.train.x).shape == before.shape
    torch.testing.assert_close(model(task.train.x), before)
    assert len(model.get_submodule(unit.layer).weight) == len(never) * (unit.pieces - 1)


def test_from_four_neurons_to_one():
    task, model = small_task(), maxout_net()
    fit(model, task, epochs=10, lr=0.01, optimizer="sgd")
    before = evaluate(model, task).value
    with recording() as ledger:
        maxout(model, task, epochs=4)
    assert sum("neurons left" in text for text in ledger.notes) == 3
    assert model[1].weight.shape == (6, 64)
    assert isinstance(model[2], nn.Identity)
    assert model[3].weight.shape == (4, 6)
    assert evaluate(model, task).value >= before - 0.04


def test_joined_weights_add_up_for_every_place_of_a_map():
    layer = nn.Linear(4 * 3, 2)
    ids, inputs = torch.tensor([7, 5, 6, 4]), torch.tensor([7, 5, 6, 4]).repeat_interleave(3)  # channels, then places
    new = joined(layer, inputs, ids, 2)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(new(x.flatten(1)), layer(x.repeat_interleave(2, 1).flatten(1)))
    last = joined(layer, torch.tensor([7, 5, 6, 4]).repeat(3), ids, 2)  # places, then channels
    torch.testing.assert_close(last(x.mT.flatten(1)), layer(x.repeat_interleave(2, 1).mT.flatten(1)))


def test_conversion_of_twins_that_are_never_below_zero_changes_nothing():
    task = small_task()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[1].weight[1::2] = model[1].weight[::2]
        model[1].bias.fill_(20.0)
    before = model(task.valid.x)
    with recording() as ledger:
        convert(model, task, 2, None, set(), 64)
    assert isinstance(model[2], nn.MaxPool1d)
    assert model[3].in_features == 4
    assert any("1 layers became maxout layers" in text for text in ledger.notes)
    torch.testing.assert_close(model(task.valid.x), before, rtol=1e-3, atol=1e-3)


def test_a_relu_network_is_converted_and_gets_smaller():
    task = small_task()
    model = fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 33), nn.ReLU(), nn.Linear(33, 4)), task, epochs=6, lr=0.01)
    before = evaluate(model, task).value
    with recording() as ledger:
        maxout(model, task, epochs=4, keep=2)
    assert model[1].weight.shape == (16, 64)  # 32 of 33 neurons in 8 units of 4, of which 2 are left
    assert model[3].weight.shape == (4, 8)
    assert isinstance(model[2], nn.MaxPool1d)
    assert evaluate(model, task).value >= before - 0.04
    assert not ledger.skipped.keys() & {"1"}


def test_convolutions_where_there_are_no_hidden_linear_layers():
    task, model = small_task(), fit(small_cnn(), small_task(), epochs=6, lr=0.01)
    maxout(model, task, pieces=2, keep=1, epochs=6, lr=0.05)
    assert (model[0].out_channels, model[1].num_features, model[3].in_channels) == (4, 4, 4)
    assert (model[3].out_channels, model[8].in_features) == (8, 8)
    assert evaluate(model, task).value > 0.9


class Shared(nn.Module):
    """The hidden layer goes into a sum, so that its neurons cannot be joined; the other one's can."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        x = self.act1(self.fc1(x.flatten(1)))
        return self.fc3(x + self.act2(self.fc2(x)))


def test_layers_that_cannot_be_joined_are_refused_with_a_cure():
    model = Shared()
    before = copy.deepcopy(model.state_dict())
    with recording() as ledger, pytest.raises(BadOption, match="choose a method that masks weights"):
        maxout(model, small_task())
    assert "works on its outputs too" in ledger.skipped["fc1"]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    with pytest.raises(CompressionError, match="lower keep, or raise pieces"):
        maxout(maxout_net(pieces=2), small_task(), keep=2)
    assert channel_groups(model, small_task().inputs()).count
