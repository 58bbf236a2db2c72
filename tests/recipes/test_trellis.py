"""Dependent quantization: points are those of the machine, no path is cheaper, and files are smaller at equal error."""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import featherweight as fw
from conftest import small_cnn, small_task
from featherweight.coding import pack_tensor
from featherweight.core.forms import bake, codes_of
from featherweight.core.trellis import NEXT, best_path, quantized
from featherweight.recipes.rdoq import rdoq
from featherweight.recipes.trellis import trellis


def laplace(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).laplace(0, 1, (rows, columns))


@pytest.mark.parametrize("states", [1, 4, 8])
@pytest.mark.parametrize("rate", [0.0, 0.6])
def test_no_path_of_the_machine_is_cheaper(states: int, rate: float) -> None:
    """Against all paths of six weights, each level up to two."""
    rng = np.random.default_rng(states)
    weights, bits = rng.normal(0, 1.5, 6), np.sort(rng.uniform(0, 4, (16, 2, 25)))
    group, two = np.zeros(6, dtype=np.int64), states > 1
    points, levels, grids = best_path(weights.clip(-2.9, 2.9), group, bits, rate, NEXT[states], two)
    costs = {}
    for path in itertools.product(range(4), repeat=6):
        state, total = 0, 0.0
        for level, weight in zip(path, weights.clip(-2.9, 2.9), strict=True):
            odd = state & 1 if two else 0
            point = 2 * level - (odd if level else 0) if two else level
            total += (abs(weight) - point) ** 2 + rate * bits[0, odd, level]
            state = NEXT[states][state, level & 1]
        costs[path] = total
    told = sum((weights.clip(-2.9, 2.9) - points) ** 2) + rate * sum(bits[0, grids, np.abs(levels)])
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


def test_a_network_is_on_its_grid_and_by_rate_smaller_than_by_rounding_to_the_nearest(tmp_path: Path) -> None:
    model, task = small_cnn(), small_task()
    sizes: dict[str, int] = {}
    for name, method, options in (
        ("nearest", rdoq, {"rate": 0.0}),
        ("rdoq", rdoq, {"rate": 1.0}),
        ("trellis", trellis, {}),
    ):
        one = bake(method(copy.deepcopy(model), task, loss=0.003, calibration_batches=2, **options))
        codes = codes_of(one[0])
        assert codes is not None
        assert torch.equal(codes.decode(), one[0].weight)
        fw.save(one, tmp_path / "a.fw", coder="context_mixing", bare=True)
        back = fw.load(tmp_path / "a.fw", into=small_cnn()).state_dict()
        assert all(torch.equal(back[key], value) for key, value in one.state_dict().items())
        sizes[name] = (tmp_path / "a.fw").stat().st_size
    assert sizes["rdoq"] < sizes["nearest"]


def test_the_loss_that_may_be_added_sets_the_steps() -> None:
    model, task = small_cnn(), small_task()
    steps = []
    for loss in (0.001, 0.004):
        torch.manual_seed(1)
        steps.append(codes_of(bake(rdoq(copy.deepcopy(model), task, loss=loss, calibration_batches=2))[0]).rule.scale)
    assert float(steps[1] / steps[0]) == pytest.approx(2, rel=1e-4)
