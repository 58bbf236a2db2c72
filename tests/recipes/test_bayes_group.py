"""Louizos et al. 2017: channels whose scale is noise go for free, and the noise of the others tells their bits."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, mask_of
from featherweight.core.ledger import recording
from featherweight.core.site import Site
from featherweight.core.task import Task, evaluate, run
from featherweight.errors import CompressionError
from featherweight.recipes.bayes_group import bits, gap, log_alpha
from featherweight.recipes.sparse_vd import dropout_kl

bayes_group = entry("bayes_group")
FAST = {"epochs": 12, "lr": 0.02, "noise_lr": 0.3, "round_to": 1}


def planted(n=800, features=24, useful=4):
    x = torch.randn(n + 8000, features)
    y = (x[:, :useful].sum(1) > 0).long()
    return Task(train=Batches(x[:n], y[:n], 50), valid=Batches(x[n:], y[n:], 8000))


def watching(seen):
    """A fit that keeps a copy of the random network at the end of its training, and what its loss consists of."""

    def watched(model, task, *, epochs, step=None, **options):
        if step is None:
            return model
        fit(model, task, epochs=epochs, step=step, **options)
        seen["terms"] = {p: step(model.eval(), next(iter(task.train)), p) for p in (0.1, 1.0)}
        seen["loss"] = task.loss(*run(model, task, next(iter(task.train))))
        seen["model"] = copy.deepcopy(model)
        seen["named"] = {name: p.detach().clone() for name, p in model.named_parameters()}
        seen["random"] = model.train()(task.valid.x).detach()
        seen["mean"] = model.eval()(task.valid.x).detach()
        return model

    return watched


def test_finds_the_inputs_that_matter_shrinks_and_loses_nothing_by_it():
    seen = {}
    task = planted()
    model = fit(nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 2)), task, epochs=5, lr=0.01)
    before = evaluate(model, task).value
    with recording() as ledger:
        bayes_group(model, Task(train=task.train, valid=task.valid, fit=watching(seen)),
                    epochs=20, lr=0.01, noise_lr=0.1, round_to=1)  # fmt: skip
    assert (model[0].weight != 0).any(0).nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert model[0].out_features == model[2].in_features < 20
    after = evaluate(model, task).value
    right = [float((seen[kind].argmax(1) == task.valid.y).float().mean()) for kind in ("mean", "random")]
    assert abs(after - right[0]) <= 0.001, "removing what is above the threshold costs nothing"
    assert after >= right[1] - 0.005
    assert after >= before
    assert any("bits a weight bear its noise" in text for text in ledger.notes)
    assert not [name for name, _ in model.named_parameters() if "fw_" in name]


def test_the_loss_is_the_lower_bound_with_divergences_summed_over_scales_and_weights():
    seen = {}
    model, task = small_mlp(), small_task(fit=watching(seen))
    attach(model[1], Mask(torch.rand(32, 64) > 0.4))
    keep = {1: mask_of(model[1]).clone(), 3: torch.ones(4, 32, dtype=torch.bool)}
    bayes_group(model, task, **FAST | {"penalty": 0.5, "warmup": 0.2, "threshold": -3.0})
    held = seen["named"]
    whole = dropout_kl(log_alpha(held["fw_gate_mean"], held["fw_gate_log_variance"])).sum()
    assert len(held["fw_gate_mean"]) == 64 + 32
    for i in (1, 3):
        q = Normal(seen["model"][i].weight.detach(), (held[f"{i}.fw_log_variance"] / 2).exp())
        whole = whole + kl_divergence(q, Normal(0.0, 1.0))[keep[i]].sum()
    for progress, beta in ((0.1, 0.25), (1.0, 0.5)):
        terms = seen["terms"][progress]
        torch.testing.assert_close(terms["divergence"].detach(), beta / 96 * whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(terms["loss"], seen["loss"])
    assert torch.equal(mask_of(model[1])[:, model[1].weight.any(0)], (model[1].weight != 0)[:, model[1].weight.any(0)])


def test_weights_are_means_times_means_and_closed_scales_are_gone():
    seen = {}
    model, task = small_cnn(), small_task(fit=watching(seen))
    options = FAST | {"threshold": 0.0, "penalty": 3.0}
    bayes_group(model, task, **options)
    twin, held = seen["model"], seen["named"]
    noise = log_alpha(held["fw_gate_mean"], held["fw_gate_log_variance"])
    left = noise <= 0
    assert 0 < int(left.sum()) < 24
    assert (model[0].out_channels, model[3].out_channels) == (int(left[:8].sum()), int(left[8:].sum()))
    z = held["fw_gate_mean"]
    torch.testing.assert_close(model[3].weight, (twin[3].weight * z[:8, None, None])[left[8:]][:, left[:8]])
    torch.testing.assert_close(model[8].weight, (twin[8].weight * z[8:])[:, left[8:]])
    torch.testing.assert_close(model[0].weight, twin[0].weight[left[:8]])


def test_the_first_layer_is_never_noisier_than_its_limit():
    seen = {}
    bayes_group(small_mlp(), small_task(fit=watching(seen)), **FAST | {"first_variance": 1e-3, "threshold": -4.0})
    assert seen["named"]["1.fw_log_variance"].exp().max() <= 1.001e-3
    assert seen["named"]["3.fw_log_variance"].exp().max() > 1e-3


def test_bits_come_from_the_variance_of_the_product():
    z, z_variance, w, w_variance = 0.7, 0.04, torch.randn(4, 6), 0.01
    draws = (z + math.sqrt(z_variance) * torch.randn(400_000, 1, 1)) * (
        w[:1] + math.sqrt(w_variance) * torch.randn(400_000, 1, 6)
    )
    wanted = z_variance * (w_variance + w[:1].square()) + w_variance * z**2
    torch.testing.assert_close(draws.var(0), wanted, rtol=0.02, atol=1e-3)
    site, square = Site.of(w), torch.tensor(z**2 + z_variance)
    every = z_variance * (w_variance + w.square()) + w_variance * z**2
    significand = math.ceil((-(2 * every).log2()).floor().clamp(0, 23).mean())
    found = bits(site, torch.full((4, 6), math.log(w_variance)), torch.tensor(z), square)
    largest = math.floor(math.log2(float((z * w).abs().max())))
    assert found == (math.ceil(math.log2(largest + significand + 2)), significand)
    sharp = bits(site, torch.full((4, 6), -30.0), torch.tensor(1.0), torch.tensor(1.0))
    assert sharp[1] == 23
    assert bits(site, torch.full((4, 6), -30.0), torch.tensor(0.0), torch.tensor(0.0)) == (0, 0)


def test_weights_rounded_to_their_bits_predict_the_same():
    task = planted()
    model = fit(nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 2)), task, epochs=5, lr=0.01)
    with recording() as ledger:
        bayes_group(model, task, epochs=20, lr=0.01, noise_lr=0.1, round_to=1)
    before = evaluate(model, task).value
    for i in (0, 2):
        (text,) = [text for text in ledger.notes if text.startswith(f"{i}: ") and "significand" in text]
        unit = 2.0 ** -int(text.split(" of the significand")[0].split()[-1])
        held = model[i].parametrizations.weight.original if hasattr(model[i], "parametrizations") else model[i].weight
        assert int(text.split()[1]) < 10
        with torch.no_grad():
            held.copy_((held / unit).round() * unit)
    assert evaluate(model, task).value >= before - 0.02


def test_the_threshold_is_the_widest_gap_and_a_given_one_counts():
    assert gap(torch.tensor([-12.0, -9.0, -5.5, -5.0, -1.0, -0.5, 0.5, 9.0])) == pytest.approx(-3.0)
    assert gap(torch.tensor([-9.0, 5.0])) == pytest.approx(-2.5)
    model = small_mlp()
    with pytest.raises(CompressionError, match="no gate was closed"):
        bayes_group(model, small_task(), **FAST | {"threshold": 100.0})
    with recording() as ledger:
        bayes_group(model, small_task(), **FAST | {"threshold": -100.0, "epochs": 1})
    assert model[3].in_features == 1
    assert sum("all inputs were closed" in text for text in ledger.notes) == 2
