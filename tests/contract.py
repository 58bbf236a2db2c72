"""What every method must keep, whatever it does; `test_contract.py` runs each check on each id of the catalogue."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import featherweight as fw
from conftest import (
    Sentences,
    Sequences,
    Writer,
    sequence_task,
    small_cnn,
    small_stack,
    small_task,
    token_task,
    writing_task,
)
from featherweight.catalogue import Entry
from featherweight.core.blueprint import blueprint
from featherweight.core.forms import bake
from featherweight.core.task import Task
from featherweight.errors import MissingNeed
from featherweight.provenance import seed_everything
from scenes import mask_task, segmenter


@dataclass(frozen=True)
class Ran:
    """One run of a method at its small settings, on disk."""

    entry: Entry
    original: nn.Module
    before: dict[str, torch.Tensor]  # what the original held before the run
    task: Task
    result: fw.Result
    folder: Path
    onnx_again: bool = False  # whether the second run writes ONNX too

    def again(self, out: Path) -> fw.Result:
        options = {"measure": False, "onnx": self.onnx_again, **self.entry.small}
        return fw.compress(self.original, self.task, self.entry.id, out=out, **options)


def own_onnx(entry: Entry) -> bool:
    """Whether a method has a say in how its ONNX file is written: grids and shared weights have."""
    return "bits" in entry.shrinks


def drawn(name: str, one_in: int) -> bool:
    """By its name: writing ONNX takes longer than all else, and where a method has no say in it, some stand for all."""
    return zlib.crc32(name.encode()) % one_in == 0


# Methods on layers that the small network of images does not have: a network that has them, and its task.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Task]]] = {
    "albert_embedding": (Sentences, token_task),
    "albert_share": (small_stack, small_task),
    "bert_to_bilstm": (Sentences, token_task),
    "compact_rnn_sharing": (Sequences, sequence_task),
    "sequence_kd": (Writer, writing_task),
    "structured_kd_seg": (lambda: segmenter(4), lambda: mask_task(32)),
}


def network(name: str = "") -> tuple[nn.Module, Task]:
    """The network, untrained, and the task on which a method is checked."""
    make, task = NETWORKS.get(name, (small_cnn, small_task))
    return make(), task()


def trained(name: str = "") -> tuple[nn.Module, Task]:
    """The network, trained, and its task; each call has a copy of its own."""
    return copy.deepcopy(_trained(name if name in NETWORKS else "")), network(name)[1]


@cache
def _trained(name: str) -> nn.Module:
    torch.manual_seed(0)
    model, task = network(name)
    return fw.fit(model, task, epochs=6, lr=0.01).eval()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def check_declares_what_it_is(ran: Ran) -> None:
    assert ran.entry.paper
    assert ran.entry.doc
    assert ran.entry.small, "small settings make the contract fast"
    assert ran.entry.shrinks <= {"weights", "bits", "channels", "factors"}
    assert ran.entry.needs <= {"labels", "train", "calibration", "teacher"}
    json.dumps(ran.entry.facts())
    assert all(option.meaning for option in ran.entry.options()), "every option has a meaning in the docstring"


def check_says_what_departs_from_the_paper(ran: Ran) -> None:
    """In the docstring of the method, of its module, or of an ingredient that makes it what it is."""
    told = [ran.entry.function, importlib.import_module(ran.entry.module)]
    told += [value for value in ran.entry.defaults.values() if callable(value)]
    assert any("Departs from the paper: " in (inspect.getdoc(one) or "") for one in told)


def check_leaves_the_callers_model_alone(ran: Ran) -> None:
    assert same(ran.before, state(ran.original))
    assert [n for n, _ in ran.original.named_modules()] == [n for n, _ in network(ran.entry.id)[0].named_modules()]


def check_hands_back_an_ordinary_module(ran: Ran) -> None:
    assert not any(parametrize.is_parametrized(m) for m in ran.result.model.modules())
    assert not ran.result.model.training
    assert torch.isfinite(ran.result.model(*ran.task.inputs()[0])).all()


def check_bake_changes_no_output(ran: Ran) -> None:
    seed_everything(0, 0)
    task = replace(ran.task, teacher=ran.original)
    soft = ran.entry(copy.deepcopy(ran.original), task, **ran.entry.small).eval()
    x = ran.task.inputs()[0]
    with torch.no_grad():
        before = soft(*x)
        plain = bake(copy.deepcopy(soft))
        assert torch.equal(plain(*x), before)
        assert torch.equal(soft(*x), before), "baking a copy must leave the original working"


def check_file_is_exact(ran: Ran) -> None:
    file = ran.folder / "model.fw"
    unpacked = fw.unpack(file)
    held = ran.result.model.state_dict() | blueprint(ran.result.model)[1]  # tensors of activation grids too
    for name, tensor in unpacked.items():
        assert torch.equal(tensor, held[name]), name
    assert ran.result.report["result"]["bytes"] == file.stat().st_size
    loaded = fw.load(file, into=copy.deepcopy(ran.original)).eval()
    x = ran.task.inputs()[0]
    with torch.no_grad():
        assert torch.equal(loaded(*x), ran.result.model(*x))


def check_file_needs_no_class(ran: Ran) -> None:
    assert ran.result.report["file"]["class_free"], ran.result.report["file"]
    found = fw.load(ran.folder / "model.fw")
    x = ran.task.inputs()[0]
    with torch.no_grad():
        assert torch.equal(found(*x), ran.result.model(*x))
    assert set(found.state_dict()) == set(ran.result.model.state_dict())
    found.train()(*x).square().sum().backward()
    missing = [name for name, p in found.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def check_bare_file_is_exact(ran: Ran) -> None:
    file = ran.folder / "bare.fw"
    fw.save(ran.result.model, file, bare=True)
    assert file.stat().st_size < (ran.folder / "model.fw").stat().st_size
    loaded = fw.load(file, into=network(ran.entry.id)[0]).eval()
    x = ran.task.inputs()[0]
    with torch.no_grad():
        assert torch.equal(loaded(*x), ran.result.model(*x))


def check_same_seed_same_bytes(ran: Ran) -> None:
    ran.again(ran.folder / "again")
    for name in ("model.fw", "model.onnx")[: 2 if ran.onnx_again else 1]:
        assert (ran.folder / name).read_bytes() == (ran.folder / "again" / name).read_bytes(), name


def check_onnx_equals_the_module(ran: Ran) -> None:
    told = ran.result.report["onnx"]
    assert told["written"], told
    assert abs(told["metric_valid"] - told["metric_valid_of_the_module"]) <= 0.04


def check_makes_smaller_what_it_says(ran: Ran) -> None:
    before, after = ran.result.report["original"], ran.result.report["result"]
    dense = ran.folder / "dense.fw"
    fw.save(ran.original, dense)
    if "weights" in ran.entry.shrinks:
        assert after["nonzeros"] < before["nonzeros"]
        assert after["bytes"] < dense.stat().st_size
    if "bits" in ran.entry.shrinks:
        assert after["bytes"] < 0.7 * dense.stat().st_size
    if "channels" in ran.entry.shrinks:
        assert after["macs"] < before["macs"]
        assert after["params"] < before["params"]
    if "factors" in ran.entry.shrinks:
        assert after["macs"] < before["macs"]


def check_report_is_whole(ran: Ran) -> None:
    report = json.loads((ran.folder / "report.json").read_text())
    for side in ("original", "result"):
        assert {"metric", "bytes", "params", "macs", "latency"} <= report[side].keys()
        assert 0 <= report[side]["metric"] <= 1
        assert report[side]["latency"] > 0
    assert [stage["method"] for stage in report["stages"]] == [ran.entry.id]
    assert sum(row["macs"] for row in report["layers"]) == report["result"]["macs"]


def check_refuses_a_task_without_its_needs(ran: Ran) -> None:
    bare = Task(valid=ran.task.valid, example_inputs=ran.task.example_inputs)
    if ran.entry.needs & {"train", "calibration"}:
        with pytest.raises(MissingNeed, match=ran.entry.id):
            fw.compress(ran.original, bare, ran.entry.id, **ran.entry.small)
    else:
        assert fw.compress(ran.original, bare, ran.entry.id, measure=False, onnx=False, **ran.entry.small).report


def checks() -> Iterator[Callable[[Ran], None]]:
    """Every check of this file."""
    yield from (value for name, value in globals().items() if name.startswith("check_"))
