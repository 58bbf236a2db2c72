"""The paper's claims: the gradient of the step, its scale and start; steps that training improves and files keep."""

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import featherweight as fw
from conftest import small_cnn
from featherweight.catalogue import entry
from featherweight.core.blueprint import blueprint, conform
from featherweight.core.fit import fit
from featherweight.core.forms import Form, Mask, activation_form, attach, bake, codes_of, forms_of
from featherweight.core.grids import ActivationGrid, Seen
from featherweight.core.site import Site
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption
from featherweight.export import onnx
from featherweight.ingredients.grid.lsq import (
    LearnedActivations,
    LearnedWeights,
    lsq_acts,
    lsq_acts_mean,
    lsq_tensor,
    lsq_weights,
)


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(0, 30))
def test_the_gradients_are_those_of_equations_3_and_5(bits: int, seed: int) -> None:
    torch.manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    value, g = (torch.randn(400) * 2**bits / 3).requires_grad_(), torch.randn(400)
    form = LearnedWeights(torch.tensor(0.7), low, high, None)
    (form(value) * g).sum().backward()
    ratio = value.detach() / 0.7
    inside = (low < ratio) & (ratio < high)
    of_step = torch.where(inside, ratio.round() - ratio, torch.where(ratio <= low, float(low), float(high)))
    assert value.grad is not None
    assert form.step.grad is not None
    assert torch.equal(value.grad, torch.where(inside, g, 0.0))
    torch.testing.assert_close(form.step.grad, (of_step * g).sum() / math.sqrt(400 * high), rtol=1e-3, atol=1e-4)


def test_activations_count_the_features_of_one_sample() -> None:
    form = LearnedActivations(0.5, 0, 3)
    form(torch.full((6, 25), 100.0)).sum().backward()
    assert form.step.grad is not None
    assert float(form.step.grad) == pytest.approx(6 * 25 * 3 / math.sqrt(25 * 3))


def test_each_channel_has_a_step_of_its_own_with_a_gradient_of_its_own() -> None:
    weight, steps = torch.randn(3, 50), torch.tensor([0.3, 0.5, 0.9])
    together = LearnedWeights(steps, -2, 1, 0)
    together(weight).square().sum().backward()
    for i in range(3):
        alone = LearnedWeights(steps[i], -2, 1, None)
        alone(weight[i]).square().sum().backward()
        assert together.step.grad is not None
        assert alone.step.grad is not None
        torch.testing.assert_close(together.step.grad[i], alone.step.grad)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_start(bits: int) -> None:
    weight, high = torch.randn(4, 30), 2 ** (bits - 1) - 1
    form = lsq_tensor(Site.of(weight), bits)
    assert isinstance(form, LearnedWeights)
    torch.testing.assert_close(form.step.detach(), 2 * weight.abs().mean() / math.sqrt(high))
    assert (form.low, form.high) == ((-127, 127) if bits == 8 else (-high - 1, high))


def test_activations_start_at_the_step_of_least_squared_error() -> None:
    seen, x = Seen(), torch.randn(4000).relu()
    seen(x)
    for bits in (2, 4, 8):
        best, mean = lsq_acts(seen, bits), lsq_acts_mean(seen, bits)

        def error(form: Form, scale: float = 1.0) -> float:
            assert isinstance(form, LearnedActivations)
            moved = LearnedActivations(form.step.item() * scale, form.low, form.high)
            return (moved(x) - x).square().mean().item()

        assert error(best) <= error(mean)
        assert all(error(best) <= error(best, scale) for scale in (0.8, 0.9, 1.1, 1.25))


def test_activations_below_zero_have_signed_integers() -> None:
    seen = Seen()
    seen(torch.tensor([-1.0, 2.0]))
    settled = lsq_acts(seen, 4).settled()
    assert isinstance(settled, ActivationGrid)
    assert (settled.low, settled.high) == (-8, 7)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 8), st.integers(0, 50), st.booleans())
def test_codes_decode_to_the_weight_bit_for_bit(bits: int, seed: int, masked: bool) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(6, 5)
    if masked:
        attach(layer, Mask(torch.rand(5, 6) > 0.5))
    attach(layer, lsq_weights(Site("", layer), bits))
    wanted = layer.weight.detach().clone()
    codes = codes_of(bake(layer))
    assert codes is not None
    assert torch.equal(codes.decode(), wanted)


def test_the_start_is_that_of_the_survivors() -> None:
    layer = nn.Linear(4, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, -2.0, 0.01, 9.0]]))
    attach(layer, Mask(torch.tensor([[True, True, False, False]])))
    form = lsq_weights(Site("", layer), 2)
    assert isinstance(form, LearnedWeights)
    assert form.step.tolist() == [4.0]


@settings(deadline=None)
@given(st.floats(1e-6, 1e3), st.integers(0, 20), st.booleans())
def test_what_is_trained_settles_bit_for_bit(step: float, seed: int, negative: bool) -> None:
    torch.manual_seed(seed)
    form = LearnedActivations(step, -8 if negative else 0, 7)
    value = torch.randn(100) * step * 8
    assert torch.equal(form.settled()(value), form(value).detach())


def test_a_learned_step_lowers_the_error_and_may_cross_zero() -> None:
    weight, form = torch.randn(1, 400), LearnedWeights(torch.tensor([3.0]), -2, 1, 0)

    def error() -> Tensor:
        return (form(weight) - weight).square().mean()

    first = error().item()
    for _ in range(300):
        form.zero_grad()
        error().backward()
        assert form.step.grad is not None
        form.step.data -= form.step.grad * 2
    assert error().item() < 0.7 * first
    form.step.data.neg_()
    assert torch.isfinite(form(weight)).all()
    assert torch.isfinite(LearnedWeights(torch.zeros(1), -2, 1, 0)(weight)).all()


def test_dead_activations_and_zero_channels_stay_finite() -> None:
    dead = Seen()
    dead(torch.zeros(10))
    for form in (lsq_acts(dead, 4), lsq_acts(Seen(), 4)):
        assert torch.equal(form(torch.zeros(3)), torch.zeros(3))
    assert torch.equal(lsq_weights(Site.of(torch.zeros(2, 3)), 4)(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_two_bits_train_back_and_file_export_and_module_agree(trained: tuple[nn.Module, Task], tmp_path: Path) -> None:
    model, task = trained
    small = entry("lsq")(copy.deepcopy(model), task, epochs=5, lr=0.01, weight_bits=2, act_bits=2)
    untrained = entry("lsq")(copy.deepcopy(model), task, epochs=0, weight_bits=2, act_bits=2)
    assert evaluate(small, task).value >= max(0.9, evaluate(untrained, task).value)
    start, end = (forms_of(m.get_submodule("3"))[0] for m in (untrained, small))
    assert isinstance(start, LearnedWeights)
    assert isinstance(end, LearnedWeights)
    assert (start.step != end.step).all(), "the steps are trained"
    fw.save(small, tmp_path / "m.fw", example_inputs=task.inputs())
    x = task.inputs()[0][0]
    with torch.no_grad():
        before = small.eval()(x)
        assert torch.equal(fw.load(tmp_path / "m.fw").eval()(x), before)
        plain = bake(copy.deepcopy(small))
        assert torch.equal(plain(x), before)
    grids = {path: activation_form(plain.get_submodule(path), "input") for path in ("0", "3", "8")}
    assert [(g.low, g.high) for g in grids.values() if isinstance(g, ActivationGrid)] == [
        (-127, 127),  # the first and the last layer have eight bits
        (0, 3),
        (0, 255),
    ]
    weight = plain.get_submodule("3").weight
    assert isinstance(weight, Tensor)
    assert all(len(channel.unique()) <= 4 for channel in weight)
    report = onnx(small, tmp_path / "m.onnx", example_inputs=task.inputs())
    assert (report.int8_weights, report.kind) == (3, "qdq")


def test_learned_steps_survive_a_checkpoint_and_train_on(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    small = entry("lsq")(copy.deepcopy(model), task, epochs=1)
    again = conform(small_cnn(), *blueprint(small)).eval()
    x = task.inputs()[0][0]
    with torch.no_grad():
        assert torch.equal(again(x), small.eval()(x))
    form = activation_form(again.get_submodule("3"), "input")
    assert isinstance(form, LearnedActivations)
    before = form.step.item()
    fit(again, task, epochs=1, lr=0.01)
    assert form.step.item() != before


def test_one_bit_is_refused() -> None:
    with pytest.raises(BadOption, match="pass at least 2"):
        lsq_weights(Site.of(torch.randn(2, 2)), bits=1)
