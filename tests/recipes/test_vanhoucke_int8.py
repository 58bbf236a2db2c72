"""Integer sums that are exact, 16-bit pairs that saturate or never do, and outputs that are the same alone."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import fused_operators, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, activation_form, attach, bake, codes_of
from featherweight.core.grids import ActivationGrid
from featherweight.core.ledger import recording
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadData, BadOption, CompressionError
from featherweight.export import onnx
from featherweight.recipes.vanhoucke_int8 import integers, lazy_logits, overflowing_pairs, saturated_sums


class Speech(nn.Sequential):
    """A network of sigmoids, as in the paper."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(64, 33), nn.Sigmoid(), nn.Linear(33, 32), nn.Sigmoid(), nn.Linear(32, 4)
        )


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    task = small_task()
    return fit(Speech(), task, epochs=15, lr=0.02).eval(), task


def bytes_and_weights(seed: int, largest: int, inputs: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randint(0, 256, (5, inputs)), torch.randint(-largest, largest + 1, (7, inputs))


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 40))
def test_weights_up_to_64_never_saturate_a_pair(seed: int, inputs: int) -> None:
    x, w = bytes_and_weights(seed, 64, inputs)
    assert torch.equal(saturated_sums(x, w), x @ w.T)
    assert overflowing_pairs(w) == 0


def test_the_bound_of_64_is_tight_and_127_saturates() -> None:
    x = torch.full((1, 2), 255)
    for value, exact in ((64, True), (65, False), (127, False), (-64, True), (-65, False)):
        w = torch.full((1, 2), value)
        assert (int(saturated_sums(x, w)) == 510 * value) == exact
        assert (overflowing_pairs(w) == 0) == exact
    assert int(saturated_sums(x, torch.full((1, 2), 127))) == 2**15 - 1


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 40))
def test_a_layer_without_overflowing_pairs_is_exact_whatever_comes_in(seed: int, inputs: int) -> None:
    x, w = bytes_and_weights(seed, 127, inputs)
    if overflowing_pairs(w) == 0:
        assert torch.equal(saturated_sums(x, w), x @ w.T)
    else:
        worst = torch.where(w > 0, 255, 0)  # the inputs that drive a row to its largest sum
        low = torch.where(w < 0, 255, 0)
        assert not (
            torch.equal(saturated_sums(worst, w), worst @ w.T) and torch.equal(saturated_sums(low, w), low @ w.T)
        )


def test_weights_and_activations_are_the_papers_bytes(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    small = entry("vanhoucke_int8")(copy.deepcopy(model), task)
    for path in ("3", "5"):  # behind a sigmoid
        grid = activation_form(small.get_submodule(path), "input")
        assert isinstance(grid, ActivationGrid)
        steps = grid.steps()
        assert (steps.zero_point, steps.low, steps.high) == (0, 0, 255)
        assert steps.scale == pytest.approx(1 / 255)
        weight = model.get_submodule(path).weight.detach()
        symbols, scale, _ = integers(small.get_submodule(path))
        assert torch.equal(symbols, (127 * weight.double() / weight.abs().max().double()).round().int())
        assert scale == pytest.approx(float(weight.abs().max()) / 127)
    assert int(activation_form(small.get_submodule("1"), "input").zero_point) > 0, "the network's input is negative too"
    assert evaluate(small, task).value >= evaluate(model, task).value - 0.04


def test_lazy_outputs_are_those_of_all_and_sums_are_exact(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    small = entry("vanhoucke_int8")(copy.deepcopy(model), task).eval()
    layer, x = small.get_submodule("5"), torch.rand(6, 32)
    every = lazy_logits(layer, x)
    for rows in (torch.tensor([2]), torch.tensor([3, 0]), torch.arange(4)):
        assert torch.equal(lazy_logits(layer, x, rows), every[:, rows])
    torch.testing.assert_close(every, layer(x), rtol=1e-5, atol=1e-5)
    symbols, scale, grid = integers(layer)
    bytes_ = (x.double() * 255).round().long()
    wanted = (bytes_ @ symbols.long().T).double() * (scale * grid.steps().scale) + layer.bias.detach().double()
    assert torch.equal(every, wanted.float())
    baked = bake(copy.deepcopy(small)).get_submodule("5")
    assert torch.equal(lazy_logits(baked, x), every)


def test_pairs_that_may_saturate_are_noted_and_avoided(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    wide = copy.deepcopy(model)
    wide.get_submodule("3").weight.data.fill_(0.1)
    with recording() as ledger:
        entry("vanhoucke_int8")(copy.deepcopy(wide), task)
    assert any(told.startswith(f"3: {32 * 16} pairs") for told in ledger.notes)
    with recording() as ledger:
        small = entry("vanhoucke_int8")(wide, task, largest=64)
    assert not any("pairs of weights" in told for told in ledger.notes)
    assert int(integers(small.get_submodule("3"))[0].abs().max()) == 64


@pytest.mark.parametrize("largest", [127, 64])
def test_the_onnx_file_holds_bytes_and_grids(trained: tuple[nn.Module, Task], largest: int, tmp_path: Path) -> None:
    model, task = trained
    small = entry("vanhoucke_int8")(copy.deepcopy(model), task, largest=largest)
    report = onnx(small, tmp_path / "m.onnx", example_inputs=task.inputs())
    assert (report.kind, report.int8_weights) == ("qdq", 3)
    operators = fused_operators(tmp_path / "m.onnx", tmp_path)
    assert operators.count("QGemm") == 3
    assert not {"Gemm", "FusedGemm", "MatMul"} & set(operators)


def test_convolutions_and_masks(trained: tuple[nn.Module, Task]) -> None:
    task = trained[1]
    model = fit(small_cnn(), task, epochs=6, lr=0.01).eval()
    layer = model.get_submodule("3")
    keep = torch.rand(layer.weight.shape) > 0.5
    with torch.no_grad():
        layer.weight[~keep] = 9.0
    attach(layer, Mask(keep))
    before = evaluate(model, task).value
    small = entry("vanhoucke_int8")(model, task)
    assert evaluate(small, task).value >= before - 0.04
    wanted = layer.weight.detach().clone()
    assert not wanted[~keep].any()
    assert float(wanted.abs().max()) < 2
    codes = codes_of(bake(small).get_submodule("3"))
    assert codes is not None
    assert torch.equal(codes.decode(), wanted)
    assert len(codes.rule.scale.flatten()) == 1


def test_refusals(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    with pytest.raises(BadOption, match="quantize it with vanhoucke_int8 first"):
        lazy_logits(model.get_submodule("5"), torch.rand(2, 32))
    with pytest.raises(BadOption, match="largest"):
        entry("vanhoucke_int8")(copy.deepcopy(model), task, largest=100)
    with pytest.raises(BadData, match="calibration data are empty"):
        entry("vanhoucke_int8")(copy.deepcopy(model), Task(valid=task.valid, calibration=[]))
    zero = small_mlp()
    for path in ("1", "3"):
        zero.get_submodule(path).weight.data.zero_()
    with pytest.raises(CompressionError, match="nothing to quantize"):
        entry("vanhoucke_int8")(zero, task)
