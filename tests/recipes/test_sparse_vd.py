"""Molchanov et al. 2017: the divergence is the integral's, noise that of random weights, what bears it goes freely."""

import copy
import math

import pytest
import torch
from torch import nn

from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, mask_of
from featherweight.core.ledger import recording
from featherweight.core.noise import LOG_VARIANCE, linear_sites, noisy, samples
from featherweight.core.norms import settle_norms
from featherweight.core.task import Task, evaluate, run
from featherweight.errors import BadOption, CompressionError
from featherweight.recipes.sparse_vd import dropout_kl

sparse_vd = entry("sparse_vd")
FAST = {"epochs": 20, "lr": 0.01, "noise_lr": 0.15}


def zeros(model):
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)


def test_divergence_is_that_of_the_integral():
    """KL = E log|e| - log(alpha) / 2 + const, e ~ N(1, alpha), the constant such that it ends at 0."""
    grid = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density = torch.exp(-0.5 * grid.square()) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])
    log_alpha = torch.linspace(-6, 6, 25, dtype=torch.float64)
    exact = torch.stack(
        [(density * (1 + (a / 2).exp() * grid).abs().clamp_min(1e-30).log()).sum() - a / 2 for a in log_alpha]
    )
    exact += 0.5 * (math.log(2) + 0.5772156649015329)  # minus E log|N(0, 1)|
    found = dropout_kl(log_alpha)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.01)
    assert (found >= 0).all()
    assert (found.diff() < 0).all()
    assert float(dropout_kl(torch.tensor(20.0))) < 1e-3


LAYERS = {
    "linear": (nn.Linear(6, 5), (6,)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 5, 5)),
    "grouped, reflecting": (nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="reflect"), (4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), (4, 3, 3)),
    "1d": (nn.Conv1d(3, 4, 3, dilation=2), (3, 9)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_noise_at_the_outputs_is_that_of_random_weights(kind):
    layer, shape = copy.deepcopy(LAYERS[kind][0]), LAYERS[kind][1]
    model, x, draws = nn.Sequential(layer).train(), torch.randn(1, *shape), 3000
    attach(layer, Mask(torch.rand(layer.weight.shape) > 0.3))
    with noisy(model, linear_sites(model, Task(valid=[x])), 0.0) as held, torch.no_grad():
        (log_variance,) = held.values()
        log_variance.copy_(torch.randn(log_variance.shape) - 2)
        found = model(x.expand(draws, *shape))
        plain = copy.deepcopy(LAYERS[kind][0])
        weight, deviation = layer.weight.clone(), (log_variance / 2).exp() * mask_of(layer)
        drawn = []
        for _ in range(draws):
            plain.weight.copy_(weight + deviation * torch.randn(weight.shape))
            drawn.append(plain(x))
    wanted = torch.cat(drawn)
    spread = wanted.std(0)
    assert float(((found.mean(0) - wanted.mean(0)) / (spread + 1e-6)).abs().max()) < 0.12
    assert float((found.std(0) / (spread + 1e-6) - 1).abs()[spread > 1e-6].max()) < 0.12
    assert torch.equal(model.eval()(x), model.train()(x)), "no noise is left behind"


def test_the_loss_is_the_lower_bound_of_one_sample_with_a_rising_divergence():
    seen = {}

    def watched(model, task, *, epochs, step=None, **options):
        if step is not None:
            batch = next(iter(task.train))
            seen.update({p: step(model.eval(), batch, p) for p in (0.0, 0.2, 0.4, 1.0)})
            output, target = run(model, task, batch)
            seen["loss"] = task.loss(output, target)
            seen["names"] = [name for name, _ in model.named_parameters() if LOG_VARIANCE in name]
        return model

    model, task = small_mlp(), small_task(fit=watched, loss=lambda o, t: nn.functional.mse_loss(o[:, 0], t.float()))
    sparse_vd(model, task, sparsity=0.5, start=-5.0, penalty=2.0, warmup=0.4)
    weights = torch.cat([model[i].parametrizations.weight.original.detach().flatten() for i in (1, 3)])
    whole = 2.0 * float(dropout_kl(-5.0 - weights.square().log()).sum()) / samples(task)
    assert samples(task) == 96
    assert seen["names"] == ["1.fw_log_variance", "3.fw_log_variance"]
    for progress, part in ((0.0, 0.0), (0.2, 0.5), (0.4, 1.0), (1.0, 1.0)):
        torch.testing.assert_close(seen[progress]["loss"], seen["loss"])
        assert float(seen[progress]["divergence"].detach()) == pytest.approx(part * whole, rel=1e-4)


def hard_task(n=2000, features=40, useful=5):
    """Labels that five of forty inputs make, with noise."""
    x = torch.randn(2 * n, features)
    y = (x[:, :useful].sum(1) + 0.1 * torch.randn(2 * n) > 0).long()
    return Task(train=Batches(x[:n], y[:n], 100), valid=Batches(x[n:], y[n:], 500))


def test_irrelevant_inputs_go_and_the_masked_network_predicts_what_the_random_ones_do():
    """Removing what bears noise costs nothing: 0.1 points of accuracy at most, 0.3 beside the mean of 100 samples."""
    sampled = {}

    def watched(model, task, *, epochs, step=None, **options):
        fit(model, task, epochs=epochs, step=step, **options)
        if step is None:
            return model
        with torch.no_grad():
            x, y = task.valid.x, task.valid.y
            likely = torch.stack([model.train()(x).softmax(1) for _ in range(100)]).mean(0)
            sampled["mean"] = float((likely.argmax(1) == y).float().mean())
            sampled["whole"] = float((model.eval()(x).argmax(1) == y).float().mean())
        return model

    task = hard_task()
    model = fit(nn.Sequential(nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 2)), task, epochs=5, lr=0.01)
    before = evaluate(model, task).value
    with recording() as ledger:
        sparse_vd(model, Task(train=task.train, valid=task.valid, fit=watched), epochs=30, lr=0.01, noise_lr=0.2)
    gone, total = zeros(model)
    after = evaluate(model, task).value
    assert abs(after - sampled["whole"]) <= 0.0011
    assert abs(after - sampled["mean"]) <= 0.003
    assert after >= before
    assert gone > 0.7 * total
    assert (model[0].weight[:, 5:] == 0).float().mean() > 0.85, "little is left that reads what does not matter"
    assert (model[0].weight[:, :5] != 0).float().mean() > 0.3
    assert any("of the weights kept" in text for text in ledger.notes)


def test_without_the_divergence_nothing_bears_noise():
    task = hard_task(400)
    model = fit(nn.Sequential(nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 2)), task, epochs=5, lr=0.01)
    with pytest.raises(CompressionError, match="noise_lr"):
        sparse_vd(model, task, penalty=0.0, epochs=10, lr=0.005, threshold=3.0, start=-25.0)
    assert not [name for name, _ in model.named_parameters() if "fw_" in name]
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("sparsity", [0.3, 0.75, 0.99])
def test_a_sparsity_moves_the_threshold_and_is_met_exactly(sparsity):
    model = small_cnn()
    attach(model[3], Mask(torch.rand(16, 8, 3, 3) > 0.5))
    masked = ~mask_of(model[3])
    with recording() as ledger:
        sparse_vd(model, small_task(), sparsity=sparsity, **FAST)
    gone, total = zeros(model)
    assert gone == max(int(sparsity * total), int(masked.sum()))
    assert not model[3].weight[masked].any()
    assert any("the threshold of log alpha is" in text for text in ledger.notes)


def test_no_layer_is_emptied_and_that_is_said():
    model = small_mlp()
    with recording() as ledger:
        sparse_vd(model, small_task(), threshold=-50.0, epochs=1)
    assert [int((model[i].weight != 0).sum()) for i in (1, 3)] == [1, 1]
    assert sum("the one that bears least noise is kept" in text for text in ledger.notes) == 2


class Tied(nn.Module):
    """A linear layer that shares an embedding's weight, two that share one, and one with a forward of its own."""

    def __init__(self):
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(4, 8), nn.Linear(64, 64), nn.Linear(64, 64)
        self.own, self.read, self.last = Scaled(64, 64), nn.Linear(64, 8), nn.Linear(8, 4, bias=False)
        self.second.weight, self.last.weight = self.first.weight, self.words.weight

    def forward(self, x):
        return self.last(self.read(self.own(self.second(input=self.first(x.flatten(1)).relu())).relu()))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_shared_weights_share_their_noise_and_what_is_no_plain_layer_is_left_alone():
    model, task = Tied(), small_task()
    before = {"own": model.own.weight.detach().clone(), "last": model.last.weight.detach().clone()}
    with recording() as ledger:
        sparse_vd(model, task, **FAST)
    assert torch.equal(model.first.weight, model.second.weight)
    assert (model.first.weight == 0).float().mean() > 0.5
    assert not any((getattr(model, name).weight == 0).any() for name in before)
    assert "of type Embedding" in ledger.skipped["last"]
    assert "computes something else" in ledger.skipped["own"]
    with pytest.raises(BadOption, match="random weights"):
        sparse_vd(model, task, where="own", **FAST)


def test_norms_are_settled_on_the_network_without_noise():
    model, task = small_cnn(), small_task()
    sparse_vd(model, task, **FAST)
    held = {k: v.clone() for k, v in model.state_dict().items()}
    settle_norms(model, task)
    assert all(torch.equal(v, held[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        first = torch.cat([model[0](x) for x, _ in task.train])
    torch.testing.assert_close(model[1].running_mean, first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
