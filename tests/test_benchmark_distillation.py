"""The runner of the distillation benchmark: runs of a seed are paired, rows are kept, changed arms run anew."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from featherweight.core.task import Task
from featherweight.zoo.data import Batches

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def runner(monkeypatch, tmp_path):
    """The benchmark on 24 random images, with a linear student, writing to a folder of the test."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("distillation_benchmark", FOLDER / "distillation.py")
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, found)
    spec.loader.exec_module(found)
    x, y = torch.randn(24, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
    task = Task(train=Batches(x, y, batch_size=6, transform=lambda x: x + torch.rand(len(x), 1, 1, 1)),
                valid=Batches(x, y), test=Batches(x, y), calibration=Batches(x, y))  # fmt: skip
    monkeypatch.setattr(found.zoo, "task", lambda *args, **options: task)
    monkeypatch.setattr(found, "network", lambda *args: nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.1), nn.Flatten(), nn.Linear(64, 3)))  # fmt: skip
    monkeypatch.setattr(found, "path_of", lambda name: tmp_path / f"distillation_{name}.json")
    arms = {"alone": found.ALONE, "kd": found.kd(2, 0.5), "more": found.Arm(times=2.0)}
    small = found.Experiment("small", arms, 1, (0, 1), labels=12, batch_size=6, lr=0.01)
    monkeypatch.setitem(found.EXPERIMENTS, "small", small)
    return found


def test_batches_depend_on_the_seed_and_the_pass_alone(runner):
    def drawn(seed, noise):
        stream = runner.labelled(runner.EXPERIMENTS["small"], seed).train
        passes = []
        for _ in range(2):
            torch.rand(noise)  # what a method draws for itself
            passes.append(torch.cat([x for x, _ in stream]))
        return passes

    (first, second), (again, once_more), (other, _) = drawn(0, 1), drawn(0, 7), drawn(1, 1)
    assert torch.equal(first, again)
    assert torch.equal(second, once_more)
    assert not torch.equal(first.sum(), second.sum())  # new shifts in every pass
    assert not torch.equal(first, other)


def test_a_weight_without_the_square_is_that_of_kd_divided_by_it(runner):
    with_square, without = (runner.kd(4, 0.9, squared=squared).options["weight"] for squared in (True, False))
    assert with_square == pytest.approx(16 * without)


def test_rows_are_kept_and_only_what_is_missing_or_changed_is_run(runner, monkeypatch, capsys):
    runner.main(["small", "--seeds", "0", "--arms", "alone", "kd"])
    rows = json.loads(runner.path_of("small").read_text())["rows"]
    assert [(row["arm"], row["seed"]) for row in rows] == [("alone", 0), ("kd", 0)]
    assert all(0 <= row["test"] <= 1 for row in rows)
    assert rows[1]["shares"][0]["terms"] == ["labels", "softened"]

    asked, whole = [], runner.run
    monkeypatch.setattr(runner, "run", lambda e, arm, seed: asked.append((arm, seed)) or whole(e, arm, seed))
    small = runner.EXPERIMENTS["small"]
    changed = dict(small.arms) | {"kd": runner.kd(3, 0.5)}
    monkeypatch.setitem(runner.EXPERIMENTS, "small", replace(small, arms=changed))
    runner.main(["small", "--seeds", "0"])
    assert asked == [("kd", 0), ("more", 0)]
    capsys.readouterr()


def test_the_same_run_comes_out_the_same_and_is_taken_from_another_experiment(runner, monkeypatch, capsys):
    small = runner.EXPERIMENTS["small"]
    one, two = (runner.run(small, "kd", 1) for _ in range(2))
    assert one["features"] == two["features"]
    runner.main(["small", "--seeds", "1", "--arms", "kd"])
    monkeypatch.setitem(runner.EXPERIMENTS, "other", replace(small, title="other", seeds=(1,)))
    monkeypatch.setattr(runner, "run", lambda *args: pytest.fail("it was there"))
    runner.main(["other", "--arms", "kd"])
    capsys.readouterr()


def test_differences_are_paired_by_seed(runner):
    rows = [
        {"arm": arm, "seed": seed, "test": test, "processor_seconds": 1.0}
        for arm, results in {"alone": (0.5, 0.7, 0.6), "kd": (0.52, 0.73)}.items()
        for seed, test in enumerate(results)
    ]
    found = runner.summary(rows, runner.EXPERIMENTS["small"])
    gain = found["kd"]["over"]["alone"]  # 2 and 3 points; t of one degree of freedom is 12.706
    assert (gain["mean"], gain["half"], gain["n"]) == pytest.approx((2.5, 12.706 * 0.5, 2), rel=1e-3)
    assert found["alone"]["result"]["mean"] == pytest.approx(60)


def test_an_unknown_experiment_is_refused(runner, capsys):
    with pytest.raises(SystemExit):
        runner.main(["tesis"])
    assert "thesis" in capsys.readouterr().err
