"""Singh et al. 2019: the tolerance is kept, without a slack nothing goes, filters only become fewer."""

import copy
import re

import pytest
import torch
from torch import nn

from conftest import Batches, blobs, small_cnn, small_mlp, small_task
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption, CompressionError
from featherweight.recipes.play_and_prune import Game, play_and_prune
from featherweight.zoo.networks import build

QUICK = {"epochs": 1, "finetune": 0, "round_to": 1, "lr": 0.02}


def trained(noise: float = 0.8) -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    x, y = blobs((1, 8, 8), n=384, noise=noise)
    task = Task(train=Batches(x[:128], y[:128]), valid=Batches(x[128:], y[128:]))
    return fit(small_cnn(), task, epochs=8, lr=0.01).eval(), task


def told(notes: list[str]) -> list[tuple[int, float]]:
    """(channels removed, slack afterwards) of every round."""
    found = [re.match(r"round \d+: (\d+) channels removed, slack (.*) pt", note) for note in notes]
    return [(int(one[1]), float(one[2])) for one in found if one]


@pytest.mark.parametrize("tolerance", [2.0, 10.0])
def test_the_tolerance_is_kept_and_used(tolerance):
    model, task = trained()
    before = evaluate(model, task).value
    with recording() as ledger:
        result = play_and_prune(copy.deepcopy(model), task, tolerance=tolerance, alpha=0.2, rounds=8, **QUICK)
    assert 100 * (before - evaluate(result, task).value) <= tolerance + 1e-9
    rounds = told(ledger.notes)
    removed = model[0].out_channels + model[3].out_channels - result[0].out_channels - result[3].out_channels
    kept = max(turn for turn, (_, slack) in enumerate(rounds) if slack >= 0)
    assert removed == sum(count for count, _ in rounds[: kept + 1]) > 2


def test_without_a_slack_nothing_goes_and_no_weight_is_pulled():
    """A training that ruins the network leaves no slack: it recovers, and what was good is handed back."""
    model, task = trained()
    ruined = []

    def ruining(network: nn.Module, task: Task, *, label: str, after_backward=None, **options):
        ruined.append((label, after_backward is not None))
        if len(ruined) == 2:
            with torch.no_grad():
                network[8].weight.zero_()
            return network
        return network

    task = Task(train=task.train, valid=task.valid, fit=ruining)
    with recording() as ledger:
        result = play_and_prune(copy.deepcopy(model), task, tolerance=5, alpha=0.3, rounds=4, **QUICK)
    rounds = told(ledger.notes)
    assert rounds[0][0] > 0
    assert rounds[1][1] < 0
    assert [count for count, _ in rounds[2:]] == [0, 0], "no removal where the round before left no slack"
    assert [pulled for label, pulled in ruined if label.startswith("round")] == [True, True, False, False]
    assert 100 * (evaluate(model, task).value - evaluate(result, task).value) <= 5


def test_the_threshold_is_the_largest_whose_removal_costs_no_more_than_the_slack():
    model, task = trained()
    game = Game.of(model, task, None, 0.9, 1)
    base = evaluate(model, task).value
    tight, loose = (
        game.threshold(model, lambda net, t=t: t - 100 * (base - evaluate(net, task).value)) for t in (3, 60)
    )
    assert len(game.below(tight)) < len(game.below(loose))
    everything = game.threshold(model, lambda net: 1.0)
    assert len(game.below(everything)) == sum(len(weak) for weak in game.weak)
    assert game.threshold(model, lambda net: -1.0).tolist() == [0.0] * len(game.weak)
    assert len(game.below(game.threshold(model, lambda net: -1.0))) == 0


def test_the_pull_is_the_gradient_of_the_l1_norm_of_the_weakest():
    model, task = trained()
    game = Game.of(model, task, None, 0.25, 1)
    model.zero_grad()
    pull = game.pull(model, 0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    pull(0.0)
    weak = model[0].weight.detach().abs().flatten(1).sum(1).argsort()[:2]
    expected = torch.zeros_like(model[0].weight)
    expected[weak] = 0.1 * model[0].weight[weak].detach().sign()
    torch.testing.assert_close(model[0].weight.grad, expected)
    assert model[8].weight.grad.abs().sum() == 0


def test_wide_layers_lose_whole_vectors():
    torch.manual_seed(0)
    task = small_task()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    fit(model, task, epochs=4, lr=0.01)
    result = play_and_prune(model, task, tolerance=90, alpha=0.1, rounds=2, **{**QUICK, "round_to": 16})
    assert result[1].out_features in (16, 32, 48)


def test_coupled_filters_go_together():
    model, task = build("resnet:depth=8,width=0.25").eval(), small_task((1, 28, 28), classes=10)
    game = Game.of(model, task, None, 0.5, 1)
    assert len(game.weak) == len(game.channels.groups)
    assert len(game.layers) > len(game.weak)


def test_the_fine_tuning_is_dropped_if_it_uses_more_than_the_slack():
    model, task = trained()

    def ruining(network: nn.Module, task: Task, *, label: str, **options):
        if label == "fine-tune":
            with torch.no_grad():
                network[8].weight.zero_()
        return network

    with recording() as ledger:
        result = play_and_prune(copy.deepcopy(model), Task(train=task.train, valid=task.valid, fit=ruining),
                                tolerance=10, alpha=0.2, rounds=1, **{**QUICK, "finetune": 1})  # fmt: skip
    assert result[8].weight.abs().sum() > 0
    assert any("the fine-tuning is dropped" in note for note in ledger.notes)


def test_what_it_refuses():
    model, task = trained(noise=2.0)
    with pytest.raises(
        CompressionError, match="no channel can go with tolerance=1e-09 pt: raise it, or lower round_to"
    ):
        play_and_prune(model, task, tolerance=1e-9, alpha=0.9, rounds=1, **{**QUICK, "lr": 1e-9, "round_to": 4})
    with pytest.raises(BadOption, match="choose a method that masks weights"):
        play_and_prune(small_mlp(), task, where="3", **QUICK)
