"""Yang et al. 2018: every accepted network fits its step, the best proposal wins, what saves nothing is never cut."""

import itertools

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.budget import parse
from featherweight.core import measuring
from featherweight.core.channels import channel_groups, remove_channels
from featherweight.core.cost import cost
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.measuring import Timed
from featherweight.core.task import evaluate
from featherweight.errors import BadOption, CompressionError, MissingNeed
from featherweight.recipes.netadapt import Resource, adapted, netadapt
from featherweight.zoo.networks import build

QUICK = {"short_finetune": 0.34, "finetune": 0, "round_to": 1, "lr": 0.01, "score": "filter_norm"}


def steps(model, task, text, *, value=None, decrement=0.2, decay=0.9, round_to=1):
    """The accepted steps, with channels ranked by their number, and proposals valued by a function of the network."""
    resource = Resource.of(model, task, parse(text)[0])
    train = value or (lambda candidate: evaluate(candidate, task).value)
    ranks = lambda current, channels: torch.arange(channels.count, dtype=torch.float64)  # noqa: E731
    yield from adapted(model, task, resource, ranks, train, decrement=decrement, decay=decay, round_to=round_to)


@pytest.mark.parametrize("text", ["macs<=0.3x", "params<=0.5x", "macs<=12k"])
def test_every_accepted_network_fits_its_step(text):
    model, task = small_cnn(), small_task()
    before, limit = cost(model, task.inputs()), parse(text)[0]
    whole = getattr(before, limit.quantity)
    history, aims = [1.0], []
    for step in steps(model, task, text):
        reached = getattr(cost(step.model, task.inputs()), limit.quantity) / whole
        assert step.reached == pytest.approx(reached, rel=2e-3)
        assert step.reached <= step.aim + 1e-12
        assert step.after < step.before
        history.append(step.reached)
        aims.append(step.aim)
    assert all(a > b for a, b in itertools.pairwise(history)), "strictly decreasing"
    assert history[-1] <= limit.allowed({limit.quantity: whole}) / whole
    least = [now - aim for now, aim in zip(history, aims, strict=False)]
    wanted = [max(0.2 * 0.9**j, 0.04) for j in range(len(least))]
    assert least[:-1] == pytest.approx(wanted[: len(least) - 1])


def test_the_best_proposal_is_accepted():
    """Whoever is told that the first layer matters never cuts it while another can be cut."""
    task = small_task()
    found = list(steps(small_cnn(), task, "macs<=0.6x", value=lambda net: float(net[0].out_channels)))
    assert [step.layers[0] for step in found] == ["3"] * len(found)
    assert found[-1].model[0].out_channels == 8
    found = list(steps(small_cnn(), task, "macs<=0.6x", value=lambda net: float(net[3].out_channels)))
    assert [step.layers[0] for step in found] == ["0"] * len(found)


class Table:
    """A look-up table for a latency: what each convolution takes by its widths, added up."""

    def __init__(self, entries) -> None:
        self.entries, self.asked = entries, 0

    def of(self, model: nn.Module) -> float:
        layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        return sum(self.entries[path](m.in_channels, m.out_channels) for path, m in layers.items())

    def __call__(self, original, result, inputs) -> Timed:
        self.asked += 1
        before, after = self.of(original), self.of(result)
        return Timed(before, after, after / before)


def three() -> nn.Sequential:
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def test_a_layer_that_no_entry_depends_on_is_never_shrunk():
    """Its own entry and that of the layer that reads it: whatever the proposals are worth."""
    table = Table({"0": lambda i, o: 5 + o, "2": lambda i, o: 1 + i, "4": lambda i, o: 3 * o})  # 2's width is free
    with measuring.timing(table):
        found = list(steps(three(), small_task(), "latency<=0.5x", value=lambda net: -float(net[2].out_channels)))
    last = found[-1].model
    assert last[2].out_channels == 8
    assert last[0].out_channels < 8 or last[4].out_channels < 8
    assert table.of(last) / table.of(three()) == pytest.approx(found[-1].reached)
    assert found[-1].reached <= 0.5
    assert {layer for step in found for layer in step.layers} <= {"0", "4"}


def test_networks_of_the_same_widths_are_timed_once():
    table = Table({"0": lambda i, o: o, "2": lambda i, o: i * o, "4": lambda i, o: i * o})
    with measuring.timing(table):
        found = list(steps(three(), small_task(), "latency<=0.6x"))
    assert table.asked <= 3 * 4 * (len(found) + 1)  # three groups, bisection over eight widths
    with measuring.timing(table):
        assert list(steps(three(), small_task(), "latency<=60ms"))[-1].reached * table.of(three()) <= 60


def test_coupled_layers_are_one_block_and_the_result_is_an_ordinary_network():
    model, task = build("resnet:depth=8,width=0.25"), small_task((1, 28, 28), classes=10)
    step = next(steps(model, task, "macs<=0.9x", value=lambda net: 1.0))
    assert len(step.layers) > 1, "the first group is the residual sum of the first stage"
    assert step.model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    channels = channel_groups(step.model, task.inputs())
    remove_channels(step.model, {next(iter(channels.outputs)): [0]}, channels=channels)


def test_rounding_keeps_whole_multiples():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))
    found = list(steps(model, small_task(), "macs<=0.4x", round_to=16))
    assert all(step.after % 16 == 0 for step in found)


def test_the_adapted_network_still_works():
    torch.manual_seed(0)
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=0.01)
    with recording() as ledger:
        result = netadapt(model, task, budget="macs<=0.4x", decrement=0.2, **{**QUICK, "finetune": 4})
    assert cost(result, task.inputs()).macs <= 0.4 * cost(small_cnn(), task.inputs()).macs
    assert evaluate(result, task).value >= 0.9
    assert len([note for note in ledger.notes if " channels, macs " in note]) >= 2


def test_what_it_refuses():
    model, task = small_mlp(), small_task()
    with pytest.raises(BadOption, match="adapts to one of macs, params, latency"):
        netadapt(model, task, budget="size<=0.5x")
    with pytest.raises(BadOption, match="name one limit"):
        netadapt(model, task, budget="macs<=0.5x, params<=0.5x")
    with pytest.raises(MissingNeed, match="this method times networks"):
        netadapt(model, task, budget="latency<=0.5x", **QUICK)
    with pytest.raises(CompressionError, match=r"macs<=0.001x is not reached: at 0\.0"):
        netadapt(model, task, budget="macs<=0.001x", decrement=0.4, **{**QUICK, "short_finetune": 0})
