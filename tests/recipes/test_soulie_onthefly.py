"""The pull to two values: zero there alone, two humps where there was one, and less lost by product quantization."""

import copy

import pytest
import torch
from torch import nn

from conftest import small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, Product, attach, bake, codes_of
from featherweight.core.task import Task, evaluate
from featherweight.errors import CompressionError, UnknownName
from featherweight.recipes.soulie_onthefly import two_values

soulie = entry("soulie_onthefly")
PULLED = {"epochs": 20, "lr": 5e-3, "codebook_share": 0.5, "dim": 2}


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    task = small_task()
    return fit(small_mlp(), task, epochs=6, lr=0.01).eval(), task


@pytest.mark.parametrize("power", [1, 2])
def test_the_term_is_zero_at_two_values_of_one_size_alone(power):
    assert float(two_values(0.3 * torch.tensor([1.0, -1, -1, 1]), power)) == pytest.approx(0.0, abs=1e-6)
    assert float(two_values(torch.tensor([1.0, -1, -1, 1.1]), power)) > 1e-3
    weight = torch.randn(50)
    torch.testing.assert_close(two_values(7 * weight, power), two_values(weight, power))  # whatever the scale


def test_its_gradient_moves_each_weight_to_the_nearer_of_the_two():
    weight = torch.tensor([0.2, -0.3, 1.5, -2.0], requires_grad=True)
    two_values(weight).backward()
    size = weight.detach().square().mean().sqrt()
    assert torch.equal(weight.grad.sign(), (weight.detach() - size * weight.detach().sign()).sign())


def run(trained: tuple[nn.Module, Task], penalty: float) -> tuple[float, float, float]:
    """Bimodality (the second moment squared over the fourth), what quantization loses, the accuracy."""
    model, seen = copy.deepcopy(trained[0]), list[torch.Tensor]()

    def watched(net: nn.Module, task: Task, **options) -> nn.Module:
        fit(net, task, **options)
        seen.append(net[1].weight.detach().clone())
        return net

    soulie(model, small_task(fit=watched), penalty=penalty, **PULLED)
    weight = seen[0]
    lost = (weight - model[1].weight.detach()).square().sum() / weight.square().sum()
    return float(weight.square().mean() ** 2 / weight.pow(4).mean()), float(lost), evaluate(model, trained[1]).value


def test_two_humps_appear_and_product_quantization_loses_less_at_equal_accuracy(trained):
    plain, pulled = run(trained, 0.0), run(trained, 1.0)
    assert plain[0] < 0.6  # 1/3 for a Gaussian, 1 for two values
    assert pulled[0] > 0.85
    assert pulled[1] < 0.5 * plain[1]
    assert pulled[2] >= plain[2] - 0.05


def test_the_last_layer_is_quantized_more_coarsely(trained):
    model = copy.deepcopy(trained[0])
    soulie(model, trained[1], index_bits=3, last_bits=1, **{**PULLED, "epochs": 1})
    bake(model)
    rules = [codes_of(model[at]).rule for at in (1, 3)]
    assert all(isinstance(rule, Product) for rule in rules)
    assert [rule.codebooks.shape[1] for rule in rules] == [8, 2]


def test_masks_are_kept_and_zeros_are_not_pulled(trained):
    model, keep = copy.deepcopy(trained[0]), torch.rand(32, 64) > 0.5
    attach(model[1], Mask(keep))
    soulie(model, trained[1], penalty=1.0, **{**PULLED, "epochs": 2})
    assert bool((bake(model)[1].weight[~keep] == 0).all())


def test_bad_input(trained):
    with pytest.raises(CompressionError, match="pass a larger one"):
        soulie(copy.deepcopy(trained[0]), trained[1], epochs=0, codebook_share=0.01)
    with pytest.raises(UnknownName, match="Linear"):
        soulie(nn.Sequential(nn.Conv2d(1, 4, 3)), trained[1], epochs=0)
    model = copy.deepcopy(trained[0])
    with torch.no_grad():
        model[1].weight.zero_()
        model[3].weight.zero_()
    with pytest.raises(CompressionError):
        soulie(model, trained[1], **{**PULLED, "epochs": 0})
