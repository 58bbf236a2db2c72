"""Ye et al. 2018: rescaling changes nothing, proximal steps make exact zeros, constants move on and change nothing."""

import copy

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.channels import channel_groups
from featherweight.core.fit import fit
from featherweight.core.forms import bake
from featherweight.core.ledger import recording
from featherweight.core.task import evaluate
from featherweight.errors import BadOption, CompressionError
from featherweight.recipes.ista_bn import memory_costs, nearest_alpha, norms_of, rescale, scale, scale_groups
from featherweight.zoo import build

ista = entry("ista_bn")
SGD = {"optimizer": lambda params, lr: torch.optim.SGD(params, lr=lr)}


class Valid(nn.Module):
    """Convolutions without padding, one of them without a batch norm behind it, and a linear layer."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.fc, self.act = nn.Conv2d(8, 6, 3, bias=False), nn.Linear(6, 4), activation()

    def forward(self, x):
        x = self.act(self.norm1(self.conv1(x)))
        x = self.act(self.norm2(self.conv2(x)))
        return self.fc(self.act(self.conv3(x)).mean((2, 3)))


def parts(model, task):
    channels = channel_groups(model, task.inputs())
    return channels, scale_groups(model, task, channels, norms_of(model, task, channels))


@pytest.mark.parametrize("network", ["cnn", "resnet"])
def test_rescaling_scales_shifts_and_readers_leaves_the_output(network):
    task = small_task()
    model = small_cnn() if network == "cnn" else build("resnet:depth=8,channels=(4,4,8)", classes=4)
    model = fit(model, task, epochs=2).eval()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.bias.normal_()
    before, start = model(task.valid.x), copy.deepcopy(model.state_dict())
    channels, groups = parts(model, task)
    factors = rescale(model, task, channels, groups, 0.01)
    assert (factors == 0.01).all()
    torch.testing.assert_close(model(task.valid.x), before, rtol=1e-4, atol=1e-5)
    assert all(float(m.weight.detach().abs().max()) < 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    scale(model, channels, groups, 1 / factors)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, start[name], rtol=1e-5, atol=1e-6)
    groups.scale(model, factors)  # the scales alone, as one might think
    assert float((model(task.valid.x) - before).detach().abs().max()) > 0.05


def test_what_is_not_homogeneous_keeps_its_scales():
    model, task = Valid(nn.Softplus).eval(), small_task()
    before = model(task.valid.x)
    with recording() as ledger:
        factors = rescale(model, task, *parts(model, task), 0.1)
    assert (factors == 1).all()
    assert any("not positively homogeneous" in reason for reason in ledger.skipped.values())
    torch.testing.assert_close(model(task.valid.x), before, rtol=1e-4, atol=1e-5)


def test_the_costs_are_weights_and_maps_over_the_image():
    model, task = small_cnn(), small_task()
    channels, groups = parts(model, task)
    costs = memory_costs(model, task, channels, groups)
    expected = {"0": (1 * 9 + 16 * 9 + 64) / 64, "3": (8 * 9 + 4 + 16) / 64}
    for path, cost in expected.items():
        torch.testing.assert_close(costs[channels.outputs[path]], torch.full((len(channels.outputs[path]),), cost))
    assert nearest_alpha(model, groups, costs, 0.1 / float(costs.median())) == 0.1
    assert nearest_alpha(model, groups, costs, 1e-9) == 0.001


def test_every_step_is_the_proximal_one():
    seen = []

    def watched(model, task, **options):
        inner = options.pop("after_step")

        def record(progress):
            seen.append(model[1].weight.detach().clone())
            inner(progress)
            seen.append(model[1].weight.detach().clone())

        return fit(model, task, **{**options, "after_step": record, "decay": "constant"})

    task = small_task(fit=watched, loss=lambda output, target: 0 * output.sum())
    model = small_cnn()
    cost = (9 + 144 + 64) / 64
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(-0.5, 1.0, 8))
    with pytest.raises(CompressionError, match="raise the penalty"):
        ista(model, task, rho=0.1, alpha=1.0, epochs=1 / 3, lr=0.1, finetune=0, **SGD)
    old, new = seen
    torch.testing.assert_close(new, old.sign() * (old.abs() - 0.1 * 0.1 * cost).clamp_min(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta", [0.7, -0.7])
def test_constants_move_on_and_removal_changes_nothing_without_padding(beta):
    """Into the running mean behind the next layer, or into its bias; ReLU of the shift is what moves."""
    task = small_task()
    model = fit(Valid(), task, epochs=2).eval()
    with torch.no_grad():
        for norm in (model.norm1, model.norm2):
            norm.weight[::3] = 0
            norm.bias[::3] = beta
    before, mean = model(task.valid.x), model.norm2.running_mean.clone()
    ista(model, task, epochs=0, finetune=0, round_to=1)
    assert (model.conv1.out_channels, model.conv2.out_channels, model.conv3.in_channels) == (5, 5, 5)
    torch.testing.assert_close(model.eval()(task.valid.x), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.norm2.running_mean, mean[[1, 2, 4, 5, 7]]) == (beta < 0)
    assert (model.conv3.bias is None) == (beta < 0)


def test_training_makes_exact_zeros_and_the_network_stays_what_it_was():
    task, outputs = small_task(), []

    def watched(model, task, **options):
        fit(model, task, **options)
        plain = bake(copy.deepcopy(model)).eval()
        outputs.append((plain(task.valid.x), int((plain.norm1.weight == 0).sum() + (plain.norm2.weight == 0).sum())))
        return model

    model = fit(Valid(), task, epochs=6, lr=0.01)
    ista(model, small_task(fit=watched), rho=0.5, epochs=20, lr=0.02, finetune=0, round_to=1)
    trained, zeros = outputs[0]
    assert zeros > 0
    assert model.conv1.out_channels + model.conv2.out_channels == 16 - zeros
    torch.testing.assert_close(model.eval()(task.valid.x), trained, rtol=1e-3, atol=1e-4)


def test_slims_and_recovers():
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=0.01)
    before, weights = evaluate(model, task).value, sum(p.numel() for p in model.parameters())
    ista(model, task, rho=0.15, epochs=30, lr=0.02, finetune=10, round_to=1)
    assert sum(p.numel() for p in model.parameters()) < 0.8 * weights
    assert evaluate(model, task).value >= before - 0.1


def test_a_network_without_batch_norm_is_refused():
    with pytest.raises(BadOption, match=r"none behind 1: choose a method that ranks weights, such as pfec_l1 or ssl"):
        ista(small_mlp(), small_task())
