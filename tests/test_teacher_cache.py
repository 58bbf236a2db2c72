"""Outputs of a teacher kept on disk: the same student bit for bit, and one sentence for a cache of anything else."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import featherweight as fw
from conftest import Batches, blobs, small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.cli import app
from featherweight.core import processes
from featherweight.core.ensemble import Ensemble
from featherweight.core.ledger import recording
from featherweight.core.teacher_cache import cached
from featherweight.distill import distill
from featherweight.errors import BadData, BadOption

OWN = f"{Path(__file__).parent / 'conftest.py'}:"


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def dropping() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(384, 4))


def loaded(shuffle: bool) -> fw.Task:
    """A loader of torch's, which draws from the generator whenever it is gone through."""
    x, y = blobs((1, 8, 8))
    loader = DataLoader(TensorDataset(x[:96], y[:96]), batch_size=32, shuffle=shuffle)
    return fw.Task(train=loader, valid=Batches(x[96:], y[96:]), teacher=small_cnn().eval())


@pytest.mark.parametrize("match", ["softened", "attention_maps"])
def test_the_student_is_the_same_without_a_cache_with_a_new_and_with_an_old_one(tmp_path, match):
    task, students = loaded(shuffle=False), []
    for cache in (None, tmp_path / "kept", tmp_path / "kept"):
        torch.manual_seed(7)
        student = dropping()
        students.append(distill(student, task, match=match, weight=1.0, epochs=2, teacher_cache=cache))
    assert same(students[0], students[1])
    assert same(students[0], students[2])
    assert [p.name for p in tmp_path.iterdir()] == ["kept"], "nothing unfinished is left behind"


def test_the_teacher_is_asked_once_a_batch_and_then_never(tmp_path):
    task, calls = loaded(shuffle=False), []
    task.teacher.register_forward_hook(lambda *_: calls.append(1))
    with recording() as ledger:
        entry("kd")(small_mlp(), task, epochs=3, teacher_cache=tmp_path / "kept")
    assert len(calls) == 2 + 3, "twice the first batch, then every batch"
    assert any("outputs for 3 batches are kept" in text for text in ledger.notes)
    entry("kd")(small_mlp(), task, epochs=3, teacher_cache=tmp_path / "kept")
    assert len(calls) == 2 + 3 + 1, "the first batch again, to compare"


@pytest.mark.parametrize("layout", ["tokens", "turned"])
def test_features_keep_values_types_and_layout_in_memory(tmp_path, layout):
    class Tokens(nn.Module):
        def forward(self, x):
            return x.flatten(2).transpose(1, 2).bfloat16()

    class Turned(nn.Module):
        """Dimensions in a cycle: turning them back is not turning them once more."""

        def forward(self, x):
            return x.reshape(len(x), 3, 6, 6).permute(3, 0, 1, 2)

    teacher = nn.Sequential(nn.Conv2d(1, 3, 3), Tokens() if layout == "tokens" else Turned(), nn.Flatten()).eval()
    task, seen = replace(small_task(), teacher=teacher), []

    def match(student, teacher, batch, progress):
        seen.append(teacher["0"])
        return student[""].square().mean()

    for cache in (None, tmp_path / "kept"):
        distill(small_mlp(), task, match=match, pairs=[("1", "1")], epochs=1, teacher_cache=cache)
    assert not seen[0].is_contiguous()
    for plain, kept in zip(seen[:3], seen[3:], strict=True):
        assert (plain.dtype, plain.stride()) == (kept.dtype, kept.stride())
        assert torch.equal(plain, kept)


def refused(task: fw.Task, folder: Path, said: str, error: type[Exception] = BadData, **options) -> None:
    with pytest.raises(error, match=said):
        distill(small_mlp(), task, epochs=2, teacher_cache=folder, **options)


def test_another_teacher_other_data_another_order_and_damage_are_refused(tmp_path):
    task, kept = small_task(teacher=small_cnn().eval()), tmp_path / "kept"
    distill(small_mlp(), task, epochs=1, teacher_cache=kept)
    x, y = task.train.x, task.train.y
    other = copy.deepcopy(task.teacher)
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-3
    refused(replace(task, teacher=other), kept, "outputs of another teacher")
    strided = copy.deepcopy(task.teacher)
    strided[3].stride = (1, 1)
    refused(replace(task, teacher=strided), kept, "outputs of another teacher")
    refused(replace(task, train=Batches(x + 1e-3, y)), kept, "made of other data, or of the same in another order")
    refused(replace(task, train=Batches(x.flip(0), y.flip(0))), kept, "another order")
    refused(task, kept, "does not hold the outputs of 7", match="relations", weight=1.0)
    longer = replace(task, train=Batches(torch.cat([x, x[:16] + 1]), torch.cat([y, y[:16]])))
    refused(longer, kept, "made of other data")
    file = sorted(kept.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    refused(task, kept, "is damaged")
    for text in ("", "[]", '{"kind": "something else"}', '{"teacher": 1}'):
        (kept / "teacher.json").write_text(text)
        refused(task, kept, "is no folder of a teacher's outputs")
    (tmp_path / "file").write_text("")
    refused(task, tmp_path / "file", "is no folder of a teacher's outputs")
    refused(task, tmp_path / "file/below", "cannot be kept in")


def test_a_teacher_of_other_code_with_the_same_weights_is_refused(tmp_path):
    class Scaled(nn.Sequential):
        factor = 1.0

        def forward(self, x):
            return self.factor * super().forward(x)

    task = small_task(teacher=Scaled(*small_mlp()).eval())
    distill(small_mlp(), task, epochs=1, teacher_cache=tmp_path / "kept")
    task.teacher.factor = 2.0
    refused(task, tmp_path / "kept", "a teacher of other code")


def test_several_processes_are_told_that_the_main_one_refused(tmp_path, monkeypatch):
    """They wait for what it makes: without a word of its failure they would wait for ever."""
    told = []
    monkeypatch.setattr(processes, "together", lambda: True)
    monkeypatch.setattr(processes, "is_main", lambda: True)
    monkeypatch.setattr(processes, "from_main", lambda value: told.append(value) or value)
    ask = {"": torch.zeros(1)}
    with pytest.raises(BadData, match="differ from pass to pass"):
        cached(tmp_path / "kept", small_cnn(), loaded(shuffle=True), [""], lambda batch: ask)
    assert "differ from pass to pass" in told[0][1]


def test_what_differs_from_pass_to_pass_is_refused(tmp_path):
    refused(loaded(shuffle=True), tmp_path / "kept", "differ from pass to pass")

    class Noisy(Batches):
        """The first batch is fixed, the others are not."""

        def __iter__(self):
            for index, (x, y) in enumerate(super().__iter__()):
                yield (x + torch.randn(()) if index else x), y

    task = small_task(teacher=small_cnn().eval())
    assert not (tmp_path / "kept").exists()
    refused(replace(task, train=Noisy(task.train.x, task.train.y)), tmp_path / "kept", "differ from pass to pass")


def test_random_teachers_and_gradients_of_the_teacher_are_refused(tmp_path):
    draw = Ensemble([small_cnn(), small_cnn()], average=lambda n: torch.rand(n).softmax(0))
    refused(small_task(teacher=draw.eval()), tmp_path / "a", "answers the same batch differently", BadOption)
    task = small_task(teacher=small_cnn().eval())
    refused(task, tmp_path / "b", "differentiates the teacher", BadOption, match="values_and_derivatives", weight=1.0)


def test_python_flags_and_recipes_say_it_alike(tmp_path):
    options = {"epochs": 1, "teacher_cache": str(tmp_path / "kept")}
    base = {"model": OWN + "small_mlp", "data": OWN + "small_task", "train": 1, "measure": False, "onnx": False}
    made = fw.run({**base, "out": tmp_path / "a", "chain": [{"method": "kd", "options": options}]})
    assert "teacher_cache" in made.recipe
    text = f"model: {base['model']}\ndata: {base['data']}\ntrain: 1\nmeasure: false\nonnx: false\n"
    (tmp_path / "r.yaml").write_text(text + f"chain:\n  - method: kd\n    options: {json.dumps(options)}\n")
    call = ["compress", base["model"], "--data", base["data"], "--train", "1", "--no-measure", "--no-onnx"]
    call += ["--method", f"kd:epochs=1,teacher_cache={options['teacher_cache']}"]
    for args, out in ((["run", str(tmp_path / "r.yaml")], "b"), (call, "c")):
        told = CliRunner().invoke(app, [*args, "--out", str(tmp_path / out), "--quiet"])
        assert told.exit_code == 0, told.output
        assert (tmp_path / out / "model.fw").read_bytes() == (tmp_path / "a/model.fw").read_bytes()
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 3
