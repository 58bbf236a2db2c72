"""Chains, budgets, guards, roll-back, resuming and refusals, with methods small enough to see through."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import contract
import featherweight as fw
from conftest import Batches, small_cnn, small_mlp, small_task
from featherweight import pipeline
from featherweight.core.forms import Mask, attach
from featherweight.core.task import Metric, Task
from featherweight.errors import BadData, BadOption, BudgetError, CompressionError, MissingNeed, UnknownName


def zero(model: nn.Module, task: Task, *, share: float = 0.5) -> nn.Module:
    """Masks a random share of the first linear layer's weights."""
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    attach(layer, Mask(torch.rand_like(layer.weight) > share))
    return model


def ruin(model: nn.Module, task: Task) -> nn.Module:
    """Destroys what the network knows."""
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def nothing(model: nn.Module, task: Task) -> nn.Module:
    return model


@pytest.fixture(scope="module")
def learned():
    torch.manual_seed(0)
    model, task = small_mlp(), small_task()
    return fw.fit(model, task, epochs=5, lr=0.01), task


def quick(model, task, chain, **options):
    return fw.compress(model, task, chain, measure=False, onnx=False, **options)


def test_stops_as_soon_as_the_budget_holds(learned):
    result = quick(*learned, [(zero, {"share": 0.9}), ruin], until="size<=0.9x")
    assert [s["method"] for s in result.report["stages"]] == ["zero"]
    assert result.reached


def test_rolls_back_what_breaks_the_guard(learned):
    model, task = learned
    result = quick(model, task, [zero, ruin], guard="drop<=20pt")
    first, second = result.report["stages"]
    assert not first["rolled_back"]
    assert second["rolled_back"]
    assert "drop is" in second["why"]
    assert result.report["result"]["metric"] == first["metric"]
    assert (result.model[1].weight == 0).any()


def test_a_stage_behind_a_rolled_back_one_starts_from_the_last_good_model(learned):
    result = quick(*learned, [ruin, zero], guard="drop<=20pt")
    assert [s["rolled_back"] for s in result.report["stages"]] == [True, False]
    assert result.report["result"]["metric"] > 0.9


def test_everything_rolled_back_gives_the_original_and_says_so(learned):
    model, task = learned
    result = quick(model, task, ruin, guard="drop<=1pt", until="size<=0.5x")
    assert not result.reached
    assert result.report["budget"]["binds"] == ["every method was rolled back"]
    assert contract.same(contract.state(result.model), contract.state(model))


def test_an_unreachable_budget_ends_with_the_nearest_and_what_binds(learned):
    result = quick(*learned, [(zero, {"share": 0.9}), ruin], until="size<=0.001x")
    assert not result.reached
    assert "size<=0.001x was asked" in result.report["budget"]["binds"][0]
    sizes = [s["size"] for s in result.report["stages"]]
    assert sizes[0] < sizes[1]
    assert (result.model[1].weight == 0).float().mean() > 0.8, "the nearest is the first stage, not the last"


def test_strict_wants_the_upper_end_of_the_interval(learned):
    model, task = learned
    heavy = (zero, {"share": 0.97})
    lenient = quick(model, task, heavy, guard="drop<=100pt").report["stages"][0]
    low, high = lenient["paired_interval"]
    assert 0 < lenient["drop"] < high
    assert low < lenient["drop"]
    between = f"drop<={(lenient['drop'] + high) / 2}pt"
    assert not quick(model, task, heavy, guard=between).report["stages"][0]["rolled_back"]
    assert quick(model, task, heavy, guard=between, strict=True).report["stages"][0]["rolled_back"]


def test_strict_is_refused_where_there_is_no_interval(learned):
    model, task = learned
    whole = Metric("share", aggregate=lambda outputs, targets: 0.5)
    with pytest.raises(BadOption, match="strict needs an interval"):
        quick(model, Task(valid=task.valid, metric=whole), zero, guard="drop<=1pt", strict=True)


def test_the_budget_is_judged_on_the_file_that_is_written(learned, tmp_path):
    result = quick(*learned, zero, out=tmp_path)
    size = (tmp_path / "model.fw").stat().st_size
    assert result.report["stages"][0]["size"] == size == result.report["result"]["bytes"]
    assert quick(*learned, zero, until=f"size<={size}B").reached
    assert not quick(*learned, zero, until=f"size<={size - 1}B").reached


def test_the_same_seed_gives_the_same_model_and_another_seed_another(learned):
    models = [quick(*learned, zero, seed=seed).model[1].weight for seed in (0, 0, 1)]
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


def test_the_callers_model_is_never_changed(learned):
    model, task = learned
    before = contract.state(model)
    quick(model, task, [zero, ruin])
    assert contract.same(before, contract.state(model))
    assert all(p.requires_grad for p in model.parameters())


def test_the_original_is_the_teacher_and_a_student_may_stand_in(learned):
    model, task = learned
    seen = []

    def look(student, task):
        seen.append((task.teacher, student))
        return zero(student, task)

    student = small_mlp()
    result = quick(model, task, look, student=student)
    teacher, trained = seen[0]
    assert contract.same(contract.state(teacher), contract.state(model))
    assert not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(trained[3].weight, student[3].weight)
    assert result.report["original"]["metric"] > result.report["result"]["metric"]


def test_result_is_told_on_test_and_chosen_on_valid():
    model, task = contract.trained()
    x, y = task.valid.x, task.valid.y
    flipped = Task(train=task.train, valid=task.valid, test=Batches(x, (y + 1) % 4))
    result = quick(model, flipped, zero)
    assert result.report["split"] == "test"
    assert result.report["stages"][0]["metric"] > 0.5 > result.report["result"]["metric"]


def test_save_writes_what_out_writes(learned, tmp_path):
    model, task = learned
    result = fw.compress(model, task, zero, out=tmp_path / "a")
    result.save(tmp_path / "b")
    for name in ("model.fw", "model.onnx", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_resume_goes_on_after_the_last_finished_method(learned, tmp_path, monkeypatch):
    model, task = learned
    whole = quick(model, task, [zero, ("magnitude_iterative", {"sparsity": 0.5, "epochs": 1})], out=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        quick(model, task, [zero, _killed_in_the_place_of("magnitude_iterative", monkeypatch)], out=tmp_path / "cut")
    monkeypatch.undo()
    ran = []
    monkeypatch.setattr(pipeline.progress, "say", ran.append)
    chain = [zero, ("magnitude_iterative", {"sparsity": 0.5, "epochs": 1})]
    resumed = quick(model, task, chain, out=tmp_path / "cut", resume=True)
    assert "resuming after 1 of 2 methods" in ran
    assert contract.same(contract.state(whole.model), contract.state(resumed.model))
    assert (tmp_path / "whole" / "model.fw").read_bytes() == (tmp_path / "cut" / "model.fw").read_bytes()


def _killed_in_the_place_of(name, monkeypatch):
    def killed(entry, *args, **options):
        raise RuntimeError("killed")

    original = pipeline.Entry.__call__
    monkeypatch.setattr(
        pipeline.Entry, "__call__", lambda e, *a, **o: killed(e) if e.id == name else original(e, *a, **o)
    )
    return (name, {"sparsity": 0.5, "epochs": 1})


def test_a_checkpoint_of_another_run_is_not_used(learned, tmp_path, monkeypatch):
    model, task = learned
    quick(model, task, [zero], out=tmp_path)
    ran = []
    monkeypatch.setattr(pipeline.progress, "say", ran.append)
    quick(model, task, [(zero, {"share": 0.4})], out=tmp_path, resume=True)
    quick(model, task, [(zero, {"share": 0.4})], out=tmp_path, resume=True, seed=3)
    assert not any(line.startswith("resuming") for line in ran)


def test_a_damaged_checkpoint_is_not_used(learned, tmp_path):
    model, task = learned
    first = quick(model, task, [zero], out=tmp_path)
    (tmp_path / "stages" / "00.safetensors").write_bytes(b"damaged")
    second = quick(model, task, [zero], out=tmp_path, resume=True)
    assert contract.same(contract.state(first.model), contract.state(second.model))


def test_resuming_an_unreached_budget_gives_the_nearest_again(learned, tmp_path):
    chain = [(zero, {"share": 0.9}), ruin]
    whole = quick(*learned, chain, until="size<=0.001x", out=tmp_path)
    again = quick(*learned, chain, until="size<=0.001x", out=tmp_path, resume=True)
    assert (again.model[1].weight == 0).float().mean() > 0.8
    assert contract.same(contract.state(whole.model), contract.state(again.model))


def test_resuming_a_reached_budget_runs_nothing_more(learned, tmp_path):
    chain = [(zero, {"share": 0.9}), ruin]
    quick(*learned, chain, until="size<=0.9x", out=tmp_path)
    again = quick(*learned, chain, until="size<=0.9x", out=tmp_path, resume=True)
    assert [stage["method"] for stage in again.report["stages"]] == ["zero"]


def test_other_data_or_another_function_is_another_run(learned, tmp_path, monkeypatch):
    model, task = learned
    quick(model, task, lambda m, t: zero(m, t, share=0.2), out=tmp_path)
    ran = []
    monkeypatch.setattr(pipeline.progress, "say", ran.append)
    quick(model, task, lambda m, t: zero(m, t, share=0.3), out=tmp_path, resume=True)
    other = Task(valid=task.valid, train=Batches(task.train.x + 1, task.train.y))
    quick(model, other, lambda m, t: zero(m, t, share=0.3), out=tmp_path, resume=True)
    assert not any(line.startswith("resuming") for line in ran)
    quick(model, other, lambda m, t: zero(m, t, share=0.3), out=tmp_path, resume=True)
    assert any(line.startswith("resuming") for line in ran)


def test_a_folder_never_holds_files_of_two_runs(learned, tmp_path):
    fw.compress(*learned, zero, out=tmp_path)
    (tmp_path / "stages" / "mine.txt").write_text("not ours")
    before = {name: (tmp_path / name).read_bytes() for name in ("model.fw", "model.onnx", "report.json")}
    with pytest.raises(CompressionError):
        fw.compress(*learned, [(zero, {"share": 0.7}), nothing], out=tmp_path)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    quick(*learned, (zero, {"share": 0.7}), out=tmp_path)
    assert not (tmp_path / "model.onnx").exists()
    assert (tmp_path / "stages" / "mine.txt").exists()


def test_a_procedure_of_the_users_own_measures(learned):
    model, task = learned
    own = Task(valid=task.valid, train=task.train, evaluate=lambda m: float((m[1].weight == 0).float().mean()))
    result = fw.compress(model, own, zero)
    assert 0.4 < result.report["result"]["metric"] < 0.6
    assert result.report["onnx"]["metric_valid"] is None


def test_options_are_told_as_they_were_given(learned):
    result = quick(*learned, ("magnitude_iterative", {"sparsity": {"1": 0.5}, "epochs": 0, "finetune": 0}))
    assert result.report["chain"] == [["magnitude_iterative", {"sparsity": {"1": 0.5}, "epochs": 0, "finetune": 0}]]


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import torch
import featherweight as fw
from conftest import small_cnn, small_task
torch.manual_seed(0)
chain = [("magnitude_iterative", dict(sparsity=0.5, rounds=2, epochs=4)),
         ("kmeans_share", dict(weight_bits=4, epochs=2)), ("kd", dict(epochs=2))]
fw.compress(small_cnn(), small_task(), chain, out=sys.argv[1], resume=True, measure=False, until="size<=0.001x")
print("done")
"""


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_gives_the_same_files(tmp_path):
    code = KILLED.format(tests=str(Path(__file__).parent))

    def start(folder: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / folder)], stdout=subprocess.PIPE, text=True, env=os.environ
        )

    started = time.monotonic()
    assert "done" in start("whole").communicate()[0]
    took = time.monotonic() - started
    generator = torch.Generator().manual_seed(7)
    kills = 0
    while kills < 10:
        process = start("cut")
        try:
            process.communicate(timeout=took * float(torch.rand(1, generator=generator)))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
        else:  # it was done before its moment came, which is no kill: the next one starts from nothing
            assert (tmp_path / "whole" / "model.fw").read_bytes() == (tmp_path / "cut" / "model.fw").read_bytes()
            shutil.rmtree(tmp_path / "cut")
    assert "done" in start("cut").communicate()[0]
    for name in ("model.fw", "model.onnx"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name


# --- refusals: one sentence, before anything is written ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("magnitud_iterative", {}, UnknownName, "did you mean 'magnitude_iterative'"),
        ("magnitude_iterative", {"sparsty": 0.5}, UnknownName, "did you mean 'sparsity'"),
        ("magnitude_iterative", {"sparsity": 1.2}, BadOption, "sparsity=1.2: must be a fraction"),
        ("magnitude_iterative", {"where": "layer9"}, UnknownName, "unknown layer pattern 'layer9'"),
        ("kmeans_share", {"weight_bits": 40}, BadOption, "weight_bits=40"),
        ([], {}, BadOption, "the chain is empty"),
        (["kd"], {"epochs": 1}, BadOption, "put them into its"),
        (nothing, {}, CompressionError, "nothing changed nothing"),
    ],
)
def test_bad_calls(learned, tmp_path, method, options, error, message):
    with pytest.raises(error, match=message) as caught:
        fw.compress(*learned, method, out=tmp_path / "run", **options)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").glob("*.*"))


def test_a_budget_that_cannot_be_read(learned):
    with pytest.raises(BudgetError, match="expected QUANTITY<=NUMBER UNIT"):
        quick(*learned, zero, until="tiny")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(learned, bad):
    model, task = small_mlp(), learned[1]
    with torch.no_grad():
        model[1].weight[0, 0] = bad
    with pytest.raises(BadData, match=r"1\.weight holds NaN or infinite"):
        quick(model, task, zero)


def test_data_of_the_wrong_shape(learned):
    data = Batches(torch.randn(8, 1, 9, 9), torch.zeros(8).long())
    with pytest.raises(BadData, match=r"does not run on a validation batch of shapes \[\(8, 1, 9, 9\)"):
        quick(learned[0], Task(valid=data), zero)


@pytest.mark.parametrize(
    ("field", "batch", "message"),
    [
        ("train", (torch.randn(8, 1, 9, 9), torch.zeros(8).long()), "does not run on a training batch"),
        ("test", (torch.randn(8, 1, 9, 9), torch.zeros(8).long()), "does not run on a test batch"),
        ("train", (torch.randn(8, 1, 8, 8), torch.full((8,), 99)), "loss does not take a training batch"),
        ("train", (torch.randn(8, 1, 8, 8), torch.zeros(5).long()), "loss does not take a training batch"),
        ("test", (torch.randn(8, 1, 8, 8), torch.zeros(5).long()), "metric 'accuracy' does not take a test batch"),
    ],
)
def test_data_of_every_split_are_looked_at_before_any_work(learned, tmp_path, field, batch, message):
    with pytest.raises(BadData, match=message):
        quick(learned[0], Task(valid=learned[1].valid, **{field: [batch]}), zero, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Named(nn.Module):
    """Calls its layers by their names, as most users' networks do."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("method", ["int8", "dorefa", "kmeans_share"])
def test_networks_that_call_layers_by_name(tmp_path, method):
    """Tracing such a network makes subclasses of every form: the file must come back all the same."""
    options = {**pipeline.catalogue.entry(method).small, **({"keep_first_last": False} if method == "dorefa" else {})}
    result = fw.compress(Named(), small_task(), method, out=tmp_path, **options)
    loaded = fw.load(tmp_path / "model.fw", into=Named()).eval()
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded(x), result.model(x))


def test_a_file_of_another_configuration_is_refused(tmp_path):
    fw.save(Named(4), tmp_path / "a.fw")
    with pytest.raises(BadData, match="pass the same class and options"):
        fw.load(tmp_path / "a.fw", into=Named(5))


def test_data_that_are_empty(learned):
    with pytest.raises(BadData, match="validation data are empty"):
        quick(learned[0], Task(valid=[]), zero)


def test_needs_that_the_task_does_not_meet(learned):
    with pytest.raises(MissingNeed, match="pass Task"):
        quick(learned[0], Task(valid=learned[1].valid), "kd")


def test_an_output_folder_that_cannot_be_written(learned, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadData, match="cannot be written"):
        quick(*learned, zero, out=tmp_path / "file")


def test_a_full_disk_loses_nothing(learned, tmp_path, monkeypatch):
    quick(*learned, zero, out=tmp_path)
    before = (tmp_path / "report.json").read_bytes()

    def full(self, *args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BadData, match="No space left on device"):
        quick(*learned, zero, out=tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before


class Untraceable(nn.Module):
    """Its control flow depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_mlp()

    def forward(self, x):
        y = self.body(x)
        return y if y.sum().item() > 0 else y * 2


def test_a_model_that_cannot_be_traced_still_gets_masks_and_a_file(tmp_path):
    result = fw.compress(Untraceable(), small_task(), zero, out=tmp_path)
    assert not result.report["onnx"]["written"]
    assert len(result.report["onnx"]["why"]) > 30
    assert fw.load(tmp_path / "model.fw", into=Untraceable())


def test_a_metric_without_samples_has_no_interval():
    model, task = contract.trained()
    whole = Metric("share", aggregate=lambda outputs, targets: float(torch.cat(outputs).argmax(1).float().mean()) / 4)
    result = quick(model, Task(train=task.train, valid=task.valid, metric=whole), zero)
    assert result.report["result"]["metric_detail"]["interval"] == "no interval"
    assert result.report["drop"]["paired_interval"] is None


def test_report_is_plain_json(learned, tmp_path):
    result = fw.compress(*learned, zero, out=tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()).keys() == result.report.keys()


def test_batch_norm_statistics_survive(tmp_path):
    model, task = contract.trained()
    quick(model, task, zero, out=tmp_path)
    loaded = fw.load(tmp_path / "model.fw", into=small_cnn())
    assert torch.equal(loaded[1].running_var, model[1].running_var)
