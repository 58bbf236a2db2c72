"""Yu et al. 2018: scores of the last responses flow back through |W|; exact in positive networks, else a bound."""

import copy

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.study import Study
from featherweight.core.task import evaluate
from featherweight.errors import CompressionError
from featherweight.ingredients.score.propagation import infinite_selection, propagated, responses

nisp = entry("nisp")
NOW = {"finetune": 0, "round_to": 1}


def mlp(bias=True):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 12, bias), nn.ReLU(), nn.Linear(12, 9, bias), nn.ReLU(), nn.Linear(9, 4)
    )


def found(model, paths, task=None):
    study = Study(model, task or small_task(), paths, 3)
    return propagated(study), infinite_selection(responses(study, study.order()[-1]))


def test_infinite_feature_selection_is_the_sum_over_paths_of_all_lengths():
    values = torch.randn(40, 5, dtype=torch.float64) * torch.tensor([1.0, 2, 3, 0, 2])
    sd = values.std(0, unbiased=False)
    sd = sd / sd.max()
    A = torch.zeros(5, 5, dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            alike = 1.0 if i == j else 0.0 if 3 in (i, j) else abs(spearmanr(values[:, i], values[:, j]).statistic)
            A[i, j] = 0.5 * max(sd[i], sd[j]) + 0.5 * (1 - alike)
    step = 0.9 / torch.linalg.eigvals(A).abs().max() * A
    total, power = torch.zeros(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    for _ in range(600):  # the powers of a matrix of spectral radius 0.9
        power = power @ step
        total += power.sum(1)
    torch.testing.assert_close(infinite_selection(values), total)


def test_in_a_positive_linear_network_the_score_is_the_exact_sensitivity():
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(i, o, bias=False) for i, o in ((64, 12), (12, 9), (9, 4))))
    with torch.no_grad():
        for layer in model[1:]:
            layer.weight.abs_()
    scores, last = found(model, ["1", "2"])
    hidden = model[1](torch.rand(1, 64)).detach().requires_grad_(True)
    (model[2](hidden) @ last.float()).sum().backward()
    torch.testing.assert_close(scores["1"].float(), hidden.grad[0])
    torch.testing.assert_close(scores["2"], last)


def test_the_change_of_the_weighted_responses_is_bounded_also_over_several_layers():
    task, model = small_task(), fit(mlp(), small_task(), epochs=2)
    scores, last = found(model, ["1", "3"])
    x = task.valid.x
    first = model[:3](x).detach()
    second = model[3:5](first).detach()
    gone = {"1": torch.randperm(12)[:5], "3": torch.randperm(9)[:4]}
    kept_first = first.clone()
    kept_first[:, gone["1"]] = 0
    changed = model[3:5](kept_first).detach()
    changed[:, gone["3"]] = 0
    error = ((changed - second).abs() @ last.float()).double()
    bound = (first[:, gone["1"]].double() @ scores["1"][gone["1"]]
             + second[:, gone["3"]].double() @ scores["3"][gone["3"]])  # fmt: skip
    assert (error <= bound * (1 + 1e-5)).all()
    assert (error > 0).any()


def test_permuted_units_have_permuted_scores():
    model, order = mlp(), torch.randperm(12)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[1].weight.copy_(model[1].weight[order])
        twin[1].bias.copy_(model[1].bias[order])
        twin[3].weight.copy_(model[3].weight[:, order])
    torch.testing.assert_close(found(twin, ["1"])[0]["1"], found(model, ["1"])[0]["1"][order])


class Block(nn.Module):
    """A residual block between 1x1 convolutions, batch norm inside, flattened at the end: by hand in few lines."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 5, 1), nn.Conv2d(5, 3, 1)
        self.norm, self.pool, self.fc, self.out = (
            nn.BatchNorm2d(5),
            nn.MaxPool2d(2),
            nn.Linear(3 * 16, 6),
            nn.Linear(6, 4),
        )

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.b(self.norm(self.a(x)).relu())
        return self.out(self.fc(self.pool(x).flatten(1)).relu())


def test_branches_norms_pooling_and_flattening_by_hand():
    model = fit(Block(), small_task(), epochs=1).eval()
    scores, last = found(model, ["stem", "a", "b", "fc"])
    W = {name: getattr(model, name).weight.detach().double().abs().flatten(2).squeeze(-1)
         if getattr(model, name).weight.dim() > 2 else getattr(model, name).weight.detach().double().abs()
         for name in ("a", "b", "fc")}  # fmt: skip
    behind = (W["fc"].T @ last).view(3, 16).sum(1)  # a channel: the sum over its 16 positions; pooling passes it on
    slope = model.norm.weight.double().abs() / (model.norm.running_var.double() + model.norm.eps).sqrt()
    inner = W["b"].T @ behind
    torch.testing.assert_close(scores["fc"], last)
    torch.testing.assert_close(scores["b"], behind)
    torch.testing.assert_close(scores["a"], inner.detach())  # behind its norm
    torch.testing.assert_close(scores["stem"], (behind + W["a"].T @ (slope * inner)).detach())  # both branches


def test_it_prunes_a_convolutional_network_and_recovers():
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=1e-2)
    scores, _ = found(model, ["0", "3"])
    kept = model[3].weight.detach()[scores["3"].argsort()[8:].sort().values].shape[0]
    before = evaluate(model, task).value
    nisp(model, task, prune_ratio=0.5, finetune=8, lr=1e-2, optimizer="adam", round_to=1)
    assert (model[0].out_channels, model[3].out_channels) == (4, kept)
    assert evaluate(model, task).value >= before - 0.1


def test_layers_that_the_responses_do_not_see_stay_and_are_named():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 8), nn.Linear(64, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = x.flatten(1)
            self.b(x).relu()
            return self.c(self.a(x).relu())

    model = Aside()
    with recording() as ledger:
        nisp(model, small_task(), prune_ratio=0.5, **NOW)
    assert (model.a.out_features, model.b.out_features) == (4, 8)
    assert "do not depend on it" in ledger.skipped["b"]


def test_networks_that_do_not_scale_are_refused_with_a_way_out():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(CompressionError, match=r"native_layer_norm.*taylor_activation"):
        nisp(model, small_task(), **NOW)
