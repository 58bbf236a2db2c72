"""The graph in a file from a stranger: bounded, complete, without circles; or refused by what is wrong with it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.coding import load, save
from featherweight.coding.container import assemble
from featherweight.coding.manifest import unpack_manifest
from featherweight.core.layers import MOST
from featherweight.errors import FormatError
from golden_models import GRAPH_INPUTS, GoldenGraph, graph
from hostile_seeds import GOLDEN, wired_graph
from mutated_bytes import deflated
from mutations import parts
from opening import opened

SECONDS = 2.0
IDENTITY = {"type": "Identity", "args": {}}
CONV = {"type": "Conv2d", "args": {"in_channels": 1, "out_channels": 1, "kernel_size": 1}}
NORM = {"type": "BatchNorm1d", "args": {"num_features": 1}}
LARGE: dict[str, Any] = {
    "type": "StructuredLinear",
    "args": {"in_features": 1 << 14, "out_features": 1 << 14, "bias": False, "structure": ["hashed", 1, 0]},
}
LSTM: dict[str, Any] = {"type": "LSTM", "args": {"input_size": 1, "hidden_size": 1, "num_layers": 250}}
Change = Callable[[dict[str, Any]], object]


def changed(path: Path, change: Change) -> Path:
    """A golden file with another graph."""
    manifest, records, bare = parts((GOLDEN / "graph.fw").read_bytes())
    data = unpack_manifest(manifest)
    change(data)
    path.write_bytes(assemble(deflated(json.dumps(data, separators=(",", ":")).encode()), list(records), bare))
    return path


def steps(*more: Any) -> Change:
    return lambda data: data["wiring"]["steps"].extend(more)


def modules(**more: Any) -> Change:
    return lambda data: data["wiring"]["modules"].update({key.replace("__", "."): spec for key, spec in more.items()})


def part(key: str, value: Any) -> Change:
    return lambda data: data["wiring"].update({key: value})


def circle(data: dict[str, Any]) -> None:
    """Two places that hold one another."""
    data["wiring"]["modules"] |= {"a": 0, "b": 0, "b.c": {"same": "a"}, "a.d": {"same": "b"}}


def doubling(data: dict[str, Any]) -> None:
    """A chain of places, each of which holds the one before twice: 2**40 paths."""
    for i in range(40):
        data["wiring"]["modules"] |= {f"p{i}": 0}
        data["wiring"]["modules"] |= {f"p{i}.{at}": {"same": f"p{i - 1}"} for at in ("a", "b") if i}


def long_chain(data: dict[str, Any]) -> None:
    """Places within places, 300 deep, by paths that are short."""
    for i in range(300):
        data["wiring"]["modules"] |= {f"p{i}": 0}
        data["wiring"]["modules"] |= {f"p{i}.a": {"same": f"p{i - 1}"}} if i else {}


def nobody(data: dict[str, Any]) -> None:
    """The constant of the code is renamed where it is stored, and used nowhere."""
    data["hidden"][0] = "nobody"
    del data["wiring"]["own"]["constant_0"]
    text = json.dumps(data["wiring"]["steps"]).replace("constant_0", "blocks.0.shift")
    data["wiring"]["steps"] = json.loads(text)


REFUSED: dict[str, tuple[Change, str]] = {
    "a circle": (circle, r"'a\.d' into a module that already stands at several paths"),
    "a module within itself": (modules(blocks__0__x={"same": "blocks"}), "into a module that already stands"),
    "the same as a place around it": (modules(a=0, a__b={"same": "a"}), "'a', which is none before"),
    "a chain that doubles": (doubling, "more than 131072 modules and tensors"),
    "a deep chain": (long_chain, "more than 64 deep"),
    "a deep path": (modules(**{"__".join("a" * depth): 0 for depth in range(1, 80)}), "no path of a module"),
    "too many layers": (modules(**{f"m{i}": IDENTITY for i in range(MOST)}), f"more than the {MOST} layers"),
    "structured layers that are too large together": (modules(m=LARGE, n=LARGE), "of 536870912 entries, and those of"),
    "too many recurrent layers": (modules(**{f"m{i}": LSTM for i in range(9)}), f"more than the {MOST} layers"),
    "a recurrent layer without end": (modules(head=LSTM | {"args": LSTM["args"] | {"num_layers": 300}}), "300 as num"),
    "a layer that is a word": (modules(m="Linear"), "'m' as 'Linear', which is no layer"),
    "the same as a list": (modules(m={"same": ["words"]}), "a list of 1, which is none before"),
    "a layer whose tensors are not there": (modules(m=CONV), "'m', a layer with tensors, and holds none"),
    "a norm whose tensors are not there": (modules(m=NORM), r"tensor m\.bias, the file has none"),
    "a type that is a number": (steps(["aten.view.dtype", [{"r": 1}, 100]]), "100 for dtype, which takes ScalarType"),
    "a type that a step made": (
        steps(["size.add", [50, 50]], ["aten.view.dtype", [{"r": 2}, {"r": 1}]]),
        "an object of 1 for dtype, which takes ScalarType",
    ),
    "a type for a tensor": (steps(["aten.relu.default", [{"dtype": "int8"}]]), "for self, which takes Tensor"),
    "numbers without a tensor": (steps(["aten.remainder.int", [1, 0]]), "which no file may call"),
    "writing into another result": (steps(["aten.relu.out", [{"r": 1}], {"out": {"r": 2}}]), "which no file may call"),
    "an attribute of ours": (modules(_fw_edits=0), "'_fw_edits', which is no path"),
    "parametrizations": (modules(parametrizations=0), "'parametrizations', which is no path"),
    "a step that is a number": (steps(3), "a step"),
    "a step without arguments": (steps(["aten.relu.default"]), "a step"),
    "a place that is called": (steps(["@blocks", [{"r": 1}]]), "'blocks', which the file does not describe"),
    "a form that is not there": (steps(["@head.fw_input", [{"r": 1}]]), r"'head\.fw_input', which the file does not"),
    "a tensor of a form": (steps(["aten.relu.default", [{"w": "blocks.0.mix/output/b.scale"}]]), "which is not there"),
    "a module as a tensor": (steps(["aten.relu.default", [{"w": "head"}]]), "tensor 'head', which is not there"),
    "a result of later": (steps(["aten.relu.default", [{"r": -1}]]), "'r' -1, which is not there"),
    "a result of long ago": (steps(["aten.relu.default", [{"r": 1 << 60}]]), "'r' 1152921504606846976"),
    "an operator of the system": (steps(["aten.from_file.default", ["/etc/passwd"]]), "which no file may call"),
    "a class of an operator": (steps(["aten.relu.__class__", [{"r": 1}]]), "which no file may call"),
    "a word for a tensor": (steps(["aten.relu.default", ["x"]]), "'x' for self, which takes Tensor"),
    "a tensor of a terabyte": (steps(["aten.zeros.default", [[1 << 20, 1 << 20]]]), "more than a file may ask for"),
    "arguments nested deeply": (steps(["aten.cat.default", [json.loads("[" * 40 + "]" * 40)]]), "takes List"),
    "an input of no type": (part("inputs", [[[], [], [], 0, 0]]), "an input"),
    "an input of a terabyte": (part("inputs", [["float32", [1 << 40], [], 0, 0]]), "an input"),
    "a condition on no input": (part("conditions", [["eq", ["size", 7, 0], 1]]), "a condition on a size"),
    "a condition that is a function": (part("conditions", [["open", 1]]), "a condition with 'open'"),
    "a result that is not there": (part("output", {"r": 9999}), "'r' 9999, which is not there"),
    "no output": (lambda data: data["wiring"].pop("steps"), "steps are missing"),
    "a layer whose tensor is hidden": (
        lambda data: (
            data["ties"].clear(),
            data["names"].remove("words.weight"),
            data["hidden"].append("words.weight"),
        ),
        "'head', a layer with tensors, and holds none",
    ),
    "a hidden tensor of no one": (nobody, "hides a tensor 'nobody', which its network does not have"),
    "a graph of nothing": (lambda data: data.update(wiring={"a": 1}), "are missing"),
    "a graph of text": (lambda data: data.update(wiring="x"), "wiring: it is no object"),
    "a name hidden and not": (lambda data: data["hidden"].append("words.weight"), "hidden: a name has a record"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_graphs_that_no_file_may_hold_are_refused(name: str, tmp_path: Path) -> None:
    change, sentence = REFUSED[name]
    path, start = changed(tmp_path / "a.fw", change), time.process_time()
    with pytest.raises(FormatError, match=sentence) as caught:
        load(path)
    assert time.process_time() - start < SECONDS
    assert caught.value.__cause__ is None
    assert not opened(path, GoldenGraph).wrong


LARGE: dict[str, Change] = {
    "steps": steps(*[["aten.relu.default", [{"r": 1}]]] * 14_000),
    "arguments": steps(["aten.cat.default", [[{"r": 1}] * 70_000]]),
    "layers": modules(**{f"m{i}": IDENTITY for i in range(MOST - 20)}),
    "layers with tensors": modules(**{f"m{i}": NORM for i in range(MOST // 2)}),
    "conditions": part("conditions", [["eq", ["size", 0, 0], ["size", 0, 0]]] * 24_000),
    "results": part("output", [{"r": 1}] * 80_000),
}


@pytest.mark.parametrize("name", LARGE)
def test_the_most_that_a_graph_may_hold_is_read_in_time(name: str, tmp_path: Path) -> None:
    path = changed(tmp_path / "a.fw", LARGE[name])
    took = []
    for _ in range(3):  # a neighbour on the same core costs processor time too: the least of three is the file's own
        start = time.process_time()
        if name == "layers with tensors":
            with pytest.raises(FormatError, match="the file has none"):
                load(path)
        else:
            load(path)
        took.append(time.process_time() - start)
    assert min(took) < SECONDS


def test_a_bare_file_of_a_network_without_a_class_is_checked_too(tmp_path: Path) -> None:
    save(wired_graph(), tmp_path / "a.fw", bare=True)
    load(tmp_path / "a.fw", into=wired_graph())
    manifest, records, _ = parts((tmp_path / "a.fw").read_bytes())
    data = unpack_manifest(manifest)
    data["wiring"]["steps"][0][0] = "@blocks"
    (tmp_path / "a.fw").write_bytes(assemble(deflated(json.dumps(data).encode()), list(records), True))
    with pytest.raises(FormatError, match="'blocks', which the file does not describe"):
        load(tmp_path / "a.fw", into=wired_graph())


def test_a_shared_module_with_a_hidden_buffer_opens_without_its_class(tmp_path: Path) -> None:
    """Found: the graph calls it by its later paths, of which only the first had a tensor in the file."""
    model = graph()
    save(model, tmp_path / "a.fw", example_inputs=GRAPH_INPUTS)
    wired = load(tmp_path / "a.fw")
    assert wired.get_submodule("blocks.2") is wired.get_submodule("blocks.0")
    for key, tensor in wired(**GRAPH_INPUTS).items():
        expected = model(**GRAPH_INPUTS)[key]
        for ours, theirs in zip(*((t if isinstance(t, tuple) else (t,)) for t in (tensor, expected)), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "key", ["modules", "own", "inputs", "args", "kwargs", "names", "steps", "output", "conditions"]
)
def test_no_error_leaves_its_family(key: str, tmp_path: Path) -> None:
    """What is no network at all: every part of the graph replaced by every kind of value."""
    odd = (None, 3, "x", [], {}, [[]], [{}], [None], {"a": None}, {"": 0}, {"a": {"same": None}}, [["x", 1]])
    for value in odd:
        assert not opened(changed(tmp_path / "a.fw", part(key, value)), None).wrong
