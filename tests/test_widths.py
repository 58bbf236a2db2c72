"""Which channels go: normalised scores, budgets by bisection, prices told without making the network."""

import copy

import pytest
import torch

from conftest import small_cnn, small_task
from coupled import COUPLED
from featherweight.core.channels import channel_groups, remove_channels
from featherweight.core.cost import cost
from featherweight.core.site import sites
from featherweight.core.widths import Prices, Shrinking, map_flops, normalised, scores_of
from featherweight.errors import BadData, BadOption, CompressionError
from featherweight.zoo.networks import build

X = torch.zeros(2, 1, 8, 8)


@pytest.mark.parametrize("name", ["resnet:depth=8,width=0.5", "mobilenet_v2", "vgg"])
@pytest.mark.parametrize("ratio", [0.2, 0.6])
def test_prices_are_what_the_smaller_network_costs(name, ratio):
    model, x = build(name), torch.zeros(2, 1, 28, 28)
    channels = channel_groups(model, x)
    prices = Prices.of(model, channels, cost(model, x))
    doomed = Shrinking(channels, torch.rand(channels.count), round_to=1).doomed(ratio)
    told = prices.macs(doomed), prices.params(doomed)
    remove_channels(model, doomed, channels=channels)
    after = cost(model, x)
    assert told[1] == pytest.approx(after.params)
    assert told[0] == pytest.approx(after.macs, rel=1e-3)


@pytest.mark.parametrize("name", ["grouped", "shuffled"])
def test_prices_of_grouped_convolutions(name):
    make, inputs, *_ = COUPLED[name]
    model = make()
    channels = channel_groups(model, inputs())
    prices = Prices.of(model, channels, cost(model, inputs()))
    doomed = Shrinking(channels, torch.rand(channels.count), round_to=1).doomed(0.5)
    told = prices.macs(doomed)
    remove_channels(model, doomed, channels=channels)
    assert told == pytest.approx(cost(model, inputs()).macs, rel=1e-3)


def test_a_budget_takes_the_fewest_channels_that_reach_it():
    model = build("vgg")
    x = torch.zeros(2, 1, 28, 28)
    channels, before = channel_groups(model, x), cost(model, x)
    prices = Prices.of(model, channels, before)
    shrinking = Shrinking(channels, torch.rand(channels.count), round_to=1)
    doomed = shrinking.until(lambda gone: prices.macs(gone) <= 0.5 * before.macs)
    assert prices.macs(doomed) <= 0.5 * before.macs
    assert prices.macs(doomed[:-4]) > 0.5 * before.macs


def test_rounding_keeps_multiples_of_wide_layers_only():
    model, x = build("resnet20_half"), torch.zeros(2, 1, 28, 28)
    channels = channel_groups(model, x)
    remove_channels(model, Shrinking(channels, torch.rand(channels.count), 16).doomed(0.4), channels=channels)
    widths = {m.out_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d)}
    assert all(width in (16, 32) or width < 16 for width in widths)
    assert len(widths) > 2


def test_an_unreachable_budget_is_refused():
    channels = channel_groups(small_cnn(), X)
    with pytest.raises(CompressionError, match="macs<=0 is not reached"):
        Shrinking(channels, torch.rand(channels.count)).until(lambda gone: False, told="macs<=0")


@pytest.mark.parametrize(("how", "expected"), [("l2", [0.6, 0.8]), ("mean", [6 / 7, 8 / 7]), ("max", [0.75, 1.0])])
def test_normalised(how, expected):
    torch.testing.assert_close(normalised(torch.tensor([3.0, 4.0]), how), torch.tensor(expected).double())
    torch.testing.assert_close(normalised(torch.zeros(2), how), torch.zeros(2).double())


def test_ranks_are_places():
    assert normalised(torch.tensor([3.0, -1.0, 9.0]), "rank").tolist() == [0.5, 0.0, 1.0]


def test_coupled_channels_have_one_score_and_nan_is_refused():
    model = build("resnet:depth=8")
    channels = channel_groups(model, torch.zeros(2, 1, 28, 28))
    ones = {path: torch.ones(len(ids)) for path, ids in channels.outputs.items()}
    total, largest = scores_of(channels, ones, "sum", "none"), scores_of(channels, ones, "max", "none")
    assert total.max() > 1
    assert largest.max() == 1
    ones[next(iter(ones))][0] = torch.nan
    with pytest.raises(BadData, match="hold NaN"):
        scores_of(channels, ones, "sum", "none")


def test_layers_without_channels_are_refused():
    channels = channel_groups(small_cnn(), X)
    with pytest.raises(BadOption, match="choose a method that masks weights"):
        scores_of(channels, {"8": torch.ones(4)}, "sum", "none")


def test_layers_that_lose_a_fraction_each():
    model = copy.deepcopy(small_cnn())
    channels = channel_groups(model, small_task().inputs())
    doomed = Shrinking(channels, torch.rand(channels.count), 1).by_layer({"0": 0.25, "3": 0.5})
    remove_channels(model, doomed, channels=channels)
    assert (model[0].out_channels, model[3].out_channels) == (6, 8)


def test_a_dear_feature_map_scores_less_after_the_normalisation():
    model = small_cnn()
    channels, found = channel_groups(model, X), sites(model)
    dear = map_flops(cost(model, X), found, 0.5)
    assert dear["0"] == pytest.approx(0.5 * 2 * 64 * (1 * 9 + 1) / 1e6)  # 2 HW (C k^2 + 1) per map, by hand
    assert dear["3"] == pytest.approx(0.5 * 2 * 16 * (8 * 9 + 1) / 1e6)
    ones = {path: torch.ones(len(channels.outputs[path])) for path in ("0", "3")}
    scored = scores_of(channels, ones, "sum", "l2", dear)
    torch.testing.assert_close(scored[channels.outputs["0"]], torch.full((8,), 8**-0.5 - dear["0"]).double())
    torch.testing.assert_close(scored[channels.outputs["3"]], torch.full((16,), 16**-0.5 - dear["3"]).double())
