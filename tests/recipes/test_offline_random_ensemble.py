"""The thesis's random average: the plain mean in the mean over draws, for the target and for the student's gradient."""

from functools import partial

import pytest
import torch

from conftest import small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.ensemble import Ensemble
from featherweight.core.ledger import recording
from featherweight.ingredients.average.offline_random_ensemble import offline_random_ensemble
from featherweight.ingredients.match.softened import softened
from matches import on_logits

MODES = ["subset", "dirichlet", "single"]


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_convex_and_equal_in_the_mean(mode):
    drawn = torch.stack([offline_random_ensemble(3, mode=mode) for _ in range(3000)])
    assert (drawn >= 0).all()
    torch.testing.assert_close(drawn.sum(1), torch.ones(3000))
    torch.testing.assert_close(drawn.mean(0), torch.full((3,), 1 / 3), rtol=0, atol=0.03)
    assert float(drawn.var(0).min()) > 0.01


@pytest.mark.parametrize("mode", MODES)
def test_expected_gradient_is_that_of_the_plain_mean(mode):
    members = [small_mlp().eval() for _ in range(3)]
    x, z = torch.randn(6, 1, 8, 8), torch.randn(6, 4)
    random = Ensemble(members, partial(offline_random_ensemble, mode=mode))
    with torch.no_grad():
        plain, drawn = Ensemble(members)(x), [random(x) for _ in range(600)]
    grad = partial(torch.func.grad(lambda z, t: on_logits(softened, z, t, temperature=1.0)), z)
    grads = torch.stack([grad(t) for t in drawn])
    exact = grad(plain)
    assert float((grads.mean(0) - exact).norm()) < 0.1 * float((grads - exact).norm(dim=(1, 2)).mean())


def test_a_seed_repeats_the_draws():
    def draws():
        torch.manual_seed(5)
        return torch.stack([offline_random_ensemble(4) for _ in range(5)])

    assert torch.equal(draws(), draws())


def test_one_teacher_is_said_and_several_are_averaged():
    options = {"feature_epochs": 0, "epochs": 1, "pairs": [("1", "1"), ("3", "3")]}
    with recording() as ledger:
        entry("chou_full")(small_mlp(), small_task(teacher=small_mlp()), **options)
    assert any("the random average of teachers is that teacher" in text for text in ledger.notes)
    several = Ensemble([small_mlp(), small_mlp()])
    with recording() as ledger:
        entry("chou_full")(small_mlp(), small_task(teacher=several), plan="joint", **options)
    assert not any("the random average" in text for text in ledger.notes)
