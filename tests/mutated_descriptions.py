"""Descriptions of a model that are changed as text, as a tree, and as the graph of a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from featherweight.coding.manifest import unpack_manifest
from mutated_bytes import Random, bytes_changed, deflated, extreme

LARGEST = 400_000  # letters of a description that is changed by structure: a fuzzer changes what was changed before
RAW = (  # texts that json.dumps would not write
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-0",
    "9" * 400,
    "9" * 5000,
    "1" + "0" * 4000,
    "0.1e-400",
    '"\\ud800"',
    '"\\u0000"',
    '"\\u001b[2J"',
    "[" * 300 + "]" * 300,
    "[" * 40_000,
    '{"a":' * 300 + "1" + "}" * 300,
    '{"type":"Sequential","layers":{"0":' * 9 + '{"type":"ReLU","args":{}}' + "}}" * 9,
    '{"type":"Identity","args":{},"type":"Linear"}',
    "[" + "[]," * 20_000 + "0]",
    "{" + ",".join(f'"{i}":0' for i in range(20_000)) + "}",
    "[1,]",
    "",
)
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, -(2**31), 2**40, 2**62, 2**63, 2**64, 10**30, 0.5, -0.5, 1e308, 5e-324,
    "", "a", ".", "..", "a.b", "__class__", "_parameters", "forward", "weight", "0", "ключ", "\N{GRINNING FACE}",
    "a\nb", "\u202e", "x" * 5000, [], [[]], {}, [0], [1, 2], ["a"], [None], {"a": 1}, {"same": "conv1"},
    {"type": "Linear", "args": {"in_features": 2**20, "out_features": 2**20, "bias": True}}, {"type": "Sequential"},
    {"type": "Half", "settings": {"bits": 1}, "tensors": {"b.factor": 0}}, {"shape": [2**40], "dtype": "float32"},
)  # fmt: skip


def tree_changed(manifest: bytes, rng: Random) -> bytes:
    """The description with some of its values, keys or subtrees replaced, removed, repeated, moved or nested."""
    data: Any = unpack_manifest(manifest)
    if len(json.dumps(data)) > LARGEST:
        return bytes_changed(manifest, rng)
    raw: list[str] = []
    for _ in range(int(rng.integers(1, 4))):
        places = list(_places(data))
        if not places:
            return deflated(b'{"names":["a","a"]}')
        at = int(rng.integers(len(places)))
        if rng.random() < 0.4:  # near the root, where the parts are
            at = int(rng.integers(min(len(places), 12)))
        _change(places, at, raw, rng)
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=bool(rng.integers(2)))
    for number, piece in enumerate(raw):
        text = text.replace(f'"@raw{number}@"', piece)
    return deflated(text.encode("utf-8", "surrogatepass"))


def _places(value: Any) -> Any:
    """Every (container, key) of a tree, outer ones first."""
    held = [value]
    for one in held:
        items = list(one.items()) if isinstance(one, dict) else list(enumerate(one))
        for key, inner in items:
            yield one, key
            if isinstance(inner, (dict, list)):
                held.append(inner)


def _change(places: list[Any], at: int, raw: list[str], rng: Random) -> None:
    owner, key = places[at]
    kind = int(rng.integers(9))
    if kind <= 1:
        owner[key] = json.loads(json.dumps(ODD[int(rng.integers(len(ODD)))]))
    elif kind == 2:
        owner[key] = f"@raw{len(raw)}@"
        raw.append(RAW[int(rng.integers(len(RAW)))])
    elif kind == 3:
        del owner[key]
    elif kind == 4:
        other, place = places[int(rng.integers(len(places)))]
        owner[key] = json.loads(json.dumps(other[place])) if _has(other, place) else None
    elif kind == 5 and isinstance(owner, dict):
        new = rng.choice(["a", "", "conv1", "names", "same", "type", "0", "__class__", "b.forward", "p.", "x" * 3000])
        owner[str(new)] = owner.pop(key)
    elif kind == 6:
        for _ in range(int(rng.integers(1, 30))):
            owner[key] = [owner[key]] if rng.integers(2) else {"a": owner[key]}
    elif kind == 7 and isinstance(owner, list):
        owner += owner[: int(rng.integers(1, 9))] * int(rng.choice([1, 1, 1, 300]))
    elif isinstance(owner[key], (int, float)):
        owner[key] = int(extreme(rng)) * int(rng.choice([-1, 1]))
    else:
        owner[key] = str(owner[key])[:50] + str(rng.choice(["", "x", ".0", "\N{COMBINING ACUTE ACCENT}"]))


def _has(owner: Any, key: Any) -> bool:
    return key in owner if isinstance(owner, dict) else key < len(owner)


TARGETS = (
    "aten.relu.default", "aten.add.Tensor", "aten.view.default", "aten.cat.default", "aten.zeros.default", "size.size",
    "aten.expand.default", "aten.repeat.default", "aten.system.default", "aten.view.__class__", "aten.full.default",
    "size.pow", "size.mul", "size.item", "size.__import__", "os.system", "torch.load", "@", "@.", "@blocks", "@head",
    "@fw_input", "@head.fw_input", "@missing", "aten", "aten.", "aten.relu", "", "aten.__class__.default",
)  # fmt: skip
ARGUMENTS: tuple[Any, ...] = (
    {"r": 1}, {"r": 0}, {"r": -1}, {"r": 10**6}, {"r": 2**62}, {"r": "1"}, {"w": "head.weight"}, {"w": "absent"},
    {"w": 3}, {"w": ""}, {"w": "head"}, {"w": "__class__"}, {"training": 1}, {"training": [1]}, {"device": 1},
    {"dtype": "float32"}, {"dtype": "load"}, {"dtype": []}, {"format": "channels_last"}, {"float": "nan"}, {"float": 1},
    {"tuple": [1, {"r": 1}]}, {"dict": {"a": 1}}, {"outputs": {"a": {"r": 1}}}, {"outputs": []}, {"r": 1, "w": "x"}, {},
    [], [2**40, 2**40], [[[[[1]]]]], 2**62, -(2**62), 0.5, "x", True, None, 1,
)  # fmt: skip


def wiring_changed(manifest: bytes, rng: Random) -> bytes:
    """The graph with steps, modules, inputs, conditions that are others, more, or lead anywhere."""
    data: Any = unpack_manifest(manifest)
    wiring: Any = data.get("wiring")
    parts = ("modules", "own", "inputs", "steps", "conditions")
    whole = isinstance(wiring, dict) and all(isinstance(wiring.get(key), (dict, list)) for key in parts)
    if not whole or not wiring["steps"] or len(json.dumps(data)) > LARGEST:
        return tree_changed(manifest, rng)
    for _ in range(int(rng.integers(1, 4))):
        WIRING[int(rng.integers(len(WIRING)))](wiring, rng)
    return deflated(json.dumps(data).encode())


def _any(values: Any, rng: Random) -> Any:
    return json.loads(json.dumps(values[int(rng.integers(len(values)))]))


def _other_step(wiring: Any, rng: Random) -> None:
    step = [_any(TARGETS, rng), [_any(ARGUMENTS, rng) for _ in range(int(rng.integers(5)))]]
    if rng.integers(4) == 0:
        step.append({str(rng.choice(["dim", "alpha", "size", "x", "", "a.b"])): _any(ARGUMENTS, rng)})
    wiring["steps"].insert(int(rng.integers(len(wiring["steps"]) + 1)), step)


def _other_argument(wiring: Any, rng: Random) -> None:
    step = wiring["steps"][int(rng.integers(len(wiring["steps"])))]
    if step[1]:
        step[1][int(rng.integers(len(step[1])))] = _any(ARGUMENTS, rng)


def _other_target(wiring: Any, rng: Random) -> None:
    wiring["steps"][int(rng.integers(len(wiring["steps"])))][0] = _any(TARGETS, rng)


def _steps_moved(wiring: Any, rng: Random) -> None:
    wiring["steps"] = [wiring["steps"][i] for i in rng.permutation(len(wiring["steps"]))]


def _steps_repeated(wiring: Any, rng: Random) -> None:
    several = int(rng.choice([1, 3, 1000]))
    wiring["steps"] += wiring["steps"] * min(several, 1 + 30_000 // len(wiring["steps"]))


def _shared_modules(wiring: Any, rng: Random) -> None:
    """Places that hold one another, in chains that double at each link, or in circles."""
    modules, count = wiring["modules"], int(rng.choice([2, 3, 30, 100]))
    modules |= {f"p{i}": 0 for i in range(count)}
    for i in range(1, count):
        modules[f"p{i}.a"] = {"same": f"p{i - 1}"}
        modules[f"p{i}.b"] = {"same": f"p{i - 1}"}
    if rng.integers(2):
        modules["p0.a"] = {"same": f"p{count - 1}"}


def _more_modules(wiring: Any, rng: Random) -> None:
    paths = [
        *wiring["modules"],
        "a",
        "a.b",
        "head.x",
        "",
        ".",
        "x" * 400,
        "a" + ".a" * 70,
        "training",
        "fw_input",
        "wiring",
    ]
    specs = [0, 1, None, {}, {"same": _any(paths, rng)}, {"type": "ReLU", "args": {"inplace": False}}, *ODD]
    wiring["modules"][_any(paths, rng)] = _any(specs, rng)
    if rng.integers(3) == 0:
        wiring["own"][_any([*paths, *wiring["own"]], rng)] = _any(["p", "b", "n", "x", 0, None], rng)


def _many_modules(wiring: Any, rng: Random) -> None:
    spec = _any(
        [0, {"type": "Identity", "args": {}}, {"type": "Linear", "args": {"in_features": 1, "out_features": 1}}], rng
    )
    wiring["modules"] |= {f"m{i}": spec for i in range(int(rng.choice([100, 3000, 30_000])))}


def _deep_modules(wiring: Any, rng: Random) -> None:
    depth = int(rng.choice([20, 63, 64, 65, 200]))
    wiring["modules"] |= {".".join(["d"] * i): 0 for i in range(1, depth)}


def _other_inputs(wiring: Any, rng: Random) -> None:
    odd = [
        ["float32", [2, 4], [0], 0, 1],
        ["float32", [2**40], [], 0, 1],
        ["x", [], [], 0, 0],
        [[], [], [], 0, 0],
        [],
        3,
    ]
    wiring["inputs"].insert(int(rng.integers(len(wiring["inputs"]) + 1)), _any(odd, rng))


def _other_conditions(wiring: Any, rng: Random) -> None:
    condition = _any(
        [["eq", ["size", 0, 0], 1], ["eq", 1], ["size", 9, 9], ["pow", 2, ["size", 0, 0]], ["x", 1], 3], rng
    )
    for _ in range(int(rng.choice([0, 0, 3, 30]))):
        condition = ["add", condition, condition if rng.integers(3) else 1]
        if len(json.dumps(condition)) > 10_000:
            break
    wiring["conditions"].append(condition)


def _other_output(wiring: Any, rng: Random) -> None:
    wiring["output"] = _any(ARGUMENTS, rng)
    wiring["names"] = _any([wiring["names"], [], ["a"] * 9, ["a b"], [""], ["__class__"], 3], rng)


WIRING: tuple[Callable[[Any, Random], None], ...] = (
    _other_step, _other_step, _other_argument, _other_argument, _other_target, _steps_moved, _steps_repeated,
    _shared_modules, _more_modules, _many_modules, _deep_modules, _other_inputs, _other_conditions, _other_output,
)  # fmt: skip


def text_changed(manifest: bytes, rng: Random) -> bytes:
    return deflated(bytes_changed(json.dumps(unpack_manifest(manifest)).encode(), rng))
