"""Bits by layer: the program's choice is the best there is, the real file keeps the budget, and it beats equal bits."""

import copy
import tempfile
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

import featherweight as fw
from conftest import small_cnn, small_task
from featherweight.coding import save
from featherweight.core import measuring
from featherweight.core.divergence import answers, divergence
from featherweight.core.fit import fit
from featherweight.core.fold import fold_batchnorm
from featherweight.core.forms import bake, codes_of
from featherweight.core.ledger import Ledger, recording
from featherweight.core.task import Task
from featherweight.core.walk import joined
from featherweight.errors import BadOption, CompressionError
from featherweight.quantize import quantize
from featherweight.recipes.mixed_precision import PROVENANCE, mixed_precision

LAYERS = ("0", "3", "6", "9", "14")


def network() -> nn.Sequential:
    return nn.Sequential(
        *[nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()],
        *[nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()],
        *[nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()],
        *[nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)],
    )


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    task = small_task()
    return fit(network(), task, epochs=6, lr=0.01).eval(), task


def run(trained: tuple[nn.Module, Task], **options) -> tuple[nn.Module, Ledger]:
    model, task = trained
    with recording() as ledger:
        return mixed_precision(copy.deepcopy(model), task, **options), ledger


def given(ledger: Ledger) -> dict[str, int]:
    return {row["layer"]: row["bits"] for row in ledger.tables["bits"]}


def test_the_real_file_keeps_the_budget_and_the_bits_are_those_of_the_codes(trained, tmp_path) -> None:
    model, task = trained
    raw = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    result = fw.compress(model, task, "mixed_precision", budget="size<=0.14x", out=tmp_path, measure=False)
    assert (tmp_path / "model.fw").stat().st_size <= 0.14 * raw
    (stage,) = result.report["stages"]
    for row in stage["tables"]["bits"]:
        codes = codes_of(result.model.get_submodule(row["layer"]))
        assert int(codes.symbols.abs().max()) <= 2 ** (row["bits"] - 1) - 1
    assert len({row["bits"] for row in stage["tables"]["bits"]}) > 1


def test_the_choice_is_the_best_of_all(trained) -> None:
    _, ledger = run(trained, budget="size<=0.14x", bits=(2, 4, 8))
    table = ledger.tables["bits"]
    assert [row["layer"] for row in table] == list(LAYERS)
    chosen = [next(o for o in row["options"] if o["bits"] == row["bits"]) for row in table]
    taken, lost = (sum(o[key] for o in chosen) for key in ("takes", "divergence"))
    for options in product(*(row["options"] for row in table)):
        if sum(o["takes"] for o in options) <= taken:
            assert sum(o["divergence"] for o in options) >= lost - 1e-9


def test_it_beats_equal_bits_of_the_same_size(trained) -> None:
    model, task = trained
    mixed, ledger = run(trained, budget="size<=0.13x")
    batch = joined(task, 16)
    wanted = answers(model, task, batch)
    mean = sum(row["bits"] * mixed.get_submodule(row["layer"]).weight.numel() for row in ledger.tables["bits"])
    mean /= sum(mixed.get_submodule(path).weight.numel() for path in LAYERS)
    equal = quantize(
        fold_batchnorm(copy.deepcopy(model), task.inputs()),
        task,
        weights="symmetric_mse",
        weight_bits=int(mean),
        acts="minmax",
        place="fused",
    )
    assert mean < 4
    assert divergence(wanted, answers(mixed, task, batch)) < divergence(wanted, answers(equal, task, batch))


def test_biases_that_are_new_are_within_the_budget() -> None:
    torch.manual_seed(0)
    layers = nn.Linear(64, 256, bias=False), nn.ReLU(), nn.Linear(256, 4, bias=False)
    model, task = nn.Sequential(nn.Flatten(), *layers).eval(), small_task()

    def size(small: nn.Module) -> int:
        with tempfile.TemporaryDirectory() as folder:
            return save(bake(small), Path(folder) / "model.fw", example_inputs=task.inputs()).bytes

    eight = size(run((model, task), budget="size<=0.9x", bits=[8])[0])
    allowed = eight - 500  # the 260 biases alone take twice as much
    small, _ = run((model, task), budget=f"size<={allowed + PROVENANCE}B", bits=[4, 8])
    assert small[1].bias is not None
    assert size(small) <= allowed


def test_learned_rounding_that_breaks_the_budget_is_not_taken(trained, monkeypatch) -> None:
    monkeypatch.setattr("featherweight.recipes.mixed_precision.adaround", lambda model, task, **options: model)
    small, ledger = run(trained, budget="size<=0.2x", bits=[3], rounding="learned")
    assert any("rounded to nearest: learned rounding has more entropy" in one for one in ledger.notes)
    assert {p for p, m in bake(small).named_modules() if codes_of(m)} == set(LAYERS)


def test_learned_rounding_and_few_layers(trained) -> None:
    small, ledger = run(
        trained, budget="size<=0.5x", bits=[3], rounding="learned", iterations=20, where=["3", "6", "9"]
    )
    assert given(ledger) == {"3": 3, "6": 3, "9": 3}
    assert {p for p, m in bake(small).named_modules() if codes_of(m)} == {"3", "6", "9"}
    assert "rounding" in ledger.tables


def test_a_latency_chooses_between_eight_bits_and_float(trained) -> None:
    def stopwatch(original: nn.Module, result: nn.Module, inputs: object) -> measuring.Timed:
        eight = sum(codes_of(m) is not None for m in result.modules())
        return measuring.Timed(2.0, 2.0 - 0.3 * eight, 1 - 0.15 * eight)

    with measuring.timing(stopwatch):
        small, ledger = run(trained, budget="latency<=0.6x")
    bits = given(ledger)
    assert set(bits.values()) == {8, 32}
    assert sum(b == 8 for b in bits.values()) >= 3
    assert {p for p, m in bake(small).named_modules() if codes_of(m)} == {p for p, b in bits.items() if b == 8}
    assert all("stays float" in ledger.skipped[path] for path, b in bits.items() if b == 32)


def test_what_cannot_be_is_refused(trained) -> None:
    with pytest.raises(CompressionError, match="size<=100B is not reached: the network has"):
        run(trained, budget="size<=100B", bits=[2])
    for budget in ("macs<=0.5x", "size<=0.5x, latency<=0.5x"):
        with pytest.raises(BadOption, match="under one limit, of size or latency"):
            run(trained, budget=budget)
    with pytest.raises(BadOption, match="bits"):
        run(trained, bits=[1])


def test_divergence_of_numbers_and_of_scores() -> None:
    model, task = small_cnn().eval(), small_task()
    batch = joined(task, 1)
    assert divergence(answers(model, task, batch), answers(model, task, batch)) == 0.0
    scores = torch.randn(5, 3, 4, 4)
    assert divergence(scores, scores + 2) == pytest.approx(0, abs=1e-9)
    wanted = torch.nn.functional.kl_div(scores.flip(0).log_softmax(1), scores.softmax(1), reduction="sum") / (5 * 16)
    assert divergence(scores, scores.flip(0)) == pytest.approx(float(wanted), rel=1e-4)
