"""Hsiao et al. 2019: the pooled head, an order of layers by savings per loss, the truncated last layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import featherweight as fw
from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.channels import channel_groups
from featherweight.core.cost import cost
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.study import Study
from featherweight.core.task import evaluate
from featherweight.core.widths import Prices
from featherweight.errors import BadOption, CompressionError
from featherweight.recipes.gap_filter_compression import by_saving_per_rise, head_to_gap, truncate_last

gap = entry("gap_filter_compression")
X = torch.zeros(2, 1, 8, 8)
NOW = {"head_epochs": 0, "epochs": 0, "finetune": 0, "round_to": 1}


def early():
    """As early networks were: most weights in the linear layers."""
    head = [nn.Linear(8 * 16, 40), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4)]
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), *head),
    )


def test_the_pooled_head_has_one_linear_layer_on_the_mean_of_each_map():
    model, task = early(), small_task()
    maps = model[:5](X + 1).detach()
    assert head_to_gap(model, task)
    linear = model[6][1]
    assert (linear.in_features, linear.out_features) == (8, 4)
    assert cost(model, X).params == (9 * 6 + 6) + (9 * 6 * 8 + 8) + (8 * 4 + 4)
    torch.testing.assert_close(model.eval()(X + 1), linear(maps.mean((2, 3))))
    assert not head_to_gap(model, task), "there is nothing left to replace"


def test_what_follows_the_last_linear_layer_stays():
    model = nn.Sequential(*early(), nn.LogSoftmax(1))
    head_to_gap(model, small_task())
    torch.testing.assert_close(model.eval()(X).exp().sum(1), torch.ones(2))


class Written(nn.Module):
    """A head whose ReLU is code."""

    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(6 * 64, 20), nn.Linear(20, 4)

    def forward(self, x):
        return self.b(F.relu(self.a(F.relu(self.conv(x)).flatten(1))))


def test_a_head_written_in_code_is_refused_and_left_as_it_was():
    torch.manual_seed(3)
    model = Written()
    before = model(X + 1)
    with pytest.raises(CompressionError, match=r"between a and b is partly written in code.*pool_head=False"):
        gap(model, small_task(), **NOW)
    assert torch.equal(model(X + 1), before)
    gap(model, small_task(), pool_head=False, prune_ratio=0.3, rounds=3, **NOW)
    assert model.conv.out_channels + model.a.out_features < 26


def test_offers_are_ordered_by_savings_per_rise_and_always_alike():
    task, model = small_task(), fit(small_cnn(), small_task(), epochs=3, lr=1e-2)
    study = Study(model, task, ["0", "3"], 3)
    channels = study.channels()
    prices = Prices.of(model, channels, cost(model, X))
    first, second = channels.outputs["0"], channels.outputs["3"]
    offers = [first[:2], first[2:6], second[:4], second[4:7]]
    whole = study.loss()

    def worth(offer):
        path = "0" if offer[0] in first else "3"
        gates = torch.ones(len(channels.outputs[path]))
        gates[torch.isin(channels.outputs[path], offer)] = 0
        with study.gated({path: gates}):
            rise = study.loss() - whole
        saved = prices.macs(torch.empty(0, dtype=torch.long)) - prices.macs(offer)
        return saved / rise if rise > 0 else float("inf")

    ordered = by_saving_per_rise(study, prices, offers)
    found = [worth(offer) for offer in ordered]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 4
    again = by_saving_per_rise(Study(model, task, ["0", "3"], 3), prices, offers[::-1])
    assert all(torch.equal(a, b) for a, b in zip(ordered, again, strict=True))


def test_a_layer_that_nobody_needs_gives_first():
    task, model = small_task(), fit(small_cnn(), small_task(), epochs=3, lr=1e-2)
    with torch.no_grad():
        model[4].weight[:8], model[4].bias[:8] = 0, 0
        model[3].weight[:8] *= 1e-3  # offered by their norms, and free
    before = model.eval()(task.valid.x)
    gap(model, task, prune_ratio=1 / 3, rounds=4, step=0.25, energy=1.0, **NOW)
    assert (model[0].out_channels, model[3].out_channels) == (8, 8)
    torch.testing.assert_close(model.eval()(task.valid.x), before, rtol=1e-5, atol=1e-6)


def test_the_last_layer_is_truncated_where_that_saves_weights():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 20))
    with torch.no_grad():
        model[3].weight.copy_(torch.randn(20, 3) @ torch.randn(3, 32) + 1e-4 * torch.randn(20, 32))
    whole, x = copy.deepcopy(model), torch.randn(5, 1, 8, 8)
    truncate_last(model, small_task(), 0.9999)
    assert [tuple(layer.weight.shape) for layer in model[3]] == [(3, 32), (20, 3)]
    torch.testing.assert_close(model(x), whole(x), rtol=1e-2, atol=1e-2)
    with recording() as ledger:
        kept = small_mlp()
        truncate_last(kept, small_task(), 0.999999)
    assert isinstance(kept[3], nn.Linear)
    assert any("saves no weights" in text for text in ledger.notes)


def test_the_whole_chain_in_a_file(tmp_path):
    task = small_task()
    model = fit(early(), task, epochs=4, lr=3e-3)
    result = fw.compress(
        model, task, "gap_filter_compression", out=tmp_path, prune_ratio=0.5, rounds=2, step=0.25, head_epochs=8,
        epochs=4, finetune=12, lr=1e-2, optimizer="adam", round_to=1,
    )  # fmt: skip
    before, after = result.report["original"], result.report["result"]
    assert after["params"] < 0.05 * before["params"]
    assert after["macs"] < 0.6 * before["macs"]
    assert evaluate(fw.load(tmp_path / "model.fw").eval(), task).value >= 0.8
    widths = [m.out_channels for m in result.model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(widths) == 7


def test_bad_options():
    with pytest.raises(BadOption, match=r"step=1\.5"):
        fw.compress(small_cnn(), small_task(), "gap_filter_compression", step=1.5)
    with pytest.raises(CompressionError, match="none of"):
        gap(small_cnn(), small_task(), **{**NOW, "round_to": 16})
    with pytest.raises(BadOption, match="choose a method that masks weights"):
        gap(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), small_task(), **NOW)
    assert channel_groups(small_cnn(), X).count == 24
