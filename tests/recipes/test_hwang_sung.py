"""Steps of least squares that only get better, chosen on the error rate, and ternary networks repaired by training."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from featherweight.catalogue import entry
from featherweight.core.forms import Mask, activation_form, attach, bake, codes_of
from featherweight.core.grids import ActivationGrid
from featherweight.core.ledger import recording
from featherweight.core.levels import FixedGrid
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadData, BadOption, CompressionError
from featherweight.recipes.hwang_sung import alternate, least_squares_step, refine, rounded


def error(weights: Tensor, step: float, levels: int) -> float:
    return float((weights - step * rounded(weights, step, levels)).square().sum())


@settings(deadline=None)
@given(st.integers(0, 100), st.sampled_from([3, 5, 15, 255]), st.floats(0.05, 2.0))
def test_every_turn_lowers_the_squared_error(seed: int, levels: int, start: float) -> None:
    torch.manual_seed(seed)
    weights = torch.randn(60).double()
    step, errors = start, []
    for _ in range(8):
        z = rounded(weights, step, levels)
        if not z.any():
            return
        errors.append(float((weights - step * z).square().sum()))
        step = float((weights * z).sum() / z.square().sum())
        errors.append(float((weights - step * z).square().sum()))
    assert all(b <= a + 1e-9 for a, b in pairwise(errors))
    assert alternate(weights, start, levels)[1] <= errors[-1] / float(weights.square().sum()) + 1e-9


def ternary_optimum(weights: Tensor) -> float:
    """The least squared error of {-D, 0, D} over all thresholds and D: the k largest get their mean size."""
    sizes = weights.double().abs().sort(descending=True).values
    sums = sizes.cumsum(0)
    gains = sums.square() / torch.arange(1, len(sizes) + 1)
    return float(sizes.square().sum() - gains.max())


@settings(deadline=None)
@given(st.integers(0, 200), st.sampled_from([20, 300]))
def test_three_levels_come_near_the_exact_ternary_optimum(seed: int, n: int) -> None:
    torch.manual_seed(seed)
    weights = torch.randn(n).double()
    step, relative = least_squares_step(weights, 3)
    best = ternary_optimum(weights)
    assert best - 1e-9 <= error(weights, step, 3) <= 1.03 * best
    assert relative == pytest.approx(error(weights, step, 3) / float(weights.square().sum()))


def test_the_quantizer_by_hand() -> None:
    assert rounded(torch.tensor([-3.0, -0.5, 0.49, 0.5, 9.0]), 1.0, 5).tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0]


def test_the_step_is_the_best_of_those_tried_on_the_validation_data() -> None:
    class Signed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model = Signed()
    form = FixedGrid(torch.tensor(1.0), -1, 1)
    for wanted in (0.6, 1.0, 1.4):
        task = Task(valid=[], evaluate=lambda m, wanted=wanted: -abs(float(form.scale) - wanted))
        form.scale.fill_(1.0)
        assert refine(model, task, form, 9) == pytest.approx(wanted, abs=1e-3)
        assert float(form.scale) == pytest.approx(wanted, abs=1e-3)
    level = Task(valid=[], evaluate=lambda m: 0.5)
    form.scale.fill_(1.0)
    assert refine(model, level, form, 9) == 1.0, "of equals the one of least squares"
    assert refine(model, level, form, 1) == 1.0


def test_ternary_weights_and_three_bit_signals_are_repaired_by_retraining(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    raw = entry("hwang_sung")(copy.deepcopy(model), task, epochs=0, candidates=1)
    with recording() as ledger:
        small = entry("hwang_sung")(copy.deepcopy(model), task, epochs=10, lr=0.02)
    assert evaluate(small, task).value >= max(0.9, evaluate(raw, task).value)
    rows = {row["layer"]: row for row in ledger.tables["steps"]}
    assert {path: row["levels"] for path, row in rows.items()} == {"0": 3, "3": 3, "8": 255}
    for path, bits in (("0", 8), ("3", 3), ("8", 3)):
        grid = activation_form(small.get_submodule(path), "input")
        assert isinstance(grid, ActivationGrid)
        assert grid.high - grid.low + 1 == 2**bits
    wanted = {path: small.get_submodule(path).weight.detach().clone() for path in rows}
    bake(small)
    for path, weight in wanted.items():
        codes = codes_of(small.get_submodule(path))
        assert codes is not None
        assert torch.equal(codes.decode(), weight)
        assert len(weight.unique()) <= rows[path]["levels"]
        if path != "8":
            assert float(weight.abs().max()) == pytest.approx(rows[path]["step"], rel=1e-6)


def test_masked_weights_take_no_part(trained: tuple[nn.Module, Task]) -> None:
    model, task = copy.deepcopy(trained[0]), trained[1]
    layer = model.get_submodule("3")
    keep = torch.rand(layer.weight.shape) > 0.7
    attach(layer, Mask(keep))
    entry("hwang_sung")(model, task, epochs=1, candidates=1)
    weight, kept = layer.weight.detach(), trained[0].get_submodule("3").weight.detach()[keep]
    assert not weight[~keep].any()
    assert float(weight.abs().max()) == pytest.approx(least_squares_step(kept, 3)[0], rel=1e-5)


def test_signals_can_stay_float_and_impossible_options_are_refused(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    small = entry("hwang_sung")(copy.deepcopy(model), task, epochs=0, signal_bits=None, output_levels=None)
    assert activation_form(small.get_submodule("3"), "input") is None
    assert len(small.get_submodule("8").weight.unique()) == 3
    with pytest.raises(BadOption, match="weight_levels=4: must be odd"):
        entry("hwang_sung")(copy.deepcopy(model), task, weight_levels=4)
    broken = copy.deepcopy(model)
    broken.get_submodule("0").weight.data[0] = torch.nan
    with pytest.raises(BadData, match="not finite"):
        entry("hwang_sung")(broken, task)
    for path in ("0", "3", "8"):
        broken.get_submodule(path).weight.data.zero_()
    with pytest.raises(CompressionError, match="nothing to quantize"):
        entry("hwang_sung")(broken, task)
    with pytest.raises(BadData, match="calibration data are empty"):
        entry("hwang_sung")(copy.deepcopy(model), Task(train=task.train, valid=task.valid, calibration=[]))


def test_layer_patterns_say_the_levels_of_the_last_layer_too(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    options = {"epochs": 0, "candidates": 1, "signal_bits": None}
    small = entry("hwang_sung")(copy.deepcopy(model), task, weight_levels={"Conv2d": 7, "8": 5}, **options)
    assert {path: len(small.get_submodule(path).weight.unique()) for path in ("0", "3", "8")} == {
        "0": 7,
        "3": 7,
        "8": 5,
    }


def test_the_recipe_takes_the_factor_that_the_metric_prefers(trained: tuple[nn.Module, Task]) -> None:
    """A metric that wants small weights: of all candidates the smallest step wins in every layer."""
    model = copy.deepcopy(trained[0])

    def small_weights(network: nn.Module) -> float:
        return -sum(float(network.get_submodule(path).weight.detach().abs().max()) for path in ("0", "3", "8"))

    task = Task(train=trained[1].train, valid=trained[1].valid, evaluate=small_weights)
    with recording() as ledger:
        small = entry("hwang_sung")(model, task, epochs=0, candidates=5, signal_bits=None)
    rows = {row["layer"]: row for row in ledger.tables["steps"]}
    assert [row["factor"] for row in rows.values()] == [pytest.approx(0.6)] * 3
    for path in ("0", "3"):
        step = least_squares_step(trained[0].get_submodule(path).weight.detach(), 3)[0]
        assert float(small.get_submodule(path).weight.detach().abs().max()) == pytest.approx(0.6 * step, rel=1e-5)


@settings(deadline=None)
@given(st.integers(0, 100), st.sampled_from([3, 5, 255]), st.sampled_from([0.25, 0.3, 1.0]))
def test_the_form_rounds_as_what_was_fitted(seed: int, levels: int, step: float) -> None:
    torch.manual_seed(seed)
    weight = torch.cat([torch.randn(40), torch.tensor([0.5, -0.5, 1.5, -1.5, 2.5]) * step])
    form = FixedGrid(torch.tensor(step), -(levels // 2), levels // 2, ties="away")
    wanted = rounded(weight.double() / form.scale.double(), 1.0, levels)
    assert torch.equal(form.symbols(weight), wanted)
    if step == 0.25:  # where half a step is exact
        assert form.symbols(weight)[-5:-1].tolist() == [1.0, -1.0, *([1.0, -1.0] if levels == 3 else [2.0, -2.0])]
