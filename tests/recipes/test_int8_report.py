"""What post-training int8 tells of its layers, gives back, corrects and chooses."""

import copy
from math import inf

import pytest
import torch
from torch import Tensor, nn

from conftest import Batches, blobs
from featherweight.core.biases import correct_biases
from featherweight.core.decibels import decibels
from featherweight.core.fold import fold_batchnorm
from featherweight.core.forms import bake, codes_of
from featherweight.core.ledger import Ledger, recording
from featherweight.core.task import Task, evaluate
from featherweight.core.walk import by_channel, inputs_and_outputs, joined, plain, walk
from featherweight.errors import BadData, BadOption
from featherweight.quantize import quantize
from featherweight.recipes.int8 import int8


def run(trained: tuple[nn.Module, Task], **options) -> tuple[nn.Module, Ledger]:
    model, task = trained
    with recording() as ledger:
        return int8(copy.deepcopy(model), task, **options), ledger


def test_the_ratios_are_those_of_each_layer_alone(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    small, ledger = run(trained, correct_bias=False)
    rows = ledger.tables["signal_to_noise"]
    assert [row["both"] for row in rows] == sorted(row["both"] for row in rows)
    assert {row["layer"] for row in rows} == {"0", "3", "8"}
    original = fold_batchnorm(copy.deepcopy(model), task.inputs())
    (row,) = [row for row in rows if row["layer"] == "3"]
    with torch.no_grad():
        x = original[:3](next(iter(task.calibrating()))[0])
        y = original[3](x)
        rounded = small[0].fw_output(x)
        assert row["weights"] == pytest.approx(decibels(y, plain(small[3], x)), abs=1e-6)
        assert row["inputs"] == pytest.approx(decibels(y, original[3](rounded)), abs=1e-6)
        assert row["both"] == pytest.approx(decibels(y, plain(small[3], rounded)), abs=1e-6)
    assert 30 < row["both"] <= min(row["weights"], row["inputs"]) + 1
    assert any(text.startswith("worst signal-to-noise ratios of layers, in dB: ") for text in ledger.notes)


def test_the_worst_layers_are_given_back(trained: tuple[nn.Module, Task]) -> None:
    _, ledger = run(trained)
    worst = [row["layer"] for row in ledger.tables["signal_to_noise"]]
    small, told = run(trained, float_layers=2)
    assert {p for p, m in bake(small).named_modules() if codes_of(m) is not None} == {worst[2]}
    for path in worst[:2]:
        assert "given back to float" in told.skipped[path]
    with pytest.raises(BadOption, match="only 3 layers are quantized"):
        run(trained, float_layers=3)


def test_bias_correction_makes_the_means_of_all_layers_those_of_the_float_network() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 4),
    )
    task = Task(valid=[], calibration=[(torch.rand(64, 1, 8, 8),)], example_inputs=torch.rand(2, 1, 8, 8))
    small = quantize(copy.deepcopy(model), task, weight_bits=3)
    batch, paths = joined(task, 1), ["0", "2", "5"]

    def shift(one: nn.Module) -> dict[str, float]:
        means: dict[str, Tensor] = {}
        inputs_and_outputs(
            model, task, batch, paths, lambda p, x, y: means.update({p: by_channel(model[int(p)], y).mean(1)})
        )
        found: dict[str, float] = {}
        inputs_and_outputs(
            one,
            task,
            batch,
            paths,
            lambda p, x, y: found.update({p: float((by_channel(one[int(p)], y).mean(1) - means[p]).abs().max())}),
        )
        return found

    assert min(shift(small).values()) > 1e-3
    moved = correct_biases(small, model, task, batch, paths)
    assert max(shift(small).values()) < 1e-5
    assert set(moved) == {"0", "2", "5"}
    assert small[0].bias is not None


def test_auto_takes_the_calibrator_whose_outputs_are_nearest(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    x, y = blobs((1, 8, 8))
    x[5, 0, 3, 3] = 4000.0  # one broken pixel
    spoilt = Task(valid=task.valid, calibration=list(Batches(x, y)))
    with recording() as ledger:
        small = int8(copy.deepcopy(model), spoilt, calibrator="auto")
    (text,) = [text for text in ledger.notes if text.startswith("calibrator ")]
    assert all(name in text for name in ("minmax", "percentile", "mse", "entropy"))
    plainly = int8(copy.deepcopy(model), spoilt, calibrator="minmax")
    assert evaluate(small, task).value >= evaluate(plainly, task).value


def test_equalized_int8_keeps_the_metric(trained: tuple[nn.Module, Task]) -> None:
    model, task = trained
    small, ledger = run(trained, equalize=True)
    assert "2 pairs of layers were scaled to equal ranges" in ledger.notes
    assert abs(evaluate(small, task).value - evaluate(model, task).value) <= 1 / 32


def test_a_walk_sees_what_earlier_changes_made_and_says_what_it_did_not_reach() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.unused = nn.Linear(2, 2)
    del model._modules["unused"]
    model[0].unused = nn.Linear(1, 1)
    task = Task(valid=[], calibration=[(torch.ones(3, 2),), (torch.ones(2, 2),), (torch.ones(2, 2, 2),)])
    with recording() as ledger:
        batch = joined(task, 3)
        seen: list[Tensor] = []

        def change(path: str, layer: nn.Module, value: Tensor) -> None:
            seen.append(value)
            nn.init.constant_(layer.weight, 1.0)
            nn.init.zeros_(layer.bias)

        unreached = walk(model, task, batch, ["0", "1", "0.unused"], change)
    assert torch.equal(seen[1], torch.full((5, 2), 2.0))
    assert unreached == ["0.unused"]
    assert any("1 calibration batches are of another shape" in text for text in ledger.notes)
    with pytest.raises(BadData, match="empty"):
        joined(Task(valid=[], calibration=[]), 3)


def test_decibels() -> None:
    assert decibels(torch.ones(3), torch.ones(3)) == inf
    assert decibels(torch.ones(4), torch.full((4,), 1.01)) == pytest.approx(40, abs=1e-3)
