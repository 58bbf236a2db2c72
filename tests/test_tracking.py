"""Trackers: what is logged is what happened, in TensorBoard's files and in an object of the user's own."""

import math

import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch import nn

import featherweight as fw
from conftest import small_mlp, small_task
from featherweight.core import tracking
from featherweight.errors import BadOption, MissingNeed, UnknownName


class Kept(GeneralTracker):
    """Keeps what it is told."""

    name = "kept"
    requires_logging_directory = False
    tracker = None

    def __init__(self) -> None:
        super().__init__()
        self.config, self.rows, self.finished = {}, [], 0

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.rows.append((step, values))

    def finish(self):
        self.finished += 1

    def series(self, name):
        return [(step, values[name]) for step, values in self.rows if name in values]


def test_every_step_and_epoch_of_the_loop_is_logged():
    kept, seen, task = Kept(), [], small_task()

    def step(model, batch, progress):
        x, y = batch
        terms = {"a": nn.functional.cross_entropy(model(x), y), "b": 0.1 * model(x).square().mean()}
        seen.append({name: float(term.detach()) for name, term in terms.items()})
        return terms

    with fw.tracking(kept, config={"seed": 3}):
        fw.fit(small_mlp(), task, epochs=2, lr=0.01, step=step, decay="linear")
    assert kept.config == {"seed": 3}
    assert kept.finished == 1
    assert kept.series("loss/a") == [(i + 1, terms["a"]) for i, terms in enumerate(seen)]
    assert kept.series("loss") == [(i + 1, t["a"] + t["b"]) for i, t in enumerate(seen)]
    assert [lr for _, lr in kept.series("lr")] == pytest.approx([0.01 * (1 - i / 6) for i in range(6)])
    means = [sum(t["a"] + t["b"] for t in seen[i : i + 3]) / 3 for i in (0, 3)]
    assert kept.series("epoch/loss") == [(3, pytest.approx(means[0])), (6, pytest.approx(means[1]))]


def test_nothing_is_logged_outside_and_steps_count_on_over_loops():
    kept, task, model = Kept(), small_task(), small_mlp()
    with fw.tracking(kept):
        fw.fit(model, task, epochs=1)
        fw.fit(model, task, epochs=1)
    fw.fit(model, task, epochs=1)
    assert [step for step, _ in kept.series("loss")] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in kept.series("epoch/loss")] == [3, 6]
    assert not kept.series("loss/task"), "a single term is the loss"


def test_tracking_does_not_change_what_is_learned():
    results = []
    for tracker in (None, Kept()):
        torch.manual_seed(0)
        with fw.tracking(tracker):
            results.append(fw.fit(small_mlp(), small_task(), epochs=1).state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


CHAIN = [
    ("magnitude_iterative", {"sparsity": 0.5, "rounds": 1, "epochs": 1, "finetune": 0}),
    ("magnitude_iterative", {"sparsity": 0.9, "rounds": 1, "epochs": 1, "finetune": 0}),
]


def test_compress_logs_the_ledger_after_every_method(tmp_path):
    kept, task = Kept(), small_task()
    model = fw.fit(small_mlp(), task, epochs=4, lr=0.01)
    result = fw.compress(model, task, CHAIN, onnx=False, tracker=kept, out=tmp_path, guard="drop<=60pt")
    stages = result.report["stages"]
    for name in ("metric", "nonzeros", "size", "drop"):
        assert kept.series(f"ledger/{name}") == [(3, stages[0][name]), (6, stages[1][name])]
    assert kept.config["guard"] == "drop<=60pt"
    assert kept.config["chain"].startswith("magnitude_iterative sparsity=0.5 rounds=1")
    assert all(math.isfinite(value) for _, values in kept.rows for value in values.values())
    assert result.report["reproduce"]["recipe"] is not None
    (tmp_path / "stages" / "01.safetensors").unlink()
    again = Kept()
    fw.compress(model, task, CHAIN, onnx=False, tracker=again, out=tmp_path, guard="drop<=60pt", resume=True)
    assert [step for step, _ in again.series("loss")] == [4, 5, 6], "steps go on where the first run left them"


def test_tensorboard_files_read_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    task = small_task()
    result = fw.compress(small_mlp(), task, CHAIN[:1], onnx=False, tracker="tensorboard", out=tmp_path)
    (file,) = (tmp_path / "tracking" / tracking.RUN).glob("events*")
    events = EventAccumulator(str(file)).Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3]
    assert all(event.value > 0 for event in losses)
    (stage,) = result.report["stages"]
    assert events.Scalars("ledger/nonzeros")[0].value == stage["nonzeros"]
    assert events.Scalars("ledger/metric")[0].value == pytest.approx(stage["metric"])


def test_several_trackers_at_once(tmp_path):
    kept = Kept()
    with fw.tracking(["tensorboard", kept], tmp_path):
        fw.fit(small_mlp(), small_task(), epochs=1)
    assert len(kept.series("loss")) == 3
    assert list(tmp_path.rglob("events*"))


def test_refusals(tmp_path, monkeypatch):
    model, task = small_mlp(), small_task()
    with pytest.raises(UnknownName, match="unknown tracker 'tensorbord': did you mean 'tensorboard'"):
        fw.compress(model, task, CHAIN, tracker="tensorbord", out=tmp_path / "run")
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(
        MissingNeed, match="the tracker 'wandb' needs a package that is not installed: pip install wandb"
    ):
        fw.compress(model, task, CHAIN, tracker="wandb", out=tmp_path / "run")
    monkeypatch.undo()
    for wrong in (3, [], object()):
        with pytest.raises(BadOption, match="must be a name such as 'tensorboard'"):
            fw.compress(model, task, CHAIN, tracker=wrong, out=tmp_path / "run")
    with pytest.raises(BadOption, match="'tensorboard' writes files: say where, with out= or tracker_dir="):
        fw.compress(model, task, CHAIN, tracker="tensorboard")
    assert not (tmp_path / "run").exists()
