"""The paper's claims: the clipping and its gradient, ends that training and the penalty move, files that keep them."""

import copy
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
from featherweight.core.forms import activation_form, bake
from featherweight.core.grids import ActivationGrid, Seen
from featherweight.core.ledger import recording
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption
from featherweight.export import onnx
from featherweight.recipes.pact import ClippedActivations, clipped


@settings(deadline=None)
@given(st.integers(1, 8), st.floats(0.1, 10))
def test_the_formula_and_its_gradients(bits: int, alpha: float) -> None:
    value, g = (torch.randn(300) * alpha).requires_grad_(), torch.randn(300)
    form, top = ClippedActivations(alpha, bits, signed=False), 2**bits - 1
    out = form(value)
    (out * g).sum().backward()
    x = value.detach()
    y = 0.5 * (x.abs() - (x - alpha).abs() + alpha)  # equation 1
    torch.testing.assert_close(out.detach(), (y * top / alpha).round() * alpha / top, atol=1.01 * alpha / top, rtol=0)
    assert ((out.detach() - y).abs() <= 0.5001 * alpha / top).all()
    assert len(out.unique()) <= top + 1
    assert value.grad is not None
    assert form.alpha.grad is not None
    assert torch.equal(value.grad, torch.where((x > 0) & (x < alpha), g, 0.0))
    torch.testing.assert_close(form.alpha.grad, g[x >= alpha].sum(), rtol=1e-3, atol=1e-4)


def test_inputs_below_zero_are_clipped_on_both_sides() -> None:
    form = ClippedActivations(2.0, 3, signed=True)
    value = torch.tensor([-5.0, -1.0, 0.0, 1.0, 9.0], requires_grad=True)
    out = form(value)
    out.sum().backward()
    assert value.grad is not None
    assert form.alpha.grad is not None
    assert out[[0, -1]].tolist() == [-2.0, 2.0]
    assert value.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert form.alpha.grad.item() == 0.0, "1 for the one above, -1 for the one below"
    seen = Seen()
    seen(torch.tensor([-1.0, 2.0]))
    assert clipped(seen, 4).signed


@settings(deadline=None)
@given(st.floats(-1e3, 1e3), st.integers(1, 8), st.booleans())
def test_what_is_trained_settles_bit_for_bit(alpha: float, bits: int, signed: bool) -> None:
    form = ClippedActivations(alpha, bits, signed=signed)
    value = torch.randn(100) * (abs(alpha) + 1)
    assert torch.equal(form.settled()(value), form(value).detach())


def test_alpha_is_trained_and_the_penalty_pulls_it_in(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained

    def alpha(epochs: int, penalty: float) -> float:
        torch.manual_seed(0)
        small = entry("pact")(copy.deepcopy(model), task, epochs=epochs, lr=0.03, penalty=penalty)
        form = activation_form(small.get_submodule("3"), "input")
        assert isinstance(form, ClippedActivations)
        return form.alpha.item()

    start, free, pulled = alpha(0, 0.0), alpha(3, 0.0), alpha(3, 3.0)
    assert free != start
    assert pulled < min(start, free) - 0.05  # Adam moves it by at most 9 steps of 0.03


def test_training_recovers_and_file_export_and_module_agree(trained: tuple[nn.Module, Task], tmp_path: Path) -> None:
    model, task = trained
    with recording() as ledger:
        small = entry("pact")(copy.deepcopy(model), task, epochs=5, lr=0.01, weight_bits=2, act_bits=2)
    assert set(ledger.skipped) == {"0", "8"}
    assert any("->" in note for note in ledger.notes)
    assert evaluate(small, task).value >= evaluate(model, task).value - 0.07
    plain = bake(copy.deepcopy(small)).eval()
    grid, weight = activation_form(plain.get_submodule("3"), "input"), plain.get_submodule("3").weight
    assert isinstance(grid, ActivationGrid)
    assert isinstance(weight, Tensor)
    assert (grid.low, grid.high, len(weight.unique())) == (0, 3, 4)
    x = task.inputs()[0][0]
    with torch.no_grad():
        assert torch.equal(plain(x), small.eval()(x))
        fw.save(small, tmp_path / "m.fw", example_inputs=task.inputs())
        assert torch.equal(fw.load(tmp_path / "m.fw").eval()(x), plain(x))
    report = onnx(small, tmp_path / "m.onnx", example_inputs=task.inputs())
    assert (report.kind, report.int8_weights) == ("qdq", 1)


def test_alpha_survives_a_checkpoint(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    small = entry("pact")(copy.deepcopy(model), task, epochs=1)
    again = conform(small_cnn(), *blueprint(small)).eval()
    x = task.inputs()[0][0]
    with torch.no_grad():
        assert torch.equal(again(x), small.eval()(x))


def test_dead_inputs_stay_finite_and_bad_options_are_refused(trained: tuple[nn.Module, Task]) -> None:
    dead = Seen()
    dead(torch.zeros(5))
    assert torch.equal(clipped(dead, 4)(torch.zeros(3)), torch.zeros(3))
    with pytest.raises(BadOption, match="act_bits=0"):
        entry("pact")(copy.deepcopy(trained[0]), trained[1], act_bits=0, epochs=0)
