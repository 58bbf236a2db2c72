"""Dependent quantization: no path is cheaper, errors are fed back as in GPTQ, and files are smaller at equal error."""

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import featherweight as fw
from conftest import small_cnn, small_task
from featherweight.coding import pack_tensor
from featherweight.core.divergence import divergence
from featherweight.core.forms import bake, codes_of
from featherweight.core.ledger import recording
from featherweight.core.task import evaluate
from featherweight.core.trellis import NEXT, Metric, best_path, quantized
from featherweight.errors import BadOption
from featherweight.recipes.rdoq import rdoq
from featherweight.recipes.trellis import Rounding, folded, trellis
from featherweight.zoo import Batches


def laplace(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).laplace(0, 1, (rows, columns))


def path_of(scaled: np.ndarray, metric: Metric, bits: np.ndarray, rate: float, states: int) -> Any:
    group, kept = np.zeros(scaled.shape, dtype=np.int64), np.ones(scaled.shape, dtype=bool)
    held = metric.outputs, metric.columns, metric.factor
    return best_path(np.ascontiguousarray(scaled), kept, *held, group, bits, rate, NEXT[states], states > 1)


def correlated(columns: int, seed: int = 0) -> np.ndarray:
    """A positive matrix of a few directions that count much more than the others."""
    x = np.random.default_rng(seed).normal(size=(columns, 2 * columns)) * np.geomspace(3, 0.1, 2 * columns)
    mixing = np.random.default_rng(seed + 1).normal(size=(columns, columns))
    return mixing @ x @ x.T @ mixing.T / columns**2 + 0.01 * np.eye(columns)


def gptq(weight: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Rounding to integers column by column, as Frantar et al. write it: with the inverse, and eliminating."""
    weight, inverse = weight.copy(), np.linalg.inv(matrix)
    found = np.zeros_like(weight)
    for j in range(weight.shape[1]):
        found[:, j] = np.round(weight[:, j])
        error = (weight[:, j] - found[:, j]) / inverse[j, j]
        weight -= np.outer(error, inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return found


def test_one_state_without_a_rate_is_gptq() -> None:
    """On 60 columns, so that errors go over blocks of the compiled loop; a row more in a path changes nothing."""
    matrix, weight = correlated(60), laplace(5, 60) * 3
    found = quantized(weight, 1.0, 1, 0.0, metric=Metric.of(matrix, np.ones(5)))
    assert np.array_equal(found, gptq(weight, matrix))


@pytest.mark.parametrize("states", [1, 4, 8])
def test_a_path_costs_what_the_metric_says_and_less_than_without_feedback(states: int) -> None:
    """The dearer rows have the smaller errors; the trellis the smaller ones than one grid of twice the step."""
    matrix, weight, outputs = correlated(60), laplace(40, 60) * 3, np.geomspace(1, 30, 40)
    metric, zeros = Metric.of(matrix, outputs), np.zeros((16, 2, 25))

    def cost(points: np.ndarray) -> float:
        return float((outputs * (((weight - points) @ matrix) * (weight - points)).sum(1)).sum())

    fed, *_ = path_of(weight, metric, zeros, 0.0, states)
    alone, *_ = path_of(weight, Metric(outputs, np.diagonal(matrix).copy(), np.zeros((0, 0))), zeros, 0.0, states)
    upper = metric.factor.T
    assert np.allclose(upper * metric.columns @ upper.T, matrix)
    assert cost(fed) < 0.6 * cost(alone)
    if states > 1:
        coarse = 2 * quantized(weight, 2.0, 1, 0.0, metric=metric)
        assert cost(fed) < 0.75 * cost(coarse)


def test_what_is_not_kept_is_zero_and_its_error_is_fed_on() -> None:
    matrix, weight = correlated(30), laplace(6, 30) * 3
    kept = np.random.default_rng(2).random(weight.shape) < 0.7
    found = quantized(weight, 0.5, 8, 0.0, metric=Metric.of(matrix, np.ones(6)), kept=kept)
    assert not found[~kept].any()
    plain = np.where(kept, quantized(weight, 0.5, 8, 0.0), 0)

    def cost(points: np.ndarray) -> float:
        error = weight - 0.5 * points
        return float(((error @ matrix) * error).sum())

    assert cost(found) < 0.7 * cost(plain)


@pytest.mark.parametrize("states", [1, 4, 8])
@pytest.mark.parametrize("rate", [0.0, 0.6])
def test_no_path_of_the_machine_is_cheaper(states: int, rate: float) -> None:
    """Against all paths of six weights, each level up to two."""
    rng = np.random.default_rng(states)
    weights, bits = rng.normal(0, 1.5, 6), np.sort(rng.uniform(0, 4, (16, 2, 25)))
    weights, two = weights.clip(-2.9, 2.9), states > 1
    points, levels, grids = path_of(weights[None], Metric.plain(1, 6), bits, rate, states)
    costs = {}
    for path in itertools.product(range(4), repeat=6):
        state, total = 0, 0.0
        for level, weight in zip(path, weights, strict=True):
            odd = state & 1 if two else 0
            point = 2 * level - (odd if level else 0) if two else level
            total += (abs(weight) - point) ** 2 + rate * bits[0, odd, level]
            state = NEXT[states][state, level & 1]
        costs[path] = total
    told = ((weights - points) ** 2).sum() + rate * bits[0, grids, np.abs(levels)].sum()
    assert told == pytest.approx(min(costs.values()))


def test_without_a_rate_one_state_rounds_to_the_nearest() -> None:
    weight = laplace(20, 30)
    assert np.array_equal(quantized(weight, 0.25, 1, 0.0), np.round(weight / 0.25))


def test_eight_states_cost_fewer_bytes_than_four_and_these_than_one_at_equal_error() -> None:
    """Steps are set so that squared errors are equal; the standard's gain is a quarter to a third of a bit a weight."""
    weight, sizes = laplace(120, 200), {}
    for states in (1, 4, 8):
        low, high = 0.05, 3.0
        for _ in range(10):
            step = (low * high) ** 0.5
            points = quantized(weight, step, states, 0.1 if states == 1 else 0.35, rounds=2)
            low, high = (step, high) if ((weight - points * step) ** 2).mean() < 0.04 else (low, step)
        codes = fw.core.forms.Codes(
            torch.from_numpy(points).int(), fw.core.forms.Affine(torch.tensor(step), torch.tensor(0)), weight.shape
        )
        sizes[states] = len(pack_tensor(codes.decode(), codes, coder="context_mixing"))
    assert sizes[4] < 0.97 * sizes[1]
    assert sizes[8] < 0.995 * sizes[4]


def on_disk(model: nn.Module, path: Path) -> int:
    fw.save(model, path, coder="context_mixing", bare=True)
    return path.stat().st_size


def moved(model: nn.Module, original: nn.Module, task: fw.Task) -> float:
    with torch.no_grad():
        return float(np.mean([divergence(original(x), model(x)) for x, _ in task.valid]))


def test_a_network_is_on_its_grids_weights_and_biases_and_is_read_back_bit_for_bit(
    trained: tuple[nn.Module, fw.Task], tmp_path: Path
) -> None:
    """Batch norms are folded, and what is left of them, the biases, are integers too."""
    model, task = copy.deepcopy(trained[0]), trained[1]
    one = bake(trellis(model, task, calibration_batches=2)).eval()
    for layer in (one[0], one[3], one[8]):
        for name in ("weight", "bias"):
            codes = codes_of(layer, name)
            assert codes is not None
            assert torch.equal(codes.decode(), getattr(layer, name))
    assert isinstance(one[1], nn.Identity)
    on_disk(one, tmp_path / "a.fw")
    back = fw.load(tmp_path / "a.fw", into=small_cnn()).state_dict()
    assert all(torch.equal(back[key], value) for key, value in one.state_dict().items())


def test_the_file_is_smaller_than_without_a_rate_and_than_without_the_trellis_at_equal_error(tmp_path: Path) -> None:
    """Bytes over divergence as straight lines in logarithms: nearest integers, then with a rate, then dependent."""
    x, y = torch.randn(512, 1, 8, 8, generator=torch.Generator().manual_seed(5)), torch.arange(512) % 4
    task = fw.Task(train=Batches(x[:384], y[:384]), valid=Batches(x[384:], y[384:]))
    torch.manual_seed(3)
    original = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 4)).eval()

    def found(method: Any, loss: float, **options: float) -> tuple[float, float]:
        torch.manual_seed(0)
        one = bake(method(copy.deepcopy(original), task, calibration_batches=3, loss=loss, **options)).eval()
        return np.log(moved(one, original, task)), np.log(on_disk(one, tmp_path / "a.fw"))

    nearest = np.array([found(rdoq, loss, rate=0.0) for loss in (1e-4, 1e-3, 1e-2)])
    rated = np.array([found(rdoq, loss, rate=0.6) for loss in (1e-4, 1e-3, 1e-2)])
    error, size = rated[1]
    assert size < np.log(0.99) + np.interp(error, *nearest.T)
    error, size = found(trellis, 1e-3, rate=0.6)
    assert size < np.log(0.985) + np.interp(error, *rated.T)


def test_layers_make_up_for_those_before_them(trained: tuple[nn.Module, fw.Task]) -> None:
    """Outputs are nearer to the original's than those of the same network whose layers were rounded alone."""
    original, task = trained
    together = bake(trellis(copy.deepcopy(original), task, loss=0.01, calibration_batches=2)).eval()
    alone = folded(copy.deepcopy(original), task)
    for path in ("0", "3", "8"):
        one = bake(trellis(copy.deepcopy(original), task, loss=0.01, calibration_batches=2, where=path))
        alone.set_submodule(path, one.get_submodule(path))
    assert moved(together, original, task) < 0.8 * moved(alone.eval(), original, task)


def test_a_larger_loss_makes_larger_steps_and_rows_that_count_more_have_smaller_ones() -> None:
    model, task = small_cnn(), small_task()
    steps = []
    for loss in (0.001, 0.004):
        torch.manual_seed(1)
        steps.append(codes_of(bake(rdoq(copy.deepcopy(model), task, loss=loss, calibration_batches=2))[3]).rule.scale)
    assert float(steps[1].min() / steps[0].min()) > 1.6
    rounding = Rounding(model, 0.001, 1e-4, 1.0, 8, 0.3)
    found = rounding.steps("", laplace(2, 100), np.array([[1.0] * 100, [16.0] * 100]), torch.zeros(()))
    assert float(found[0] / found[1]) == pytest.approx(4)


def test_groups_sequences_and_layers_without_columns(tmp_path: Path) -> None:
    """Depthwise and grouped convolutions have an error matrix for each group; a transposed one has none."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8, padding=1),
        nn.Conv2d(8, 12, 1, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 6, 2),
        nn.Flatten(2),
        nn.Linear(49, 16),
        nn.Flatten(),
        nn.Linear(96, 4),
    )
    task = small_task()
    one = bake(trellis(copy.deepcopy(model), task, loss=1e-4, calibration_batches=2)).eval()
    assert moved(one, model, task) < 1e-3
    assert all(codes_of(layer) is not None for layer in one if hasattr(layer, "weight"))
    with pytest.raises(BadOption, match="choose a larger one"):
        trellis(copy.deepcopy(model), task, loss=1e-18, calibration_batches=1)


def test_a_budget_of_bytes_is_kept_and_used_and_one_out_of_reach_is_told(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 4)).eval()
    task = small_task()
    result = fw.compress(model, task, "trellis", calibration_batches=2, until="size<=3500B", onnx=False, measure=False)
    result.save(tmp_path / "run")
    assert 0.9 * 3500 < (tmp_path / "run" / "model.fw").stat().st_size <= 3500
    one = bake(trellis(copy.deepcopy(model), task, calibration_batches=1, within="size<=0.05x"))
    assert 0.9 < on_disk(one, tmp_path / "b.fw") / (0.05 * 4 * (64 * 96 + 96 * 5 + 4)) <= 1
    with recording() as remarks:
        trellis(copy.deepcopy(model), task, calibration_batches=1, within="size<=20B")
    assert any("out of reach" in text for text in remarks.notes)
    with pytest.raises(BadOption, match="choose one of"):
        trellis(copy.deepcopy(model), task, within="macs<=3")


def test_a_budget_of_points_is_kept(trained: tuple[nn.Module, fw.Task]) -> None:
    original, task = trained
    one = bake(trellis(copy.deepcopy(original), task, calibration_batches=2, within="drop<=10pt")).eval()
    lost = 100 * (evaluate(original, task).value - evaluate(one, task).value)
    assert lost <= 10
    least = bake(trellis(copy.deepcopy(original), task, calibration_batches=2, loss=0.003))
    assert codes_of(one[8]).rule.scale.min() > codes_of(least[8]).rule.scale.min()


def test_of_a_size_and_a_drop_the_size_is_aimed_at_and_the_drop_is_kept_by_the_run() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 4)).eval()
    budget = "size<=0.9x, size<=3kB, drop<=90pt"
    result = fw.compress(model, small_task(), "trellis", calibration_batches=1, until=budget, onnx=False, measure=False)
    assert result.reached


def test_layers_may_be_called_with_their_input_by_name(trained: tuple[nn.Module, fw.Task]) -> None:
    class Named(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[1](input=self[0](input=x.flatten(1)).relu())

    torch.manual_seed(0)
    model, found = Named(nn.Linear(64, 16), nn.Linear(16, 4)), []
    for kind in (Named, nn.Sequential):
        layers = list(copy.deepcopy(model)) if kind is Named else [nn.Flatten(), model[0], nn.ReLU(), model[1]]
        torch.manual_seed(0)  # classes are drawn
        one = bake(trellis(kind(*copy.deepcopy(layers)), trained[1], calibration_batches=1))
        found.append([layer.weight for layer in one if hasattr(layer, "weight")])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
