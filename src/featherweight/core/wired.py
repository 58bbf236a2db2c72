"""A network without its class: ordinary layers at their old names, and between them wiring that is data.

`Wired` runs a list of steps. A step calls a layer, or an operator from the table in `operators`, on results of earlier
steps, tensors of the network, and plain numbers. Nothing in it is ever evaluated, imported or unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import traceback
from torch.utils import _pytree as pytree

from featherweight.core.operators import function, schema_types
from featherweight.core.sizes import evaluate_size, told
from featherweight.errors import BadData

Slot = tuple[int, int | str, int | None]
"""Where a number stands in a wiring: the step, the argument by position or name, the place within a list there."""


@dataclass(frozen=True)
class Ref:
    """The result with this number: inputs come first, then one for each step."""

    number: int


@dataclass(frozen=True)
class Held:
    """A parameter or buffer of the network, by name."""

    name: str


@dataclass(frozen=True)
class Training:
    """Whether the network is being trained, where the code that was traced asked for it."""


@dataclass(frozen=True)
class Device:
    """Where the network is."""


@dataclass(frozen=True)
class Step:
    """One call: of the layer at a path ("@encoder.fc1"), or of an operator ("aten.add.Tensor", "size.mul")."""

    target: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Input:
    """A tensor that the network takes: its type, the sizes it was traced with, and which of them may differ.

    `low` and `high` bound the values that the traced example had, for integers, so that an example can be made anew.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    free: tuple[int, ...] = ()
    low: int = 0
    high: int = 1


@dataclass(frozen=True)
class Wiring:
    """What `Wired` runs.

    Attributes:
        inputs: the tensors that it takes, in order.
        args, kwargs: the call as it was traced; tensors stand as `Ref`, everything else as it was.
        names: the names of the positional arguments, so that each may also be given by name.
        steps: the calls, in order.
        output: what comes back: `Ref`s in tuples, lists, dictionaries.
        conditions: on the sizes of inputs, as nested ("eq", ("size", input, dim), 3); where they fail, the trace does
            not hold.
        required: arguments without a tensor that were traced with another value than the class's default.
        evaluating: modules that stay in evaluation mode when the network trains.
    """

    inputs: tuple[Input, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    names: tuple[str, ...]
    steps: tuple[Step, ...]
    output: Any
    conditions: tuple[Any, ...] = ()
    required: tuple[str, ...] = ()
    evaluating: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Wiring:
        return self  # nothing in it ever changes

    def example(self, batch: int | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments that the network takes, made anew: normal, or integers in their bounds."""
        generator = torch.Generator().manual_seed(0)

        def make(given: Input) -> Tensor:
            first = batch if batch is not None and 0 in given.free else None
            shape = (first, *given.shape[1:]) if first is not None else given.shape
            if given.dtype.is_floating_point:
                return torch.randn(shape, generator=generator).to(given.dtype)
            return torch.randint(given.low, given.high + 1, shape, generator=generator).to(given.dtype)

        tensors = [make(given) for given in self.inputs]
        return _filled((self.args, dict(self.kwargs)), tensors)


class Outputs(dict[str, Any]):
    """Named outputs: by key, by attribute, or by position (as the output classes of transformers are)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the network returns {', '.join(self)}, no {name}") from None

    def __getitem__(self, key: Any) -> Any:
        return tuple(self.values())[key] if isinstance(key, (int, slice)) else super().__getitem__(key)


pytree.register_pytree_node(
    Outputs,
    lambda outputs: (list(outputs.values()), list(outputs)),
    lambda values, names: Outputs(zip(names, values, strict=True)),
    serialized_type_name="featherweight.Outputs",
    flatten_with_keys_fn=lambda outputs: ([(pytree.MappingKey(k), v) for k, v in outputs.items()], list(outputs)),
)


class Fields(tuple[Any, ...]):
    """Outputs with names that are a tuple: what a named tuple was."""

    names: tuple[str, ...]

    def __new__(cls, names: Iterable[str], values: Iterable[Any]) -> Fields:
        made = super().__new__(cls, values)
        made.names = tuple(names)
        return made

    def __getattr__(self, name: str) -> Any:
        names = self.__dict__.get("names", ())
        if name in names:
            return self[names.index(name)]
        raise AttributeError(f"the network returns {', '.join(names)}, no {name}")

    def __reduce__(self) -> Any:
        return Fields, (self.names, tuple(self))


pytree.register_pytree_node(
    Fields,
    lambda fields: (list(fields), list(fields.names)),
    lambda values, names: Fields(names, values),
    serialized_type_name="featherweight.Fields",
    flatten_with_keys_fn=lambda fields: (
        [(pytree.GetAttrKey(k), v) for k, v in zip(fields.names, fields, strict=True)],
        list(fields.names),
    ),
)


class Place(nn.Module):
    """A module that only holds others, and tensors: where the class had code, the wiring has it now."""


class Results(list[Any]):
    """The results of the steps so far, None where nothing needs them any more; and where the inputs were."""

    device: torch.device


class Wired(nn.Module):
    """A network whose wiring is data. Its layers are ordinary modules at the names they had.

    Train and evaluation mode, devices, hooks on layers, `state_dict` work as ever. What the traced code decided in
    evaluation mode by itself (stochastic depth, dropout inside attention) stays as decided.

    Raises:
        BadData: called with other arguments, types or sizes than the wiring holds for.
    """

    wiring: Wiring

    def __init__(self, wiring: Wiring) -> None:
        super().__init__()
        self.wiring = wiring

    def train(self, mode: bool = True) -> Wired:
        """Sets training or evaluation mode; what the class kept in evaluation mode stays there."""
        super().train(mode)
        for path in self.wiring.evaluating:
            self.get_submodule(path).training = False
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the steps on what was given."""
        values = Results(self.given(args, kwargs))
        values.device = next((v.device for v in values), torch.device("cpu"))
        plan = self._plan()
        marked = traceback.has_preserved_node_meta()
        for number, (run, spent) in enumerate(plan.steps):
            with traceback.annotate({"step": number}) if marked else NOTHING:
                values.append(run(self, values))
            for last in spent:
                values[last] = None
        return plan.output(self, values)

    def _plan(self) -> Plan:
        """The wiring made ready to run, anew where it changed."""
        plan: Plan | None = self.__dict__.get("_planned")
        if plan is None or plan.wiring is not self.wiring:
            plan = self.__dict__["_planned"] = planned(self.wiring)
        return plan

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_planned"}

    def positional(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with every argument that has a place in its place; what was left out before it is None."""
        names = self.wiring.names
        last = max((names.index(name) + 1 for name in kwargs if name in names), default=len(args))
        traced = {name: value for name, value in zip(names, self.wiring.args, strict=False) if not has_refs(value)}
        traced |= {name: value for name, value in self.wiring.kwargs.items() if not has_refs(value)}
        placed = (*args, *(kwargs.get(name, traced.get(name)) for name in names[len(args) : last]))
        return placed, {name: value for name, value in kwargs.items() if name not in names}

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors among the arguments in order, checked."""
        wiring = self.wiring
        if len(args) > len(wiring.names):
            raise BadData(f"{len(args)} positional arguments given, the network takes {', '.join(wiring.names)}")
        named = {**dict(zip(wiring.names, args, strict=False)), **kwargs}
        if twice := [name for name in wiring.names[: len(args)] if name in kwargs]:
            raise BadData(f"argument {twice[0]!r} given by place and by name: give it once")
        wanted = {**dict(zip(wiring.names, wiring.args, strict=False)), **wiring.kwargs}
        for name, value in named.items():
            if name not in wanted and value is not None:
                raise BadData(f"argument {name!r} given, the network was traced with {', '.join(wanted)}")
        tensors: list[Any] = [None] * len(wiring.inputs)
        for name, pattern in wanted.items():
            needed = name in wiring.required or any(isinstance(leaf, Ref) for leaf in pytree.tree_leaves(pattern))
            if name not in named and needed:
                raise BadData(f"argument {name!r} is missing: the network was traced with {', '.join(wanted)}")
            _matched(pattern, named.get(name, pattern), name, tensors)
        sizes = [check_input(wiring.inputs[i], t, i) for i, t in enumerate(tensors)]
        for condition in wiring.conditions:
            if not evaluate_size(condition, sizes):
                raise BadData(
                    f"inputs of the sizes {[tuple(s) for s in sizes]}: the network was traced where {told(condition)}; "
                    "trace it anew with inputs of such sizes"
                )
        return tensors

    def number_at(self, step: int, argument: int | str, at: int | None) -> Any:
        """What stands at an argument of a step, or at a place of the list there; None if nothing does."""
        args, kwargs, key = self._slot(step, argument)
        value = args[key] if isinstance(key, int) else kwargs.get(key)
        if at is None:
            return value
        return value[at] if isinstance(value, (tuple, list)) and at < len(value) else None

    def factors_at(self, place: Slot) -> list[tuple[Slot | None, Any]]:
        """The factors of a size that is a product, in the order they are multiplied: where each number stands, and it.

        None and the reference for what is no number of the wiring.
        """
        value = self.number_at(*place)
        if isinstance(value, int):
            return [(place, value)]
        number = value.number - len(self.wiring.inputs) if isinstance(value, Ref) else -1
        if number < 0 or self.wiring.steps[number].target != "size.mul":
            return [(None, value)]
        return [*self.factors_at((number, 0, None)), *self.factors_at((number, 1, None))]

    def resized(self, changes: Mapping[Slot, int]) -> Wiring:
        """The wiring with other numbers at (step, argument, place within a list or None)."""
        steps = list(self.wiring.steps)
        made = Wired(self.wiring)
        for (number, argument, at), value in changes.items():
            args, kwargs, key = made._slot(number, argument)
            if isinstance(key, int):
                args = (*args[:key], _put(args[key], at, value), *args[key + 1 :])
            else:
                kwargs[key] = _put(kwargs[key], at, value)
            steps[number] = replace(steps[number], args=args, kwargs=tuple(kwargs.items()))
            made.wiring = replace(self.wiring, steps=tuple(steps))
        return made.wiring

    def _slot(self, number: int, argument: int | str) -> tuple[tuple[Any, ...], dict[str, Any], int | str]:
        """The arguments of a step, and where the one at a position or of a name stands among them."""
        step = self.wiring.steps[number]
        names = [name for name, *_ in schema_types(step.target) or ()]
        name = names[argument] if isinstance(argument, int) and argument < len(names) else argument
        place = names.index(name) if name in names else argument
        key = place if isinstance(place, int) and place < len(step.args) else name
        return step.args, dict(step.kwargs), key


Make = Callable[[Wired, Results], Any]
NOTHING = nullcontext()


@dataclass(frozen=True)
class Plan:
    """A wiring as functions: for each step what runs it, and the results that nothing needs after it."""

    wiring: Wiring
    steps: tuple[tuple[Make, list[int]], ...]
    output: Make

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self  # nothing in it ever changes


def planned(wiring: Wiring) -> Plan:
    """Makes a wiring ready to run."""
    runs = [_runner(step) for step in wiring.steps]
    return Plan(wiring, tuple(zip(runs, spent(wiring), strict=True)), _maker(wiring.output))


def _runner(step: Step) -> Make:
    args = [_maker(a) for a in step.args]
    kwargs = {name: _maker(value) for name, value in step.kwargs}
    if step.target[0] == "@":
        path = step.target[1:].split(".")

        def layer(net: Wired, values: Results) -> Any:
            return _at(net, path)(*[make(net, values) for make in args])

        return layer
    called = function(step.target)

    def operator(net: Wired, values: Results) -> Any:
        given = {name: make(net, values) for name, make in kwargs.items()}
        return called(*[make(net, values) for make in args], **given)

    return operator


def _at(net: nn.Module, path: Sequence[str]) -> Any:
    """The module at a path, looked up every time: layers may be exchanged."""
    found: Any = net
    for name in path:
        found = found._modules[name]
    return found


def _maker(value: Any) -> Make:  # noqa: PLR0911 - one straight table
    """What makes an argument from the results so far."""
    match value:
        case Ref():
            number = value.number
            return lambda net, values: values[number]
        case Held():
            *path, leaf = value.name.split(".")
            return lambda net, values: getattr(_at(net, path), leaf)
        case Training():
            return lambda net, values: net.training
        case Device():
            return lambda net, values: values.device
        case Fields():
            names, makers = value.names, [_maker(v) for v in value]
            return lambda net, values: Fields(names, [make(net, values) for make in makers])
        case dict():
            named, kind = {k: _maker(v) for k, v in value.items()}, type(value)
            return lambda net, values: kind((k, make(net, values)) for k, make in named.items())
        case tuple() | list():
            parts, sequence = [_maker(v) for v in value], type(value)
            return lambda net, values: sequence([make(net, values) for make in parts])
    return lambda net, values: value


def _put(value: Any, at: int | None, number: int) -> Any:
    return number if at is None else type(value)(number if i == at else v for i, v in enumerate(value))


def refs(value: Any) -> Iterator[int]:
    """The numbers of the results that a value is made from."""
    if isinstance(value, Ref):
        yield value.number
    elif isinstance(value, dict):
        for inner in value.values():
            yield from refs(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from refs(inner)


def has_refs(value: Any) -> bool:
    """Whether a value is made from results or inputs."""
    return next(refs(value), None) is not None


def spent(wiring: Wiring) -> list[list[int]]:
    """For each step, the results that are not needed after it."""
    last: dict[int, int] = {}
    for number, step in enumerate(wiring.steps):
        for ref in (*refs(step.args), *refs(tuple(v for _, v in step.kwargs))):
            last[ref] = number
        last.setdefault(len(wiring.inputs) + number, number)
    kept = set(refs(wiring.output))
    found: list[list[int]] = [[] for _ in wiring.steps]
    for ref, number in last.items():
        if ref not in kept:
            found[number].append(ref)
    return found


def _filled(pattern: Any, tensors: Sequence[Any]) -> Any:
    """A call with its tensors in place."""
    if isinstance(pattern, Ref):
        return tensors[pattern.number]
    if isinstance(pattern, dict):
        return {k: _filled(v, tensors) for k, v in pattern.items()}
    if isinstance(pattern, (tuple, list)):
        return type(pattern)(_filled(v, tensors) for v in pattern)
    return pattern


def _matched(pattern: Any, given: Any, name: str, tensors: list[Any]) -> None:
    """Puts the tensors of an argument where the wiring wants them."""
    if isinstance(pattern, Ref):
        if not isinstance(given, Tensor):
            raise BadData(f"{name} is a {type(given).__name__}: the network was traced with a tensor there")
        tensors[pattern.number] = given
    elif isinstance(pattern, dict) and hasattr(given, "keys") and set(pattern) == set(given.keys()):
        for key, inner in pattern.items():
            _matched(inner, given[key], f"{name}[{key!r}]", tensors)
    elif isinstance(pattern, (tuple, list)) and isinstance(given, (tuple, list)) and len(pattern) == len(given):
        for i, inner in enumerate(pattern):
            _matched(inner, given[i], f"{name}[{i}]", tensors)
    elif isinstance(given, Tensor) or given != pattern:
        shown = type(given).__name__ if isinstance(given, Tensor) else repr(given)
        raise BadData(f"{name} is {shown}: the network was traced with {pattern!r} there, and only holds for that")


def _kind(dtype: torch.dtype) -> str:
    """Which of these a type is: its numbers are boolean, whole, real or complex."""
    if dtype == torch.bool:
        return "boolean"
    return "real" if dtype.is_floating_point else "complex" if dtype.is_complex else "whole"


def check_input(wanted: Input, given: Tensor, number: int) -> Sequence[Any]:
    """The sizes of an input.

    Raises:
        BadData: it has another number of dimensions, another kind of numbers, or other sizes where they are fixed.
    """
    kinds = _kind(wanted.dtype), _kind(given.dtype)
    fixed = [d for d in range(len(wanted.shape)) if d not in wanted.free]
    fits = given.dim() == len(wanted.shape) and all(given.shape[d] == wanted.shape[d] for d in fixed)
    if kinds[0] != kinds[1] or not fits:
        shape = ", ".join("any" if d in wanted.free else str(n) for d, n in enumerate(wanted.shape))
        raise BadData(
            f"input {number} is {given.dtype} of shape {tuple(given.shape)}: the network takes {wanted.dtype} ({shape})"
        )
    return given.shape
