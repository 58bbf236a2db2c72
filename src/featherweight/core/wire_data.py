"""A wired network as JSON-able data, and back: every name, number and shape is checked before anything is built.

Results of earlier steps are written as distances ({"r": 1} is the step before), so that layers that repeat read the
same; tensors as {"w": name}; everything else as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.core.forms import ACTIVATIONS, own_modules
from featherweight.core.layers import MOST as MOST_LAYERS
from featherweight.core.layers import build_layer, check_entries, count_layers, layer_spec, plain_name
from featherweight.core.operators import SIZES, arity, schema_types
from featherweight.core.wired import (
    Device,
    Fields,
    Held,
    Input,
    Outputs,
    Place,
    Ref,
    Step,
    Training,
    Wired,
    Wiring,
    refs,
)
from featherweight.errors import FormatError, shown

MOST = 1 << 17  # modules, steps, tensors, conditions of one network
DEEPEST_MODULE = 64  # modules that may stand inside one another
DEEPEST = 24  # nesting of arguments, outputs and conditions
LARGEST = 1 << 28  # elements of an example input, or of a tensor that a step makes from plain numbers
DTYPES: dict[str, torch.dtype] = {
    str(t).removeprefix("torch."): t
    for t in (
        torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32,
        torch.int64, torch.bool, torch.complex64, torch.complex128,
    )
}  # fmt: skip
FORMATS: dict[str, torch.memory_format] = {
    str(f).removeprefix("torch."): f
    for f in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}
WEIGHTED = ("Linear", "Bilinear", "Embedding", "LSTM", "GRU", "RNN", *(f"Conv{d}d" for d in (1, 2, 3)))
FORMS = frozenset(f"fw_{at}" for at in ACTIVATIONS)  # what a form is called on its module
MAKERS = """
    zeros ones full empty new_zeros new_ones new_full new_empty eye arange linspace expand repeat tile empty_permuted
    broadcast_to one_hot tril_indices triu_indices constant_pad_nd repeat_interleave pad
"""
FACTORIES = frozenset(MAKERS.split())
SQUARES = frozenset(("eye", "tril_indices", "triu_indices"))  # rows by columns, each a number of its own


# --- writing ----------------------------------------------------------------------------------------------------------


def wiring_data(wired: Wired) -> dict[str, Any]:
    """A wired network as JSON-able data: its modules in order, its own tensors, inputs, steps, output, conditions.

    Raises:
        FormatError: a layer in it is of a type that a file cannot name.
    """
    wiring = wired.wiring
    return {
        "modules": _modules(wired),
        "own": _own(wired),
        "inputs": [_input_data(given) for given in wiring.inputs],
        "args": [_data(a, 0) for a in wiring.args],
        "kwargs": {k: _data(v, 0) for k, v in wiring.kwargs.items()},
        "names": list(wiring.names),
        "steps": [_step_data(step, len(wiring.inputs) + i) for i, step in enumerate(wiring.steps)],
        "output": _data(wiring.output, len(wiring.inputs) + len(wiring.steps), exact=True),
        "conditions": [_condition_data(c) for c in wiring.conditions],
        **({"required": list(wiring.required)} if wiring.required else {}),
        **({"evaluating": list(wiring.evaluating)} if wiring.evaluating else {}),
    }


def _modules(wired: Wired) -> dict[str, Any]:
    """Every module by path: 0 for one that only holds others, a layer's description, or where it is the same as."""
    found: dict[str, Any] = {}
    first: dict[int, str] = {}
    layers: set[str] = set()
    for path, module in own_modules(wired, remove_duplicate=False):
        if not path:
            continue
        if path.rpartition(".")[0] in layers:  # what is inside of a layer, or of a module that stood before, is said
            layers.add(path)
            continue
        earlier = first.setdefault(id(module), path)
        if earlier != path:
            found[path] = {"same": earlier}
            layers.add(path)
        elif isinstance(module, Place):
            found[path] = 0
        else:
            found[path] = layer_spec(module)
            layers.add(path)
    check_entries(found.values())
    return found


def _own(wired: Wired) -> dict[str, str]:
    """The tensors that stand outside of layers: "p" a parameter, "b" a buffer, "n" a buffer not in the state dict."""
    found: dict[str, str] = {}
    for path, module in own_modules(wired):
        if isinstance(module, (Place, Wired)):
            prefix = f"{path}." if path else ""
            found |= {prefix + name: "p" for name, p in module._parameters.items() if p is not None}
            hidden = module._non_persistent_buffers_set
            found |= {
                prefix + name: "n" if name in hidden else "b" for name, b in module._buffers.items() if b is not None
            }
    return found


def hidden_tensors(wired: Wired) -> dict[str, Tensor]:
    """The tensors that are in no state dict: buffers declared so, and constants of the code."""
    return {name: wired.get_buffer(name) for name, kind in _own(wired).items() if kind == "n"}


def _input_data(given: Input) -> list[Any]:
    return [str(given.dtype).removeprefix("torch."), list(given.shape), list(given.free), given.low, given.high]


def _step_data(step: Step, number: int) -> list[Any]:
    args = [_data(a, number) for a in step.args]
    kwargs = {k: _data(v, number) for k, v in step.kwargs}
    return [step.target, args, kwargs] if kwargs else [step.target, args]


def _data(value: Any, number: int, exact: bool = False) -> Any:  # noqa: PLR0911 - one straight table
    match value:
        case Ref():
            return {"r": number - value.number}
        case Held():
            return {"w": value.name}
        case Training():
            return {"training": 1}
        case Device():
            return {"device": 1}
        case torch.dtype():
            return {"dtype": str(value).removeprefix("torch.")}
        case torch.memory_format():
            return {"format": str(value).removeprefix("torch.")}
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case Fields():
            return {"fields": {k: _data(v, number, exact) for k, v in zip(value.names, value, strict=True)}}
        case dict():
            kind = "outputs" if isinstance(value, Outputs) else "dict"
            return {kind: {str(k): _data(v, number, exact) for k, v in value.items()}}
        case tuple() if exact:
            return {"tuple": [_data(v, number, exact) for v in value]}
        case tuple() | list():
            return [_data(v, number, exact) for v in value]
        case None | bool() | int() | float() | str():
            return value
    raise FormatError(f"the network's code holds a {type(value).__name__}, which a file cannot hold")


def _condition_data(condition: Any) -> Any:
    return [_condition_data(c) for c in condition] if isinstance(condition, tuple) else condition


# --- reading ----------------------------------------------------------------------------------------------------------


def wired_from(data: Mapping[str, Any], shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> Wired:
    """The network that `wiring_data` described, its tensors without contents (on the meta device).

    Args:
        shapes: shape and type of every tensor of the file, by name.

    Raises:
        FormatError: the data describe no network that a file may hold.
    """
    modules, own = _part(data, "modules", dict), _part(data, "own", dict)
    if sum(count_layers(spec) for spec in modules.values()) > MOST_LAYERS:
        raise FormatError(f"the file describes more than the {MOST_LAYERS} layers that a file may")
    check_entries(modules.values())
    wired = Wired(wiring_from(data))
    made: dict[str, nn.Module] = {}
    shared: set[str] = set()
    owners = {name.rpartition(".")[0] for name in shapes}
    for path, spec in modules.items():
        if isinstance(spec, dict) and spec.get("type") in WEIGHTED and path not in owners:
            raise FormatError(f"the file describes {shown(path)}, a layer with tensors, and holds none of them")
    with torch.device("meta"):
        for path, spec in modules.items():
            made[path] = _built(_path(path), spec, made, shared)
            _holder(wired, path).add_module(path.rpartition(".")[2], made[path])
        for name, kind in own.items():
            _give(wired, name, kind, shapes)
    _measure(wired, {})
    check_calls(wired, forms=False)
    return wired


def check_calls(wired: Wired, *, forms: bool = True) -> None:
    """Checks that every layer and tensor that the steps use is there, and every form once forms are attached.

    Raises:
        FormatError: one is not.
    """
    modules = dict(wired.named_modules(remove_duplicate=False))
    tensors = {name for name, _ in wired.named_parameters(remove_duplicate=False)}
    tensors |= {name for name, _ in wired.named_buffers(remove_duplicate=False)}
    for step in wired.wiring.steps:
        path = step.target.removeprefix("@")
        waits = not forms and path.rpartition(".")[2] in FORMS
        if path != step.target and not waits and isinstance(modules.get(path), (Place, Wired, type(None))):
            raise FormatError(f"the network calls the layer {shown(path)}, which the file does not describe")
    for path in wired.wiring.evaluating:
        if path not in modules:
            raise FormatError(f"the network keeps {shown(path)} in evaluation mode, which the file does not describe")
    for name in held_names((*wired.wiring.steps, wired.wiring.output)):
        if name not in tensors:
            raise FormatError(f"the network uses a tensor {shown(name)}, which is not there")


def held_names(value: Any) -> Iterator[str]:
    """The names of the tensors in steps, arguments or outputs."""
    if isinstance(value, Held):
        yield value.name
    elif isinstance(value, Step):
        yield from held_names((value.args, tuple(v for _, v in value.kwargs)))
    elif isinstance(value, (tuple, list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from held_names(inner)


def _measure(module: nn.Module, known: dict[int, tuple[int, int]], depth: int = 0) -> tuple[int, int]:
    """Modules and tensors at every path below a module, and how deep they lie; places may share others.

    Raises:
        FormatError: they are too many, or too deep, to be walked.
    """
    size, height = known.get(id(module), (0, 0))
    if not size and depth <= DEEPEST_MODULE:
        size = 1 + len(module._parameters) + len(module._buffers)
        for inner in module._modules.values():
            if inner is not None:
                below, deeper = _measure(inner, known, depth + 1)
                size, height = size + below, max(height, deeper + 1)
        known[id(module)] = (size, height)
    if size > MOST or depth + height > DEEPEST_MODULE:
        raise FormatError(
            f"the file describes more than {MOST} modules and tensors, or modules more than {DEEPEST_MODULE} deep"
        )
    return size, height


def _part(data: Mapping[str, Any], key: str, kind: type) -> Any:
    found = data.get(key)
    if not isinstance(found, kind) or (isinstance(found, (list, dict)) and len(found) > MOST):
        raise FormatError(f"the description of the network is corrupt: its {key} are missing, or too many")
    return found


def _built(path: str, spec: Any, made: Mapping[str, nn.Module], shared: set[str]) -> nn.Module:
    """The module for a path; what stands at two paths is complete from then on, so that nothing contains itself."""
    steps = path.split(".")
    if any(".".join(steps[:end]) in shared for end in range(1, len(steps))):
        raise FormatError(f"the file puts {shown(path)} into a module that already stands at several paths")
    if _whole(spec) and spec == 0:
        return Place()
    if not isinstance(spec, dict):
        raise FormatError(f"the file describes {shown(path)} as {shown(spec)}, which is no layer")
    if "same" not in spec:
        return build_layer(spec)
    first = spec["same"]
    if not isinstance(first, str) or first not in made or path.startswith(f"{first}."):
        raise FormatError(f"the file says that {shown(path)} is the layer {shown(first)}, which is none before")
    shared |= {path, first}
    return made[first]


def _path(path: Any) -> str:
    # "parametrizations" is a place like any other where a model's own weights were computed from several (weight norm)
    inner = path.replace(".parametrizations.", ".").removesuffix(".parametrizations") if isinstance(path, str) else ""
    if not isinstance(path, str) or path.count(".") >= DEEPEST_MODULE or not all(map(plain_name, inner.split("."))):
        raise FormatError(f"the file names {shown(path)}, which is no path of a module or tensor")
    return path


def _holder(wired: Wired, path: str) -> nn.Module:
    parent, _, name = path.rpartition(".")
    try:
        holder = wired.get_submodule(parent)
    except AttributeError:
        raise FormatError(f"the file puts {shown(path)} into {shown(parent)}, which it does not describe") from None
    if not isinstance(holder, (Place, Wired)):
        raise FormatError(f"the file puts {shown(path)} into a layer")
    if hasattr(holder, name) or name == "wiring":
        raise FormatError(f"the file gives the name {shown(path)} twice, or to something that every module has")
    return holder


def _give(wired: Wired, name: str, kind: Any, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    holder, leaf = _holder(wired, _path(name)), name.rpartition(".")[2]
    if name not in shapes or kind not in ("p", "b", "n"):
        raise FormatError(f"the file says that the network has a tensor {shown(name)}, and holds none")
    shape, dtype = shapes[name]
    blank = torch.empty(shape, dtype=dtype, device="meta")
    if kind == "p":
        floating = blank.is_floating_point() or blank.is_complex()
        holder.register_parameter(leaf, nn.Parameter(blank, requires_grad=floating))
    else:
        holder.register_buffer(leaf, blank, persistent=kind == "b")


def wiring_from(data: Mapping[str, Any]) -> Wiring:
    """The wiring in the data of a network, checked but for the layers and tensors that it uses (`check_calls`).

    Raises:
        FormatError: it refers to results that are not there, or calls what no file may call.
    """
    inputs = tuple(_input_from(given) for given in _part(data, "inputs", list))
    read = _Reader()
    names = tuple(_word(n) for n in _part(data, "names", list))
    steps = tuple(read.step(s, len(inputs) + i) for i, s in enumerate(_part(data, "steps", list)))
    conditions = tuple(_condition_from(c, inputs) for c in _part(data, "conditions", list))
    args = tuple(read.given(a, len(inputs)) for a in _part(data, "args", list))
    kwargs = {_word(k): read.given(v, len(inputs)) for k, v in _part(data, "kwargs", dict).items()}
    if len(args) > len(names):
        raise FormatError("the description of the network is corrupt: it has more arguments than names for them")
    if len(set(names)) != len(names) or not kwargs.keys().isdisjoint(names[: len(args)]):
        raise FormatError("the description of the network is corrupt: an argument is named twice")
    if sorted(refs((args, kwargs))) != list(range(len(inputs))):
        raise FormatError("the description of the network is corrupt: an input is no argument, or several")
    output = read.value(data.get("output"), len(inputs) + len(steps))
    optional: Mapping[str, Any] = {"required": [], "evaluating": []} | dict(data)
    required = tuple(_word(name) for name in _part(optional, "required", list))
    evaluating = tuple(_path(path) for path in _part(optional, "evaluating", list))
    return Wiring(inputs, args, kwargs, names, steps, output, conditions, required, evaluating)


def _word(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier() or len(name) > 128:
        raise FormatError(f"the description of the network is corrupt: {shown(name)} is no name of an argument")
    return name


def _input_from(data: Any) -> Input:
    fits = isinstance(data, list) and len(data) == 5 and isinstance(data[0], str) and data[0] in DTYPES
    if not fits or not all(_whole_list(part) for part in data[1:3]) or not all(map(_whole, data[3:])):
        raise FormatError("the description of the network is corrupt: an input")
    dtype, shape, free, low, high = data
    if not all(0 <= d < len(shape) for d in free) or not all(0 <= n <= LARGEST for n in shape) or low > high:
        raise FormatError("the description of the network is corrupt: the sizes of an input")
    if math.prod(shape) > LARGEST or len(shape) > 32 or max(abs(low), abs(high)) >= 1 << 62:
        raise FormatError("the description of the network is corrupt: an input is too large")
    return Input(DTYPES[dtype], tuple(shape), tuple(free), low, high)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_whole, value))


def _condition_from(data: Any, inputs: tuple[Input, ...], depth: int = 0) -> Any:
    if isinstance(data, (bool, int, float)) and depth:
        return data
    if not isinstance(data, list) or not data or depth > DEEPEST or len(data) > 8:
        raise FormatError("the description of the network is corrupt: a condition on sizes")
    name, *rest = data
    if name == "size":
        if len(rest) != 2 or not all(map(_whole, rest)) or not 0 <= rest[0] < len(inputs):
            raise FormatError("the description of the network is corrupt: a condition on a size")
        if not 0 <= rest[1] < len(inputs[rest[0]].shape):
            raise FormatError("the description of the network is corrupt: a condition on a size that no input has")
        return ("size", *rest)
    if not isinstance(name, str) or name not in CONDITIONS or not arity(name)[0] <= len(rest) <= arity(name)[1]:
        raise FormatError(f"the description of the network is corrupt: a condition with {shown(name)}")
    return (name, *(_condition_from(inner, inputs, depth + 1) for inner in rest))


CONDITIONS = frozenset(SIZES) - {"size", "item", "ite"}


class _Reader:
    """Reads arguments; counts what it read, so that a small file cannot describe endless ones."""

    def __init__(self) -> None:
        self.left = 64 * MOST

    def step(self, data: Any, number: int) -> Step:
        """One step, which may use the results before it."""
        if not isinstance(data, list) or len(data) not in (2, 3) or not isinstance(data[0], str):
            raise FormatError("the description of the network is corrupt: a step")
        target, args = data[0], data[1]
        kwargs = data[2] if len(data) == 3 else {}
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise FormatError("the description of the network is corrupt: the arguments of a step")
        if target.startswith("@"):
            _form_or_path(target[1:])
        else:
            _fits(target, args, kwargs)
        found = tuple(self.value(a, number) for a in args)
        return Step(target, found, tuple((_word(k), self.value(v, number)) for k, v in kwargs.items()))

    def given(self, data: Any, inputs: int) -> Any:
        """A pattern of the call: the inputs are counted from the first."""
        if isinstance(data, dict) and set(data) == {"r"}:
            if not _whole(data["r"]) or not 0 <= -data["r"] < inputs:
                raise FormatError("the description of the network is corrupt: an argument is an input that is none")
            return Ref(-data["r"])
        if isinstance(data, dict) and set(data) == {"dict"} and isinstance(data["dict"], dict):
            return {k: self.given(v, inputs) for k, v in data["dict"].items()}
        if isinstance(data, list):
            return [self.given(v, inputs) for v in data]
        return self.value(data, 0)

    def value(self, data: Any, number: int, depth: int = 0) -> Any:  # noqa: PLR0911 - one straight table
        """An argument of the step with this number."""
        self.left -= 1
        if depth > DEEPEST or self.left < 0:
            raise FormatError("the description of the network is corrupt: arguments without end")
        if isinstance(data, list):
            return [self.value(v, number, depth + 1) for v in data]
        if not isinstance(data, dict):
            return _scalar(data)
        if len(data) != 1:
            raise FormatError("the description of the network is corrupt: an argument")
        (kind, held), *_ = data.items()
        if kind in ("outputs", "dict", "tuple", "fields"):
            return self._tree(kind, held, number, depth)
        if kind == "r" and _whole(held) and 1 <= held <= number:
            return Ref(number - held)
        if kind == "w" and isinstance(held, str):
            return Held(held)
        simple: dict[str, Mapping[str, Any]] = {"dtype": DTYPES, "format": FORMATS, "float": NOT_FINITE}
        if kind in simple and isinstance(held, str) and held in simple[kind]:
            return simple[kind][held]
        if kind in ("training", "device"):
            return Training() if kind == "training" else Device()
        raise FormatError(f"the network uses {shown(kind)} {shown(held)}, which is not there")

    def _tree(self, kind: str, held: Any, number: int, depth: int) -> Any:
        if kind == "tuple" and isinstance(held, list):
            return tuple(self.value(v, number, depth + 1) for v in held)
        if kind == "fields" and isinstance(held, dict):
            return Fields(map(_word, held), [self.value(v, number, depth + 1) for v in held.values()])
        if kind != "tuple" and isinstance(held, dict):
            make: Callable[[Any], Any] = Outputs if kind == "outputs" else dict
            return make((k, self.value(v, number, depth + 1)) for k, v in held.items())
        raise FormatError("the description of the network is corrupt: what it returns")


NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _form_or_path(path: str) -> None:
    parent, _, name = path.rpartition(".")
    if name not in FORMS:
        _path(path)
    elif parent:
        _path(parent)


def _scalar(value: Any) -> Any:
    if isinstance(value, str) and len(value) <= 256:
        return value
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 1 << 63):
        return value
    raise FormatError("the description of the network is corrupt: a number or word that is too large")


def _fits(target: str, args: list[Any], kwargs: Mapping[str, Any]) -> None:
    """Checks plain arguments against what the operator takes, and that plain numbers make no endless tensor."""
    types = schema_types(target)
    if types is None:
        fewest, most = arity(target.partition(".")[2])
        if kwargs or not fewest <= len(args) <= most:
            raise FormatError(f"{target} with {len(args)} arguments, which it does not take")
        for value in args:
            if not isinstance(value, (int, float, dict)):
                raise FormatError(f"{target} of {shown(value)}, which is no number")
        return
    named = {name: kind for name, kind, _ in types}
    if len(args) > len(types) or not set(kwargs) <= set(named):
        raise FormatError(f"{target} with arguments that it does not have")
    given = {**{name: a for (name, _, _), a in zip(types, args, strict=False)}, **kwargs}
    for name, _, optional in types:
        if name not in given and not optional:
            raise FormatError(f"{target} without its argument {name}")
    for name, value in given.items():
        if not _suits(value, named[name]):
            raise FormatError(f"{target} with {shown(value)} for {name}, which takes {named[name]}")
    maker = target.split(".")[1]
    if maker in FACTORIES:
        for size in _asked(maker, given):
            if not size <= LARGEST:
                raise FormatError(f"{target} of {shown(size)} elements: more than a file may ask for")


def _asked(maker: str, given: Mapping[str, Any]) -> Iterator[float]:
    """How many elements an operator that makes tensors is asked for, by each of its plain numbers and lists."""
    sizes = {k: v for k, v in given.items() if k not in ("fill_value", "value") and not isinstance(v, bool)}
    least = 1 if "pad" in maker else 0  # what is added to a dimension of its own; a size of zero leaves nothing
    for value in sizes.values():
        if isinstance(value, list):
            yield math.prod(max(least, abs(n)) for n in value if _whole(n))
        elif isinstance(value, int) or (isinstance(value, float) and maker == "arange"):
            yield abs(value)
    plain = [v for v in sizes.values() if isinstance(v, (int, float))]
    if maker in SQUARES:
        yield math.prod(abs(n) for n in plain[:2])
    step = sizes.get("step", 1)
    if maker == "arange" and isinstance(step, (int, float)) and step:
        yield sum(abs(sizes[k]) for k in ("start", "end") if isinstance(sizes.get(k), (int, float))) / abs(step)


SUITS: tuple[tuple[str, type | tuple[type, ...]], ...] = (
    ("Tensor", (int, float)),  # a plain number may stand beside a tensor
    ("bool", bool),
    ("str", str),
    ("float", (int, float)),
    ("number", (int, float)),
    ("int", int),
)


# What only an object of one key can be; as a plain number, or as a result of another step, torch may not survive it.
OBJECTS = {"ScalarType": "dtype", "MemoryFormat": "format", "Device": "device"}
# The keys of objects that may stand for anything else.
VALUES = frozenset({"r", "w", "training", "float"})


def _suits(value: Any, kind: str) -> bool:
    """Whether an argument is of the kind that an operator takes; what a step made may be any tensor or number."""
    if kind.startswith("Optional["):
        return value is None or _suits(value, kind[9:-1])
    if isinstance(value, dict):
        return value.keys() == {OBJECTS[kind]} if kind in OBJECTS else value.keys() <= VALUES
    if kind.startswith("List["):
        return (isinstance(value, list) and all(_suits(v, kind[5:-1]) for v in value)) or _suits(value, kind[5:-1])
    return any(kind == name and isinstance(value, types) for name, types in SUITS)
