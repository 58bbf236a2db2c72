"""Leave one out: what costs nothing scores 0 and goes first; what it cannot see; coupled layers as one unit."""

import copy

import pytest
import torch
from test_network_slimming import Residual
from torch import nn

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.channels import channel_groups, remove_channels
from featherweight.core.fit import fit
from featherweight.core.site import Site
from featherweight.core.study import Study
from featherweight.core.task import Task
from featherweight.errors import MissingNeed
from featherweight.ingredients.score.removal import loss_change, loss_increase

oracle = entry("oracle")
NOW = {"finetune": 0, "round_to": 1, "rounds": 1}


def scored(score, model, path, task, batches=3):
    return score(Site(path, model.get_submodule(path), study=Study(model, task, [path], batches)))


def test_a_unit_that_nobody_reads_scores_exactly_nothing_and_goes_first():
    task, model = small_task(), fit(small_mlp(), small_task(), epochs=3)
    with torch.no_grad():
        model[3].weight[:, [4, 17, 29]] = 0
    scores = scored(loss_change, model, "1", task)
    assert scores[[4, 17, 29]].tolist() == [0, 0, 0]
    assert (scores > 0).sum() > 20
    before = model(task.valid.x)
    oracle(model, task, prune_ratio=0.1, **NOW)
    assert model[1].out_features == 29
    torch.testing.assert_close(model(task.valid.x), before)


def test_scores_are_the_losses_of_really_smaller_networks():
    task, model = small_task(), fit(small_cnn(), small_task(), epochs=2)
    with torch.no_grad():
        model[1].bias.uniform_(-1, 1)
    found, whole = scored(loss_increase, model, "0", task), Study(model, task, ["0"], 3).loss()
    for k in (0, 3, 7):
        smaller = copy.deepcopy(model)
        channels = channel_groups(smaller, task.inputs())
        remove_channels(smaller, channels.chosen({"0": [k]}), channels=channels)
        assert float(found[k]) == pytest.approx(Study(smaller, task, ["0"], 3).loss() - whole, abs=1e-5)
    torch.testing.assert_close(scored(loss_change, model, "0", task), found.abs())


def test_a_residual_sum_is_one_unit():
    task, model = small_task(), fit(Residual(), small_task(), epochs=2)
    study = Study(model, task, ["stem.0", "blocks.1.3"], 2)
    stem, last = (loss_change(Site(p, model.get_submodule(p), study=study)) for p in ("stem.0", "blocks.1.3"))
    assert torch.equal(stem, last), "one score for the channel, whichever of its layers is asked"
    oracle(model, task, prune_ratio=0.25, where=["stem.0", "blocks.*.3"], calibration_batches=2, **NOW)
    assert {model.stem[0].out_channels, model.blocks[1][3].out_channels, model.fc.in_features} == {6}


class Largest(nn.Module):
    """Two pairs: units that can stand for each other under a maximum, and units whose effects cancel."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = (
            nn.Linear(1, 2, bias=False),
            nn.Linear(1, 2, bias=False),
            nn.Linear(2, 1, bias=False),
        )
        with torch.no_grad():
            self.a.weight.fill_(1)
            self.b.weight.fill_(1)
            self.head.weight.copy_(torch.tensor([[3.0, -3.0]]))

    def forward(self, x):
        return self.a(x).amax(1, keepdim=True) + self.head(self.b(x))


def test_interactions_are_not_seen():
    x = torch.ones(4, 1)
    task = Task(train=Batches(x, x), valid=Batches(x, x), loss=lambda output, target: output.mean())
    model = Largest()
    assert scored(loss_change, model, "b", task, 1).tolist() == [3, 3], "removing both would change nothing"
    study = Study(model, task, ["a", "b"], 1)
    whole = study.loss()
    with study.gated({"b": torch.zeros(2)}):
        assert study.loss() == whole
    for gates in (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])):
        with study.gated({"a": gates}):
            assert study.loss() == whole, "either can stand for the other"
    with study.gated({"a": torch.zeros(2)}):
        assert study.loss() == whole - 1


def test_rounds_score_anew():
    """Of two duplicates under a maximum one goes for nothing; then the other is worth something."""
    torch.manual_seed(0)
    model, task = fit(small_cnn(), small_task(), epochs=3), small_task()
    greedy, at_once = copy.deepcopy(model), copy.deepcopy(model)
    options = {"finetune": 0, "round_to": 1, "prune_ratio": 0.5}
    oracle(greedy, task, rounds=6, **options)
    oracle(at_once, task, rounds=1, **options)
    losses = [Study(one, task, ["0"], 3).loss() for one in (greedy, at_once)]
    assert losses[0] < losses[1]


def test_labels_are_needed():
    x = torch.randn(8, 1, 8, 8)
    with pytest.raises(MissingNeed, match="loss needs labels"):
        oracle(small_cnn(), Task(valid=[x], train=[x]), **NOW)
