"""He et al. 2017: the LASSO path, channels recovered from noiseless data, least squares below LASSO below nothing."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.layerwise import Contributions, Sums
from featherweight.core.reconstruct import Moments, augmented
from featherweight.core.task import evaluate
from featherweight.recipes.lasso_channel import lasso, lasso_path

lasso_channel = entry("lasso_channel")
ONLY = {"finetune": 0, "round_to": 1}


def contributions(x, weight, y):
    weight = torch.cat([weight, torch.zeros(len(weight), 1)], 1).double()
    return Contributions.of(Moments.of([(x, y)]), weight, torch.tensor([*range(x.shape[1]), -1]), x.shape[1])


def data(rows=200, channels=8, outputs=3, noise=0.5):
    x, weight = torch.randn(rows, channels).double(), torch.randn(outputs, channels).double()
    return x, weight, x @ weight.mT + noise * torch.randn(rows, outputs)


def test_the_path_is_that_of_the_lasso_on_all_rows():
    from sklearn.linear_model import Lasso

    x, weight, y = data()
    found = contributions(x, weight, y)
    path = lasso_path(found)
    unit = weight / weight.norm(dim=0)
    design = torch.stack([(x[:, c : c + 1] * unit[:, c]).flatten() for c in range(8)], 1).numpy()
    scale = float((y - y.mean(0)).square().sum())
    for point in (2, 5, path.shape[1] - 2):
        beta = path[:, point].numpy()
        # at a point of the path every active channel has the same correlation with the residual: that is lambda
        correlations = design.T @ (y.numpy().ravel() - design @ beta)
        penalty = np.abs(correlations).max()
        reference = Lasso(alpha=penalty / y.numel(), fit_intercept=False, tol=1e-12, max_iter=100_000)
        np.testing.assert_allclose(beta, reference.fit(design, y.numpy().ravel()).coef_, atol=1e-6)
        assert found.error(torch.tensor(beta) / weight.norm(dim=0)) == pytest.approx(
            float(np.square(y.numpy().ravel() - design @ beta).sum()) / scale, rel=1e-8
        )


def test_along_the_path_the_sum_of_coefficients_grows_and_the_error_falls():
    x, weight, y = data()
    found = contributions(x, weight, y)
    path, norm = lasso_path(found), weight.norm(dim=0)
    sums = path.abs().sum(0)
    errors = torch.tensor([found.error(path[:, i] / norm) for i in range(path.shape[1])])
    assert (sums.diff() >= -1e-12).all()
    assert (errors.diff() <= 1e-12).all()


@pytest.mark.parametrize("seed", range(5))
def test_channels_that_made_noiseless_data_are_recovered(seed):
    torch.manual_seed(seed)
    x, weight, _ = data(channels=12)
    true = [1, 4, 6, 10]
    y = x[:, true] @ weight[:, true].mT
    gone = lasso(contributions(x, weight, y), 8)
    assert sorted(set(range(12)) - set(gone.tolist())) == true


def test_one_of_two_equal_channels_goes():
    x, weight, _ = data(noise=0)
    x[:, 3], weight[:, 3] = x[:, 5], weight[:, 5]
    gone = lasso(contributions(x, weight, x @ weight.mT), 1).tolist()
    assert gone in ([3], [5])


def test_least_squares_are_below_lasso_on_the_same_channels_and_below_what_was_there():
    x, weight, y = data(noise=2.0)
    found, norm = contributions(x, weight, y), weight.norm(dim=0)
    path = lasso_path(found)
    gone = lasso(found, 4)
    kept = torch.ones(8, dtype=torch.bool)
    kept[gone] = False
    last = int(((path != 0).sum(0) <= 4).nonzero().max())
    assert torch.equal(path[:, last] != 0, kept)
    moments = Moments.of([(x, y)])
    start = torch.cat([weight * kept, torch.zeros(3, 1)], 1)
    free = torch.cat([kept, torch.tensor([False])])
    scale = float((y - y.mean(0)).square().sum()) / len(x)
    full = float(moments.error(moments.refit(start, free, 0)).sum()) / scale
    biased = found.error(path[:, last] / norm)
    assert full < biased
    assert full < float(moments.error(start).sum()) / scale


def test_repairs_better_than_zeroing_as_many_small_filters():
    """A property of a trained network, not of every one: the mean over networks is compared."""
    ours, theirs = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        task = small_task()
        original = fit(small_cnn(), task, epochs=4, lr=1e-2).eval()
        model, zeroed = copy.deepcopy(original), copy.deepcopy(original)
        lasso_channel(model, task, prune_ratio=0.5, **ONLY)
        with torch.no_grad():
            for conv, norm in ((zeroed[0], zeroed[1]), (zeroed[3], zeroed[4])):
                small = conv.weight.abs().sum((1, 2, 3)).argsort()[: len(conv.weight) // 2]
                norm.weight[small], norm.bias[small] = 0, 0
        truth = original(task.valid.x)
        ours.append(float((model(task.valid.x) - truth).square().mean().detach()))
        theirs.append(float((zeroed(task.valid.x) - truth).square().mean().detach()))
    assert sum(ours) < 0.3 * sum(theirs)


def test_the_error_of_earlier_layers_is_repaired_too():
    """Targets are outputs of the original: a later layer that nothing was taken from is fitted to them all the same."""
    task = small_task()
    original = fit(small_cnn(), task, epochs=4, lr=1e-2).eval()
    model = copy.deepcopy(original)
    lasso_channel(model, task, prune_ratio=0.5, ridge=1e-8, **ONLY)
    sums = Sums(model, original, task, 10, 16)
    found = sums.of("8")
    weight = augmented(model[8])
    best = found.refit(weight, torch.ones(9, dtype=torch.bool), 0)
    assert float(found.error(weight).sum()) <= 1.001 * float(found.error(best).sum())


def test_prunes_a_trained_network_without_losing_it():
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=1e-2).eval()
    before = evaluate(model, task).value
    lasso_channel(model, task, prune_ratio=0.5, finetune=0, round_to=1)
    assert evaluate(model, task).value >= before - 0.05
    assert (model[0].out_channels, model[3].out_channels) == (4, 8)


def test_no_layer_is_emptied():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU(), nn.Linear(3, 4))
    lasso_channel(model, small_task(), prune_ratio=0.99, **ONLY)
    assert model[1].out_features == 1
