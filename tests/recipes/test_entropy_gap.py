"""Luo and Wu 2017: entropy of pooled activations; constant 0, uniform log m, blind to scale; layer after layer."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import small_cnn, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.site import Site
from featherweight.core.study import Study
from featherweight.core.task import evaluate
from featherweight.ingredients.score.entropy import entropies, entropy

gap = entry("entropy_gap")
NOW = {"epochs": 0, "finetune": 0, "round_to": 1}


def test_constant_is_nothing_and_uniform_is_the_logarithm_of_the_bins():
    values = torch.stack([torch.full((1000,), 3.0), torch.arange(1000.0), torch.arange(1000.0) % 2], 1)
    found = entropies(values)
    assert found[0] == 0
    assert found[1] == pytest.approx(math.log(100))
    assert found[2] == pytest.approx(math.log(2))


@settings(deadline=None, max_examples=25)
@given(st.floats(-50, 50), st.sampled_from([0.25, 2.0, 64.0]), st.integers(0, 10**6))
def test_scale_and_shift_change_nothing(shift, scale, seed):
    values = torch.randn(400, 3, generator=torch.Generator().manual_seed(seed)).double()
    torch.testing.assert_close(entropies(scale * values + shift), entropies(values), rtol=0, atol=0.03)


def test_it_is_the_mean_over_positions_behind_the_relu_that_counts():
    model, task = small_cnn().eval(), small_task()
    study = Study(model, task, ["0", "3"], 3)
    with recording() as ledger:
        found = entropy(Site("3", model[3], study=study))
    torch.testing.assert_close(found, entropies(model[:6](task.train.x).detach().mean((2, 3))))
    assert ledger.notes == ["96 samples for 100 bins of entropy: raise calibration_batches, there should be many a bin"]


def test_channels_that_say_nothing_go_layer_after_layer_with_training_between():
    task = small_task()
    model, widths = fit(small_cnn(), task, epochs=3, lr=1e-2), []
    with torch.no_grad():
        for norm, quiet in ((model[1], [1, 4]), (model[4], [0, 3, 8, 15])):
            norm.weight[quiet], norm.bias[quiet] = 0, 0.7  # the same for every image

    def watched_fit(model, task, **options):
        widths.append((model[0].out_channels, model[3].out_channels, options["epochs"]))
        return fit(model, task, **options)

    loud = model[3].weight.detach()[[i for i in range(16) if i not in (0, 3, 8, 15)]]
    gap(model, small_task(fit=watched_fit), prune_ratio=0.25, epochs=4, finetune=3, round_to=1, lr=1e-12)
    assert widths == [(6, 16, 2), (6, 12, 2), (6, 12, 3)], "forward, an equal share of the epochs each, then the rest"
    torch.testing.assert_close(model[3].weight.detach(), loud[:, [0, 2, 3, 5, 6, 7]], atol=1e-4, rtol=0)


def test_it_recovers():
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=1e-2)
    before = evaluate(model, task).value
    gap(model, task, prune_ratio=0.5, epochs=2, finetune=6, lr=1e-2, round_to=1)
    assert (model[0].out_channels, model[3].out_channels) == (4, 8)
    assert evaluate(model, task).value >= before - 0.1
