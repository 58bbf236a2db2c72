"""The mixture is the textbook's, its prior is a code length that falls, and weights end as its few means."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import gamma, norm

from featherweight.catalogue import entry
from featherweight.core.forms import Mask, attach, bake
from featherweight.core.ledger import recording
from featherweight.core.task import evaluate
from featherweight.errors import BadData, CompressionError
from featherweight.recipes import soft_weight_sharing as module
from featherweight.recipes.soft_weight_sharing import Mixture, divergence, merged, responsible

sws = entry("soft_weight_sharing")
LAYERS = (0, 3, 8)
FAST = {"epochs": 12, "zero_share": 0.5, "precision_lr": 0.2, "mean_lr": 0.02}


@pytest.fixture
def mixture() -> Mixture:
    found = Mixture(5, 0.9, 0.6)
    with torch.no_grad():
        found.log_precision.copy_(torch.randn(5) + 3)
        found.log_mixing.copy_(torch.randn(4))
    return found


def test_the_prior_is_that_of_a_library(mixture, monkeypatch):
    weight = torch.randn(40) * 0.3
    pi = np.append(0.9, 0.1 * mixture.log_mixing.softmax(0).detach().numpy())
    deviation = mixture.log_precision.detach().exp().rsqrt().numpy()
    wanted = -logsumexp(norm.logpdf(weight.numpy()[:, None], mixture.mu.detach().numpy(), deviation), 1, pi).sum()
    assert float(mixture.complexity(weight).detach()) == pytest.approx(float(wanted), rel=1e-5)
    monkeypatch.setattr(module, "CHUNK", 7)  # in parts it is the same
    assert float(mixture.complexity(weight).detach()) == pytest.approx(float(wanted), rel=1e-5)


def test_the_hyperprior_is_gamma_but_for_a_constant():
    mixture, other = Mixture(2, 0.9, 0.6), Mixture(2, 0.9, 0.6)
    with torch.no_grad():
        other.log_precision.copy_(torch.tensor([7.0, 8.0]))
    first, second = (m.log_precision.detach().exp().double().numpy() for m in (mixture, other))
    wanted = gamma(5e3, scale=1 / 2.0).logpdf([first[0], second[0]]) + gamma(2.5e2, scale=10).logpdf(
        [first[1], second[1]]
    )
    gap = float((mixture.hyperprior() - other.hyperprior()).detach())
    assert gap == pytest.approx(wanted[1] - wanted[0], rel=1e-5)


def test_responsibilities_sum_to_one_and_with_one_zero_component_the_prior_is_weight_decay():
    mu, precision, pi = torch.randn(4), torch.rand(4) + 1, torch.rand(4).softmax(0)
    torch.testing.assert_close(responsible(torch.randn(9), mu, precision, pi).sum(1), torch.ones(9))
    mixture = Mixture(2, 1 - 1e-9, 0.6)
    weight = torch.randn(20, requires_grad=True)
    mixture.complexity(weight).backward()
    torch.testing.assert_close(
        weight.grad, weight.detach() * float(mixture.log_precision[0].detach().exp()), rtol=1e-4, atol=1e-5
    )


def test_equal_components_merge_and_the_nearest_to_zero_becomes_zero():
    mixture = Mixture(5, 0.9, 0.6)
    with torch.no_grad():
        mixture.means.copy_(torch.tensor([0.3, 0.3, -0.4, 1e-5]))
        mixture.log_precision.fill_(6.0)
    mu, precision, pi = merged(mixture, 0.01)
    torch.testing.assert_close(mu.sort().values, torch.tensor([-0.4, 0.0, 0.3], dtype=torch.float64), atol=1e-6, rtol=0)
    assert float(pi.sum()) == pytest.approx(1.0)
    assert float(pi[mu == 0]) == pytest.approx(0.925)
    torch.testing.assert_close(precision, torch.full((3,), math.exp(6.0), dtype=torch.float64), rtol=1e-4, atol=0)
    gap = divergence(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]))
    assert gap[0, 1] == 0.5  # of two unit Gaussians one apart, in either direction


def test_few_values_and_many_zeros_are_left_and_the_description_gets_shorter(trained):
    model, task = copy.deepcopy(trained[0]), trained[1]
    with recording() as ledger:
        sws(model, task, **FAST)
    bake(model)
    weights = torch.cat([model[at].weight.flatten() for at in LAYERS]).detach()
    assert 2 < weights.unique().numel() <= 16
    assert float((weights == 0).float().mean()) > 0.4
    assert evaluate(model, task).value > 0.9
    told = next(one for one in ledger.notes if "under the mixture" in one)
    before, after = (float(number) for number in re.findall(r"-?\d+\.\d+", told))
    assert after < before - 0.2


def test_more_of_the_prior_takes_more_weights_to_zero(trained):
    zeros = []
    for tau in (1e-7, 0.02, 0.05):
        model = sws(copy.deepcopy(trained[0]), trained[1], **{**FAST, "tau": tau, "lr": 5e-3})
        zeros.append(sum(int((model[at].weight == 0).sum()) for at in LAYERS))
    assert zeros[0] < 0.7 * zeros[1] < 0.7 * zeros[2]


def test_masked_weights_stay_zero_and_out_of_the_prior(trained):
    model, keep = copy.deepcopy(trained[0]), torch.rand(16, 8, 3, 3) > 0.5
    attach(model[3], Mask(keep))
    sws(model, trained[1], **FAST)
    assert bool((bake(model)[3].weight[~keep] == 0).all())


def test_bad_input(trained):
    with pytest.raises(CompressionError, match="pass a smaller one, or more epochs"):
        sws(copy.deepcopy(trained[0]), trained[1], epochs=1)  # wide components: the zero one takes everything
    model = copy.deepcopy(trained[0])
    with torch.no_grad():
        for at in LAYERS:
            model[at].weight.zero_()
    with pytest.raises(BadData, match="there is nothing to share"):
        sws(model, trained[1], epochs=1)
