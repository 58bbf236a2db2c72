"""Clusters of equal filters merge without a trace; centripetal training makes the filters of a cluster the same."""

import copy

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.channels import channel_groups
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.merging import mergeable
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption, MissingNeed
from featherweight.recipes.filter_clustering import Plan, apart, centripetal, filters, grouped, makers

filter_clustering, data_free_merge = entry("filter_clustering"), entry("data_free_merge")
X = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
BARE = Task(valid=[(X, torch.zeros(16).long())])
MERGE = {"mode": "merge", "round_to": 1, "finetune": 0}


def copied(model, layer, pairs, scale=1.0):
    with torch.no_grad():
        for a, b in pairs:
            model[layer].weight[b] = scale * model[layer].weight[a]
            model[layer].bias[b] = scale * model[layer].bias[a]


@pytest.mark.parametrize("cluster", ["kmeans", "agglomerative"])
def test_clusters_of_duplicates_merge_as_data_free_merging_does(cluster):
    model = small_mlp()
    copied(model, 1, [(0, 9), (0, 17), (3, 4), (8, 30)])
    before, twin = model(X), copy.deepcopy(model)
    filter_clustering(model, BARE, prune_ratio=4 / 32, cluster=cluster, **MERGE)
    data_free_merge(twin, BARE, prune_ratio=4 / 32, round_to=1)
    assert model[1].out_features == twin[1].out_features == 28
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(twin(X), before, rtol=1e-5, atol=1e-6)


def test_directions_merge_with_the_ratio_of_their_sizes():
    model = small_mlp()
    copied(model, 1, [(0, 9), (3, 4), (8, 30)], scale=2.5)
    before, raw = model(X), copy.deepcopy(model)
    filter_clustering(model, BARE, prune_ratio=3 / 32, normalise=True, **MERGE)
    torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-5)
    filter_clustering(raw, BARE, prune_ratio=3 / 32, **MERGE)
    assert float((raw(X) - before).abs().max().detach()) > 1e-3


def test_even_clusters_follow_the_numbers_and_others_find_what_is_near():
    assert grouped(torch.zeros(6, 2), 3, "even").tolist() == [0, 0, 1, 1, 2, 2]
    centres = torch.randn(4, 5).double() * 10
    rows = centres[torch.arange(20) % 4] + 0.1 * torch.randn(20, 5)
    for how in ("kmeans", "agglomerative"):
        labels = grouped(rows, 4, how)
        assert all(len({int(labels[i]) for i in range(k, 20, 4)}) == 1 for k in range(4))
        assert len(labels.unique()) == 4


def plans(model, task):
    channels = channel_groups(model, task.inputs())
    found = mergeable(model, channels, task)
    return [Plan(s, makers(s, channels), torch.arange(len(s.members)) // 2) for s in found]


def test_a_step_moves_filters_as_in_the_paper():
    model, task = small_cnn().train(), small_task()
    (first, second) = plans(model, task)
    assert {maker.name for maker in first.makers} == {
        "0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"
    }  # fmt: skip
    x, y = next(iter(task.train))
    task.loss(model(x), y).backward()
    weight, grad = model[3].weight.detach().clone(), model[3].weight.grad.clone()
    scale, pull = model[4].weight.detach().clone(), model[4].weight.grad.clone()
    centripetal(model, second, 0.3)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    sgd.step()
    for held, slope, now in ((weight, grad, model[3].weight), (scale, pull, model[4].weight)):
        for h in range(8):
            both = slice(2 * h, 2 * h + 2)
            centre = held[both].mean(0, keepdim=True)
            step = -slope[both].mean(0, keepdim=True) - 0.01 * held[both] + 0.3 * (centre - held[both])
            torch.testing.assert_close(now[both].detach(), held[both] + 0.1 * step)


def without_norms():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 4)
    )  # fmt: skip


def test_training_draws_clusters_together_until_trimming_changes_nothing():
    task, seen = small_task(), []
    model = fit(without_norms(), task, epochs=3, lr=1e-2)
    assert min(apart(model, plan) for plan in plans(model, task)) > 0.3

    def watched(model, task, **options):
        fit(model, task, **options)
        seen.extend(apart(model, plan) for plan in plans(model, task))
        seen.append(model.eval()(X).detach())
        return model

    with recording() as ledger:
        options = {"cluster": "even", "epsilon": 25.0, "momentum": 0.0, "epochs": 12, "lr": 0.03}
        filter_clustering(model, small_task(fit=watched), **options, round_to=1, finetune=0)
    assert (model[0].out_channels, model[2].out_channels) == (4, 6)
    assert max(seen[:2]) < 1e-5
    torch.testing.assert_close(model.eval()(X), seen[2], rtol=1e-5, atol=1e-5)
    assert any("apart by" in text for text in ledger.notes)
    assert evaluate(model, task).value >= 0.9


def test_batch_norms_are_tied_too():
    task = small_task()
    model = fit(small_cnn(), task, epochs=3, lr=1e-2)
    filter_clustering(model, task, epsilon=0.1, epochs=8, lr=0.03, round_to=1, finetune=0)
    assert (model[0].out_channels, model[1].num_features, model[3].out_channels) == (4, 4, 8)
    assert evaluate(model, task).value >= 0.9


def test_the_distance_falls_as_the_pull_says():
    """Without gradients every difference shrinks by 1 - tau (eta + eps) a step."""
    task = small_task(loss=lambda output, target: 0 * output.sum())
    model = small_cnn()
    (first, _) = plans(model, task)
    rows = filters(model, [m for m in first.makers if m.name == "0.weight"], False)
    start = rows[0] - rows[1]

    def plain(model, task, **options):
        options["optimizer"] = lambda params, lr: torch.optim.SGD(params, lr=lr, weight_decay=0.02)
        fit(model, task, **options | {"decay": "constant"})
        now = filters(model, [m for m in first.makers if m.name == "0.weight"], False)
        torch.testing.assert_close(now[0] - now[1], start * (1 - 0.1 * 0.42) ** 6, rtol=1e-4, atol=1e-6)
        raise StopIteration

    with pytest.raises(StopIteration):
        filter_clustering(
            model, small_task(fit=plain, loss=task.loss), cluster="even", epsilon=0.4, epochs=2, lr=0.1, round_to=1
        )


def test_merges_a_trained_network_better_than_removing_as_many_at_random():
    errors = {"clusters": 0.0, "random": 0.0}
    for seed in range(3):
        torch.manual_seed(seed)
        task = small_task()
        model = fit(small_mlp(), task, epochs=4, lr=1e-2).eval()
        truth, random = model(X).detach(), copy.deepcopy(model)
        filter_clustering(model, BARE, prune_ratio=0.5, **MERGE)
        with torch.no_grad():
            random[3].weight[:, torch.randperm(32)[:16]] = 0
        errors["clusters"] += float((model(X) - truth).square().mean().detach())
        errors["random"] += float((random(X) - truth).square().mean().detach())
    assert errors["clusters"] < errors["random"]


def test_rounding_and_refusals():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 4))
    filter_clustering(model, BARE, prune_ratio=0.5, mode="merge", finetune=0)
    assert model[1].out_features == 32
    with pytest.raises(BadOption, match="normalise"):
        filter_clustering(small_cnn(), small_task(), normalise=True)
    with pytest.raises(MissingNeed, match="training data"):
        filter_clustering(small_cnn(), BARE, round_to=1)
