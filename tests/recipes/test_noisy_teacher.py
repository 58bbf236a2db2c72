"""Sau and Balasubramanian 2016: the noise adds a constant to the expected loss, and only variance to its gradient."""

from functools import partial

import pytest
import torch

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.errors import BadOption
from featherweight.ingredients.match.logit_regression import squared_logits
from featherweight.ingredients.match.noisy_teacher import noisy_logits
from matches import on_logits


@pytest.mark.parametrize("hits", ["sample", "batch"])
@pytest.mark.parametrize("noise", ["elementwise", "scalar"])
def test_expected_loss_and_gradient(hits, noise):
    alpha, variance = 0.5, 0.4
    ours, theirs = torch.randn(4, 5), torch.randn(4, 5)
    noisy = partial(on_logits, noisy_logits, share=alpha, variance=variance, hits=hits, noise=noise)
    drawn = torch.func.grad_and_value(lambda z, _: noisy(z, theirs))
    grads, losses = torch.func.vmap(drawn, (None, 0), randomness="different")(ours, torch.zeros(3000))
    plain = on_logits(squared_logits, ours, theirs)
    added = 0.5 * alpha * variance * theirs.square().sum(1).mean()
    assert float(losses.mean()) == pytest.approx(float(plain + added), rel=0.08)
    exact = torch.func.grad(lambda z: on_logits(squared_logits, z, theirs))(ours)
    assert float((grads.mean(0) - exact).abs().max()) < 0.05
    spread = grads.var(0).sum()  # of (1 + xi) z / B: the noise alone
    assert float(spread) == pytest.approx(float(alpha * variance * theirs.square().sum() / 16), rel=0.2)


def test_drawn_anew_at_every_step_and_never_without_a_share():
    ours, theirs = torch.randn(4, 5), torch.randn(4, 5)
    assert on_logits(noisy_logits, ours, theirs) != on_logits(noisy_logits, ours, theirs)
    assert on_logits(noisy_logits, ours, theirs, share=0.0) == on_logits(squared_logits, ours, theirs)


def test_share_outside_its_range():
    task = small_task(teacher=small_cnn())
    with pytest.raises(BadOption, match=r"share=1.5: must be a fraction in \[0, 1\]"):
        entry("noisy_teacher")(small_cnn(), task, settings={"share": 1.5})
