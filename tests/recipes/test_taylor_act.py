"""Molchanov et al. 2017: exact for a loss that is linear, near the oracle on a network, dearer maps go with flops."""

import copy
import itertools

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from conftest import Batches, small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.site import Site
from featherweight.core.study import Study
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption, MissingNeed
from featherweight.ingredients.score.filter_norm import filter_norm
from featherweight.ingredients.score.taylor_activation import taylor_activation
from featherweight.prune import prune

taylor = entry("taylor_act")
NOW = {"epochs": 0, "finetune": 0, "round_to": 1, "rounds": 1}


def closed(study, path, channel, width):
    """The loss without one channel."""
    gates = torch.ones(width)
    gates[channel] = 0
    with study.gated({path: gates}):
        return study.loss()


def test_for_a_linear_loss_the_score_is_the_change_of_a_removal():
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 1))
    with torch.no_grad():
        model[3].weight.view(5, 36).mul_(0).add_(torch.tensor([[1.0], [-2.0], [0.5], [0.0], [3.0]]))
    x = torch.randn(32, 1, 8, 8)
    task = Task(train=Batches(x, torch.zeros(32)), valid=Batches(x, x), loss=lambda output, target: output.mean())
    study = Study(model, task, ["0"], 1)
    scores = taylor_activation(Site("0", model[0], study=study))
    whole = study.loss()
    changes = torch.tensor([abs(closed(study, "0", k, 5) - whole) for k in range(5)])
    torch.testing.assert_close(scores * 36, changes, rtol=1e-4, atol=1e-5)  # the score is a mean over 6x6 positions
    assert scores[3] == 0


def test_the_absolute_value_is_of_each_sample():
    """Two samples whose gradients cancel: the map matters to both."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Flatten(), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[2].weight.fill_(1)
    x, sign = torch.ones(2, 1, 1, 1), torch.tensor([[1.0], [-1.0]])
    task = Task(train=[(x, sign)], valid=[(x, sign)], loss=lambda output, target: (output * target).mean())
    assert taylor_activation(Site("0", model[0], study=Study(model, task, ["0"], 1))).tolist() == [1.0]


def test_a_map_behind_a_closed_gate_scores_nothing():
    model, task = fit(small_cnn(), small_task(), epochs=1), small_task()
    with torch.no_grad():
        model[4].weight[3], model[4].bias[3] = 0, 0
    scores = taylor_activation(Site("3", model[3], study=Study(model, task, ["3"], 2)))
    assert scores[3] == 0
    assert (scores > 0).sum() > 8


def test_nearer_to_the_oracle_than_sizes_of_weights():
    task = small_task()
    model = fit(small_cnn(), task, epochs=4, lr=1e-2)
    study = Study(model, task, ["3"], 3)
    site, whole = Site("3", model[3], study=study), study.loss()
    truth = [abs(closed(study, "3", k, 16) - whole) for k in range(16)]
    rho = {score: spearmanr(score(site), truth).statistic for score in (taylor_activation, filter_norm)}
    assert rho[taylor_activation] > 0.8
    assert rho[taylor_activation] > rho[filter_norm] + 0.2


def test_operations_are_taken_off_after_the_normalisation():
    start, left = small_cnn(), {}
    for flops in (0.0, 1e3):  # a thousand points a million operations: the dearest layer pays for all
        model = copy.deepcopy(start)
        taylor(model, small_task(), prune_ratio=0.5, flops=flops, **NOW)
        left[flops] = (model[0].out_channels, model[3].out_channels)
    # 2 HW (C k^2 + 1): 1,280 operations a map of the first layer, 2,336 of the second
    assert left[1e3] == (8, 4)
    assert left[0.0] != left[1e3]
    with pytest.raises(BadOption, match='pass grain="filter"'):
        prune(small_cnn(), small_task(), flops=1.0)


def test_layers_compare_after_their_norms():
    start, left = fit(small_cnn(), small_task(), epochs=2), {}
    for scale, normalise in itertools.product((1.0, 1e3), ("l2", "none")):
        model = copy.deepcopy(start)

        def score(site, scale=scale):  # one layer's scores are larger than those of the other
            return taylor_activation(site) * (scale if site.path == "0" else 1)

        taylor(model, small_task(), score=score, normalise=normalise, **NOW)
        left[scale, normalise] = (model[0].weight.detach(), model[3].weight.detach())
    assert all(torch.equal(a, b) for a, b in zip(left[1.0, "l2"], left[1e3, "l2"], strict=True))
    assert left[1e3, "none"][0].shape[0] == 8, "without them the larger layer stays whole"
    assert left[1e3, "l2"][0].shape[0] < 8


def test_rounds_go_between_steps_of_training_and_it_recovers():
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=1e-2)
    before, widths = evaluate(model, task).value, []

    def watched_fit(model, task, **options):
        widths.append(model[0].out_channels + model[3].out_channels)
        return fit(model, task, **options)

    with recording():
        taylor(model, small_task(fit=watched_fit), rounds=4, epochs=2, finetune=6, lr=1e-2, round_to=1)
    assert widths == [21, 18, 15, 12, 12]
    assert evaluate(model, task).value >= before - 0.1


def test_labels_are_needed():
    x = torch.randn(32, 1, 8, 8)
    with pytest.raises(MissingNeed, match="loss needs labels"):
        taylor(small_cnn(), Task(valid=[x], train=[x]), **NOW)
