"""The paper's claims: levels, gradients that are right on average, bit-exact codes, and training that recovers."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import small_cnn, small_mlp
from featherweight.catalogue import entry
from featherweight.core.blueprint import blueprint, conform
from featherweight.core.forms import Mask, activation_form, attach, bake, codes_of
from featherweight.core.grids import Seen
from featherweight.core.ledger import recording
from featherweight.core.site import Site
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption, CompressionError
from featherweight.export import onnx
from featherweight.ingredients.grid.dorefa import (
    DoReFaGradient,
    DoReFaWeights,
    dorefa_gradient,
    dorefa_weights,
    mean_size,
    unit_range,
)
from featherweight.quantize import quantize

one = torch.ones(())


@settings(deadline=None)
@given(st.integers(2, 6))
def test_there_are_exactly_2_to_the_k_levels_and_zero_is_none(bits: int) -> None:
    weight = torch.linspace(-1, 1, 4001)
    levels = torch.unique(DoReFaWeights(bits, one)(weight))
    top = 2**bits - 1
    torch.testing.assert_close(levels, torch.arange(top + 1) * (2 / top) - 1)
    assert not (levels == 0).any()


def test_the_formula_by_hand() -> None:
    weight = torch.tensor([0.2, -0.5, 1.0])
    wanted = 2 * (3 * (weight.tanh() / (2 * weight.tanh().max()) + 0.5)).round() / 3 - 1
    torch.testing.assert_close(DoReFaWeights(2, one)(weight), wanted)


def test_one_bit_is_the_sign_times_the_mean_size() -> None:
    weight = torch.tensor([0.2, -0.4, 0.0])
    torch.testing.assert_close(DoReFaWeights(1, one)(weight), torch.tensor([0.2, -0.2, 0.2]))


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 50), st.booleans())
def test_codes_decode_to_the_weight_bit_for_bit(bits: int, seed: int, masked: bool) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(6, 5)
    if masked:
        attach(layer, Mask(torch.rand(5, 6) > 0.5))
    attach(layer, dorefa_weights(Site("", layer), bits))
    wanted = layer.weight.detach().clone()
    codes = codes_of(bake(layer))
    assert codes is not None
    assert torch.equal(codes.decode(), wanted)


@pytest.mark.parametrize("bits", [1, 3])
def test_scales_are_those_of_the_survivors(bits: int) -> None:
    layer = nn.Linear(4, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, -2.0, 0.01, 9.0]]))
    keep = torch.tensor([[True, True, False, False]])
    attach(layer, Mask(keep))
    attach(layer, dorefa_weights(Site("", layer), bits))
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([[2.0, -2.0, 0.0, 0.0]]))


@settings(deadline=None)
@given(st.integers(2, 8))
def test_the_mean_size_of_a_layer_is_kept(bits: int) -> None:
    layer = nn.Linear(30, 20)
    before = mean_size(layer.weight)
    attach(layer, dorefa_weights(Site("", layer), bits))
    torch.testing.assert_close(mean_size(layer.weight), before)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_gradients_pass_straight_through_the_rounding(bits: int) -> None:
    weight = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
    DoReFaWeights(bits, one)(weight).sum().backward()
    assert weight.grad is not None
    if bits == 1:
        assert weight.grad.tolist() == [1.0, 1.0, 1.0]
        return
    plain = weight.detach().clone().requires_grad_()
    (plain.tanh() / plain.tanh().abs().max()).sum().backward()
    torch.testing.assert_close(weight.grad, plain.grad)


def test_activations_are_clipped_to_the_unit_and_so_is_their_gradient() -> None:
    value = torch.tensor([-1.0, 0.2, 0.9, 3.0], requires_grad=True)
    out = unit_range(Seen(), 1)(value)
    out.sum().backward()
    assert value.grad is not None
    assert out.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert value.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 20))
def test_gradients_are_right_on_average_and_on_the_grid_of_their_sample(bits: int, seed: int) -> None:
    torch.manual_seed(seed)
    gradient = torch.randn(2, 3) * torch.tensor([[1.0], [1e-3]])
    widest = gradient.abs().amax(1, keepdim=True)
    form, top = DoReFaGradient(bits), 2**bits - 1
    draws = form(gradient.repeat(2000, 1)).view(2000, 2, 3)
    symbols = (draws / (2 * widest) + 0.5) * top
    torch.testing.assert_close(symbols, symbols.round(), rtol=0, atol=1e-3)
    assert (draws.abs() <= widest * 1.0001).all()
    step = 2 * widest / top
    assert ((draws.mean(0) - gradient).abs() < 5 * step * 0.5 / 2000**0.5 + 1e-6 * widest).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_gradients_behind_a_quantized_layer_take_few_values_per_sample(bits: int) -> None:
    layer = nn.Conv2d(2, 4, 3, bias=False)
    arrived: list[Tensor] = []

    def keep_gradient(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        through = output.clone()
        through.register_hook(arrived.append)
        return through

    layer.register_forward_hook(keep_gradient)  # stands between the layer and what quantizes its gradient
    quantize(layer, Task(valid=[]), weights=None, grads=dorefa_gradient, grad_bits=bits)
    output = layer(torch.randn(3, 2, 8, 8))
    wanted = torch.randn_like(output)
    output.backward(wanted)
    (gradient,) = arrived
    assert all(len(sample.unique()) <= 2**bits for sample in gradient)
    torch.testing.assert_close(gradient.abs().amax((1, 2, 3)), wanted.abs().amax((1, 2, 3)))


def test_a_gradient_of_zeros_stays_finite() -> None:
    assert torch.isfinite(DoReFaGradient(4)(torch.zeros(2, 3))).all()


def test_the_first_and_the_last_layer_stay_float_and_are_said(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    with recording() as ledger:
        small = entry("dorefa")(copy.deepcopy(model), task, epochs=0)
    assert set(ledger.skipped) == {"0", "8"}
    assert {at for at in ("input", "output", "grad") if activation_form(small.get_submodule("3"), at)} == {
        "input",
        "grad",
    }
    weight = bake(small).get_submodule("3").weight
    assert isinstance(weight, Tensor)
    assert len(torch.unique(weight)) == 2


def test_training_brings_the_metric_back(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    untrained = entry("dorefa")(copy.deepcopy(model), task, epochs=0)
    tuned = entry("dorefa")(copy.deepcopy(model), task, epochs=6, lr=0.01)
    assert evaluate(tuned, task).value >= max(0.9, evaluate(untrained, task).value)


@pytest.mark.parametrize(("bits", "stored"), [(1, 1), (4, 1), (7, 1), (8, 0)])
def test_export_is_int8_where_the_levels_fit_and_says_so_where_not(
    trained: tuple[nn.Module, Task], bits: int, stored: int, tmp_path: Path
) -> None:
    model, task = trained
    small = entry("dorefa")(copy.deepcopy(model), task, epochs=0, weight_bits=bits, act_bits=4)
    report = onnx(small, tmp_path / "m.onnx", example_inputs=task.inputs())
    assert report.int8_weights == stored
    assert report.shifted == (bits == 8)
    assert report.difference is not None
    assert report.difference < 1e-4


def test_pruned_levels_are_stored_as_int8_too(trained: tuple[nn.Module, Task], tmp_path: Path) -> None:
    model, task = copy.deepcopy(trained[0]), trained[1]
    layer = model.get_submodule("3")
    attach(layer, Mask(torch.rand(16, 8, 3, 3) > 0.6))
    small = entry("dorefa")(model, task, epochs=0, weight_bits=3, act_bits=4)
    report = onnx(small, tmp_path / "m.onnx", example_inputs=task.inputs())
    assert report.int8_weights == 1
    weight = bake(small).get_submodule("3").weight
    assert isinstance(weight, Tensor)
    assert 0.5 < float((weight == 0).float().mean()) < 0.7


def test_forms_are_stored_and_restored(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    small = entry("dorefa")(copy.deepcopy(model), task, epochs=0, weight_bits=3)
    again = conform(small_cnn(), *blueprint(small)).eval()
    x = task.inputs()[0][0]
    with torch.no_grad():
        assert torch.equal(again(x), small.eval()(x))
    assert isinstance(activation_form(again.get_submodule("3"), "grad"), DoReFaGradient)


def test_refusals(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    with pytest.raises(CompressionError, match="keep_first_last=False"):
        entry("dorefa")(small_mlp(), task, epochs=0)
    with pytest.raises(BadOption, match="act_bits=0"):
        entry("dorefa")(copy.deepcopy(model), task, act_bits=0, epochs=0)
