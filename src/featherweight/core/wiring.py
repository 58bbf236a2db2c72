"""From a model to a network without its class: `wire` traces the model and writes its calls down as data.

Layers that torch has are called as layers; what the model's own code does becomes calls to operators. Sizes of inputs
stay free where the model allows it: the graph is traced with symbolic sizes, and what it then does is compared with the
model at other sizes. Conditions on sizes under which the trace was made, and that no comparison has shown to be without
effect, are kept and checked at every call.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export._tree_utils import reorder_kwargs
from torch.utils import _pytree as pytree

from featherweight.core.example import smaller
from featherweight.core.forms import ACTIVATIONS, Form, activation_form, activation_forms, bake, form_names, own_modules
from featherweight.core.layers import TYPES
from featherweight.core.ledger import note
from featherweight.core.opaque import NAME, Recurrent, opaque_layers
from featherweight.core.operators import CHECKS, target_name
from featherweight.core.recurrent import SharedRecurrent, has_cell
from featherweight.core.rewiring import renumbered
from featherweight.core.sizes import evaluate_size, expression, independent
from featherweight.core.task import as_call, device_of, eval_mode, to_device
from featherweight.core.trace import by_name, graph_inputs, operator_name, trace, uncached, weight_tensors
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
    has_refs,
    refs,
)
from featherweight.errors import FeatherweightError, TraceError

SECONDS = 12.0  # that tracing with every size symbolic may take; beyond it only the batch is
SMALL = 64  # sizes below this are also tried four and eight times as large
LATE = "tracing with symbolic sizes took longer"
CONDITIONS = 64  # that a wiring may hold
Call = tuple[tuple[Any, ...], dict[str, Any]]
TOLERANCE = 1e-4  # of the largest output, between the model and its wiring


@dataclass(frozen=True)
class Known:
    """What was found for a model of this outline: its wiring and the constants of its code, or why there is none."""

    outline: str
    wiring: Wiring | None = None
    lifted: Mapping[str, Tensor] = field(default_factory=dict)
    why_not: str = ""


_RUN: ContextVar[list[Known] | None] = ContextVar("wirings", default=None)


@contextmanager
def recalling() -> Iterator[None]:
    """A block in which wirings are remembered: tracing is slow, and a chain of methods seldom changes the structure."""
    token = _RUN.set([])
    try:
        yield
    finally:
        _RUN.reset(token)


def wire(model: nn.Module, example_inputs: Any) -> Wired:
    """The same network without its class: ordinary layers at their old names, wiring as data. The model is not changed.

    Args:
        example_inputs: a tensor, a tuple of arguments, or a dictionary of keyword arguments.

    Raises:
        TraceError: the model cannot be traced, calls an operator that a file may not hold, or the wiring does not
            compute what the model does.
    """
    model = copy.deepcopy(model)  # what a model counts or keeps while it runs, it keeps in the copy
    if any(form_names(module) for module in model.modules()):
        model = bake(model)
    if isinstance(model, Wired):
        return model
    given = as_call(to_device(example_inputs, device_of(model)))
    return _again(model, given) or _anew(model, given)


def _anew(model: nn.Module, given: Call) -> Wired:
    """Traces the model with as many free sizes as it allows, and says which it does not."""
    paired = _paired(given)
    failed: list[str] = []
    for shapes in (_free_sizes, _free_batch, _fixed):
        if shapes is _free_sizes and not _accepts(model, paired):
            paired = given
        try:
            program = _traced(model, paired, shapes)
            wired = _checked(model, _Writer(model, program, paired).wired(), paired)
        except FeatherweightError as error:
            failed.append(str(error))
            continue
        if failed:
            kept = "only the batch is free" if shapes is _free_batch else "every size is fixed"
            note(f"in the network without its class {kept}: {failed[0]}")
        _keep(Known(_outline(model, given), wired.wiring, _constants(wired, model)), failed)
        return wired
    _keep(Known(_outline(model, given), why_not=failed[-1]), failed)
    raise TraceError(failed[-1])


def _keep(known: Known, failed: Sequence[str]) -> None:
    """Remembers what was found, unless the clock had a say in it."""
    run = _RUN.get()
    if run is not None and not any(LATE in why for why in failed):
        run.append(known)


def _again(model: nn.Module, given: Call) -> Wired | None:
    """The wiring that was found for a model of this outline earlier in the run, if it still computes the same."""
    outline = _outline(model, given) if _RUN.get() else ""
    known = next((k for k in _RUN.get() or () if k.outline == outline), None)
    if known is None:
        return None
    if known.wiring is None:
        raise TraceError(known.why_not)
    wired = _assembled(model, known.wiring, known.lifted)
    return None if _differs(_run(model, given), wired, given) else wired


def _outline(model: nn.Module, given: Call) -> str:
    """What a model's wiring depends on: kinds and settings of its modules, shapes of its tensors and of the inputs."""
    parts = [f"{path} {type(m).__qualname__} {_settings(m)}" for path, m in model.named_modules()]
    parts += [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in weight_tensors(model).items()]
    parts += [str(getattr(t, "shape", t)) for t in pytree.tree_leaves(given)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _settings(module: nn.Module) -> list[str]:
    """All that a module holds beside tensors, modules and hooks, and the settings of its configuration."""
    own = set(vars(nn.Module())) - {"training"}
    held = {k: v for k, v in vars(module).items() if k not in own and k != "training"}
    config = getattr(module, "config", None)
    told = getattr(config, "__dict__", {})
    return [f"{k}={v!r}" for k, v in (*held.items(), *told.items()) if k != "config"]


def _constants(wired: Wired, model: nn.Module) -> dict[str, Tensor]:
    known = dict(model.named_buffers())
    return {name: tensor for name, tensor in wired.named_buffers() if name not in known and "." not in name}


# --- tracing with free sizes ------------------------------------------------------------------------------------------


def _paired(given: Call) -> Call:
    """The same call with two samples where there was one: a size of one is never taken as free."""
    tensors = [t for t in pytree.tree_leaves(given) if isinstance(t, Tensor) and t.dim() > 0]
    if not tensors or any(t.shape[0] != 1 for t in tensors):
        return given
    return pytree.tree_map(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() > 0 else t, given)


def _accepts(model: nn.Module, given: Call) -> bool:
    try:
        _run(model, given)
    except Exception:  # the user's code may raise anything
        return False
    return True


def _run(model: nn.Module, given: Call) -> Any:
    fresh = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, given)
    with eval_mode(model), uncached(model):
        return model(*fresh[0], **fresh[1])


def _shapes(given: Call, free: Callable[[Tensor], dict[int, Any]]) -> Any:
    args, kwargs = pytree.tree_map(lambda t: free(t) if isinstance(t, Tensor) else None, given)
    return _Shapes(args, kwargs)


@dataclass(frozen=True)
class _Shapes:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _free_sizes(given: Call) -> Any:
    return _shapes(given, lambda t: dict.fromkeys(range(t.dim()), Dim.AUTO))


def _free_batch(given: Call) -> Any:
    return _shapes(given, lambda t: {0: Dim.AUTO} if t.dim() else {})


def _fixed(given: Call) -> Any:
    return None


def _traced(model: nn.Module, given: Call, shapes: Callable[[Call], Any]) -> ExportedProgram:
    # Training mode clears what some modules keep of earlier calls, such as tables made from a weight: the trace would
    # take them for constants. A copy, for what is kept while tracing is of no use to anybody.
    model = copy.deepcopy(model).train()
    # torch marks the tensors that it traces with symbolic sizes, so each trace gets tensors of its own
    fresh = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, given)
    found = shapes(fresh)
    if found is None:
        with opaque_layers(model):
            return trace(model, fresh, gradients=True)
    _imported()
    with limited(SECONDS if shapes is _free_sizes else 10 * SECONDS), opaque_layers(model):
        return trace(model, fresh, dynamic_shapes=by_name(model, found.args, found.kwargs), gradients=True)


def _argument_names(model: nn.Module) -> list[str]:
    if isinstance(model, Wired):
        return list(model.wiring.names)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds]


@cache
def _imported() -> None:
    """Traces once, without a limit: torch imports much on the way, and an import given up half-way stays broken."""
    trace(nn.Linear(2, 2), torch.zeros(2, 2), dynamic_shapes=({0: Dim.AUTO},))


class _Late(BaseException):
    """Not an Exception, so that nobody on the way takes it for one of theirs."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Gives up on a block after so many seconds, where signals can be had (the main thread).

    Raises:
        TraceError: the time was up.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGPROF"):
        yield
        return

    def late(number: int, frame: Any) -> None:
        raise _Late

    before, started = signal.signal(signal.SIGPROF, late), time.process_time()
    left, again = signal.getitimer(signal.ITIMER_PROF)
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.2)  # again and again: one may end up in a finalizer
    try:
        yield
    except _Late:
        raise TraceError(f"{LATE} than {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        if left:  # an alarm that the caller had set
            signal.setitimer(signal.ITIMER_PROF, max(left - (time.process_time() - started), 1e-3), again)


# --- writing the graph down -------------------------------------------------------------------------------------------


@dataclass
class _Writer:
    """Turns a traced program into a wired network."""

    model: nn.Module
    program: ExportedProgram
    given: Call
    numbers: dict[fx.Node, Any] = field(default_factory=dict)  # node -> what stands for it in later arguments
    steps: list[Step] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)
    lifted: dict[str, Tensor] = field(default_factory=dict)
    moods: list[bool] | None = None

    def wired(self) -> Wired:
        args, kwargs = self._placeholders()
        calls, inside = self._calls()
        for node in self._needed():
            if node in calls:
                self._layer(node, calls[node])
            elif node not in inside:
                self._operator(node)
        output = next(n for n in self.program.graph.nodes if n.op == "output")
        leaves = [self._argument(a, output) for a in output.args[0]]
        spec = self.program.call_spec.out_spec
        tree = leaves[0] if spec is None else _told_output(pytree.tree_unflatten(leaves, spec))
        wiring = Wiring(
            inputs=tuple(self.inputs),
            args=args,
            kwargs=kwargs,
            names=tuple(_argument_names(self.model)),
            steps=tuple(self.steps),
            output=tree,
            conditions=self._conditions(),
            required=self._required(args, kwargs),
            evaluating=self._evaluating(),
        )
        return _assembled(self.model, _pruned(_settled(wiring)), self.lifted)

    # --- inputs -------------------------------------------------------------------------------------------------------

    def _placeholders(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Numbers the inputs; the arguments with references in the place of tensors."""
        found = graph_inputs(self.program)
        nodes = {n.name: n for n in self.program.graph.nodes if n.op == "placeholder"}
        taken = {name for name, _ in self.model.named_modules()} | set(weight_tensors(self.model))
        for name, target in found.tensors.items():
            self.numbers[nodes[name]] = Held(target)
        for i, (name, value) in enumerate(found.constants.items()):
            if not isinstance(value, Tensor):
                raise TraceError(f"{type(self.model).__name__} holds a {type(value).__name__} that is no tensor")
            own = next(n for n in (f"constant_{i}", f"lifted_constant_{i}", f"_{i}") if n not in taken)
            self.lifted[own] = value
            self.numbers[nodes[name]] = Held(own)
        args, kwargs = self.given
        spec = self.program.call_spec.in_spec
        ordered = reorder_kwargs(kwargs, spec) if spec is not None else kwargs
        leaves, tree = pytree.tree_flatten((args, ordered))
        stands: list[Any] = []
        for name, leaf in zip(found.given, leaves, strict=True):
            stands.append(leaf)
            if isinstance(leaf, Tensor):
                stands[-1] = self.numbers[nodes[name]] = Ref(len(self.inputs))
                self.inputs.append(_input(nodes[name], leaf))
        return pytree.tree_unflatten(stands, tree)

    def _evaluating(self) -> tuple[str, ...]:
        """The modules that the class keeps in evaluation mode while it trains."""
        twin = copy.deepcopy(self.model).train()
        return tuple(path for path, module in twin.named_modules() if path and not module.training)

    def _required(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
        """Arguments without a tensor whose value is not the default of the signature."""
        known = inspect.signature(self.model.forward).parameters
        given = {**dict(zip(_argument_names(self.model), args, strict=False)), **kwargs}
        plain = {name: value for name, value in given.items() if not has_refs(value)}
        return tuple(n for n, value in plain.items() if n not in known or not _same(known[n].default, value))

    def _conditions(self) -> tuple[Any, ...]:
        """The conditions on sizes under which the trace was made, as expressions."""
        symbols: dict[Any, Any] = {}
        derived: list[tuple[Any, Any]] = []
        guards: list[Any] = []
        for node, stands in self.numbers.items():
            if node.op != "placeholder" or not isinstance(stands, Ref):
                continue
            for d, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt):
                    place = ("size", stands.number, d)
                    known = size.node.shape_env
                    guards = [g.expr.xreplace(known.replacements).xreplace(known.replacements) for g in known.guards]
                    if size.node.expr.is_Symbol and size.node.expr not in symbols:
                        symbols[size.node.expr] = place
                    else:
                        derived.append((place, size.node.expr))
        found = [("eq", place, expression(expr, symbols)) for place, expr in derived]
        found += [expression(expr, symbols) for expr in guards]
        return tuple(dict.fromkeys(e for e in found if isinstance(e, tuple)))

    # --- layers -------------------------------------------------------------------------------------------------------

    def _calls(self) -> tuple[dict[fx.Node, _LayerCall], set[fx.Node]]:
        """The calls of layers by the node that ends each, and the nodes that belong to them."""
        groups: dict[str, list[fx.Node]] = defaultdict(list)
        paths: dict[str, str] = {}
        for node in self.program.graph.nodes:
            if node.op == "call_function" and operator_name(node) not in CHECKS:
                key, path = self._layer_of(node)
                if key is not None:
                    groups[key].append(node)
                    paths[key] = path
        calls, inside = {}, set()
        for key, nodes in groups.items():
            module = self.model.get_submodule(paths[key])
            mine = {id(t) for t in (*module.parameters(), *module.buffers())}
            own = {name for name, t in weight_tensors(self.model).items() if id(t) in mine}
            found = _layer_call(module, paths[key], nodes, self.numbers, own)
            if found is not None:
                calls[found.last] = found
                inside |= set(nodes)
        return calls, inside

    def _layer_of(self, node: fx.Node) -> tuple[str | None, str]:
        """The outermost layer whose call this node belongs to: a key for that call, and the layer's path."""
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            module = _find(self.model, path) if path else None  # the model itself has no place to be called at
            if module is not None and is_layer(module):
                return key, path
        return None, ""

    def _layer(self, node: fx.Node, call: _LayerCall) -> None:
        args = tuple(self._argument(a, node) for a in call.args)
        whole = self._add(Step(f"@{call.path}", args))
        for inner, way in call.results.items():
            stands = whole
            for key in way:
                stands = self._add(Step("size.item", (stands, key)))
            self.numbers[inner] = stands

    # --- operators ----------------------------------------------------------------------------------------------------

    def _needed(self) -> list[fx.Node]:
        return [n for n in self.program.graph.nodes if n.op == "call_function" and operator_name(n) not in CHECKS]

    def _operator(self, node: fx.Node) -> None:
        if node in self.numbers:
            return
        target = target_name(node.target)
        if target is None:
            raise TraceError(
                f"{type(self.model).__name__} calls {node.target}, which a file without a class cannot hold: "
                "load its file with into= (a fresh model of the class)"
            )
        if target == "aten.view.default" and not self._changes_in_place():
            target = "aten.reshape.default"  # which layout a kernel leaves depends on sizes and types, as views do
        args = tuple(self._argument(a, node) for a in node.args)
        kwargs = tuple(
            (k, self._argument(v, node)) for k, v in node.kwargs.items() if k not in ("pin_memory", "layout")
        )
        self.numbers[node] = self._add(Step(target, *_explicit(node, *self._modes(node, args, kwargs))))

    def _modes(self, node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Dropout and batch norms that the model's own code calls ask for the mode, as they did there."""
        if not self._follows_the_mode(node):
            return args, kwargs
        place = MOODS.get(operator_name(node))
        if place is not None and len(args) > place and args[place] is False:
            args = (*args[:place], Training(), *args[place + 1 :])
        return args, kwargs

    def _changes_in_place(self) -> bool:
        """Whether an operator writes into its argument, so that views of it must stay views."""
        targets = [n.target for n in self.program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
        return any(target._schema.is_mutable for target in targets)

    def _follows_the_mode(self, node: fx.Node) -> bool:
        """Whether a call of dropout or of a batch norm asks for the mode: in training mode it is traced as on."""
        if not _moody(node):
            return True
        if self.moods is None:
            self.moods = _moods(self.model, self.given)
        calls = [n for n in self.program.graph.nodes if n.op == "call_function" and _moody(n)]
        return len(self.moods) != len(calls) or self.moods[calls.index(node)]

    def _argument(self, value: Any, node: fx.Node) -> Any:
        match value:
            case fx.Node():
                return self._of(value)
            case tuple() | list():
                return type(value)(self._argument(v, node) for v in value)
            case torch.device():
                return Device()
            case slice() | torch.SymInt() | torch.SymFloat() | complex():
                raise TraceError(f"{node.target} takes a {type(value).__name__}, which a file cannot hold")
        return list(value) if isinstance(value, torch.Size) else value

    def _of(self, node: fx.Node) -> Any:
        if node not in self.numbers:
            if node.op == "get_attr":
                value = getattr(self.program.graph_module, str(node.target))
                own = f"constant_{node.target}".replace(".", "_")
                self.lifted[own] = value
                self.numbers[node] = Held(own)
            else:
                self._operator(node)
        return self.numbers[node]

    def _add(self, step: Step) -> Ref:
        self.steps.append(step)
        return Ref(len(self.inputs) + len(self.steps) - 1)


def _explicit(node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """What a call takes from the size of a tensor, as a number: it stays what it was when channels are removed.

    The scale of attention, and the ends of a part that are counted from behind.
    """
    source = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
    name = operator_name(node)
    if name == "scaled_dot_product_attention" and isinstance(source, Tensor) and isinstance(source.shape[-1], int):
        if dict(kwargs).get("scale") is None:
            kwargs = (*((k, v) for k, v in kwargs if k != "scale"), ("scale", source.shape[-1] ** -0.5))
    elif name == "slice" and isinstance(source, Tensor) and len(args) > 2 and isinstance(source.shape[args[1]], int):
        size = source.shape[args[1]]
        ends = (size + n if isinstance(n, int) and -size <= n < 0 else n for n in args[2:4])
        args = (*args[:2], *ends, *args[4:])
    return args, kwargs


MOODS = {"batch_norm": 5, "instance_norm": 5, "dropout": 2, "alpha_dropout": 2, "feature_dropout": 2}


def _moody(node: fx.Node) -> bool:
    return operator_name(node) in MOODS


def _moods(model: nn.Module, given: Call) -> list[bool]:
    """For each call of dropout and of a batch norm, whether it is on while the model trains."""
    twin = copy.deepcopy(model).train()
    fresh = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, given)
    try:
        with opaque_layers(twin):
            program = trace(twin, fresh, gradients=True, training=True)
    except FeatherweightError:
        return []
    calls = [n for n in program.graph.nodes if n.op == "call_function" and _moody(n)]
    return [bool(n.args[MOODS[operator_name(n)]]) if len(n.args) > MOODS[operator_name(n)] else False for n in calls]


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


# --- layers as a whole ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LayerCall:
    """The call of a layer: where it is, on what, the node at which it is written, what its nodes take of its result."""

    path: str
    args: tuple[Any, ...]
    last: fx.Node
    results: dict[fx.Node, tuple[int, ...]]


def is_layer(module: nn.Module) -> bool:
    """Whether a module is called as a whole: a layer that a file can name, as torch made it, or a form."""
    plain = type(module) in TYPES and "forward" not in vars(module) and not hooked(module)
    return plain or isinstance(module, Form)


def hooked(module: nn.Module) -> bool:
    """Whether a module carries hooks that are not ours: what they compute is traced with the model's own code."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__module__", "") != Form.__module__ for hook in hooks)


def _find(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _layer_call(
    module: nn.Module, path: str, nodes: Sequence[fx.Node], numbers: Mapping[fx.Node, Any], own: set[str]
) -> _LayerCall | None:
    """What a call of a layer is, or None where its nodes are no plain call of one tensor: they stay operators then.

    Args:
        own: every name of the tensors of the layer.
    """
    group = set(nodes)
    outside = [n for n in nodes if any(user not in group for user in n.users)]
    taken = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in group)
    given = [a for a in taken if not (isinstance(held := numbers.get(a), Held) and held.name in own) and _is_tensor(a)]
    if getattr(module, "return_indices", False) or _asked_for_a_size(module, nodes):
        return None
    if isinstance(module, (nn.RNNBase, SharedRecurrent)):
        return _recurrent_call(module, path, nodes, outside, given)
    if len(outside) != 1 or len(given) != 1:
        return None
    return _LayerCall(path, (given[0],), outside[0], {outside[0]: ()})


def _asked_for_a_size(module: nn.Module, nodes: Sequence[fx.Node]) -> bool:
    """Whether a transposed convolution was called with an output size, which its step would not say."""
    core = next((n for n in nodes if operator_name(n).startswith("conv_transpose")), None)
    if core is None or not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return False
    padding = core.args[5] if len(core.args) > 5 else core.kwargs.get("output_padding", 0)
    given = list(padding) if isinstance(padding, (list, tuple)) else [padding] * len(module.output_padding)
    return given != list(module.output_padding)


def _recurrent_call(
    module: Recurrent, path: str, nodes: Sequence[fx.Node], outside: Sequence[fx.Node], given: Sequence[fx.Node]
) -> _LayerCall | None:
    core = next((n for n in nodes if operator_name(n) == NAME), None)
    if core is None or any(n.args[0] is not core for n in outside) or core.args[0] not in given:
        return None
    states: Any = core.args[1]
    args: tuple[Any, ...] = (core.args[0],)
    if len(given) > 1:
        several = isinstance(states, (tuple, list))
        args = (*args, tuple(states) if has_cell(module) else states[0] if several else states)
    pair = has_cell(module)
    ways = {0: (0,), 1: (1, 0) if pair else (1,), 2: (1, 1)}
    return _LayerCall(path, args, core, {n: ways[int(n.args[1])] for n in outside})  # type: ignore[arg-type]


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


# --- putting it together ----------------------------------------------------------------------------------------------


def _input(node: fx.Node, example: Tensor) -> Input:
    free = tuple(d for d, size in enumerate(node.meta["val"].shape) if isinstance(size, torch.SymInt))
    whole = not (example.is_floating_point() or example.is_complex()) and example.numel() > 0
    low, high = (int(example.min()), int(example.max())) if whole else (0, 1)
    return Input(example.dtype, tuple(example.shape), free, low, high)


def _told_output(value: Any) -> Any:
    """What the network returns, its own classes as named outputs."""
    if isinstance(value, dict) or hasattr(value, "_fields") or is_dataclass(value):
        if isinstance(value, (Ref, Held)):
            return value
        named = value if isinstance(value, dict) else {k: getattr(value, k) for k in _names_of(value)}
        if not all(isinstance(name, str) for name in named):
            raise TraceError("the model returns a dictionary whose keys are no text, which a file cannot hold")
        if hasattr(value, "_fields"):
            return Fields(named, [_told_output(v) for v in named.values()])
        kind = dict if type(value) is dict else Outputs
        return kind((k, _told_output(v)) for k, v in named.items())
    if isinstance(value, (tuple, list)):
        return type(value)(_told_output(v) for v in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TraceError(f"the model returns a {type(value).__name__}, which a file without its class cannot hold")


def _names_of(value: Any) -> list[str]:
    return list(value._fields) if hasattr(value, "_fields") else [f.name for f in fields(value)]


def _settled(wiring: Wiring) -> Wiring:
    """Sizes that a condition sets to a number are fixed sizes, and that condition says nothing more."""
    inputs, conditions = list(wiring.inputs), []
    for condition in wiring.conditions:
        kind, *sides = condition
        place = next((c for c in sides if isinstance(c, tuple) and c[0] == "size"), None)
        if kind == "eq" and place is not None and any(isinstance(c, int) for c in sides):
            _, number, dim = place
            free = tuple(d for d in inputs[number].free if d != dim)
            inputs[number] = replace(inputs[number], free=free)
        else:
            conditions.append(condition)
    return replace(wiring, inputs=tuple(inputs), conditions=tuple(conditions))


def _pruned(wiring: Wiring) -> Wiring:
    """Without steps whose results nobody needs; steps that change their argument stay."""
    first = len(wiring.inputs)
    needed = set(refs(wiring.output))
    kept: list[int] = []
    for i in reversed(range(len(wiring.steps))):
        step = wiring.steps[i]
        packet = step.target.split(".")[1] if step.target.startswith("aten.") else ""
        if first + i in needed or (packet.endswith("_") and not packet.endswith("__")):
            kept.append(i)
            needed |= {*refs(step.args), *refs(tuple(v for _, v in step.kwargs))}
    numbers = {first + old: first + new for new, old in enumerate(reversed(kept))} | {i: i for i in range(first)}
    steps = tuple(renumbered(wiring.steps[i], numbers) for i in reversed(kept))
    return replace(wiring, steps=steps, output=renumbered(wiring.output, numbers))


def _assembled(model: nn.Module, wiring: Wiring, lifted: Mapping[str, Tensor]) -> Wired:
    """The layers and tensors of a copy of the model at their names, the wiring in the place of its code.

    Raises:
        TraceError: a layer with a form on its activations is not called as a layer.
    """
    source = copy.deepcopy(model)
    made: dict[int, nn.Module] = {}
    wired = Wired(wiring)
    for path, module in own_modules(source, remove_duplicate=False):
        parent, _, name = path.rpartition(".")
        holder = made[id(source.get_submodule(parent))] if path else None
        if holder is not None and is_layer(source.get_submodule(parent)):
            continue
        if id(module) not in made:
            made[id(module)] = module if path and is_layer(module) else _place(module, wired if not path else Place())
        if holder is not None:
            holder._modules[name] = made[id(module)]
    for name, value in lifted.items():
        wired.register_buffer(name, value.detach().clone(), persistent=False)
    called = {step.target[1:] for step in wiring.steps if step.target.startswith("@")}
    for path, forms in activation_forms(wired).items():
        if path not in called and any(f"{path}.fw_{at}".lstrip(".") not in called for at in forms if at != "grad"):
            raise TraceError(f"{path} has a form on its activations, and is not called as a layer")
    return wired


def _place(module: nn.Module, place: nn.Module) -> nn.Module:
    """The tensors of a module, without its code."""
    place.training = module.training
    place._parameters.update(module._parameters)
    place._buffers.update(module._buffers)
    place._non_persistent_buffers_set |= module._non_persistent_buffers_set
    for at in ACTIVATIONS:
        if (form := activation_form(module, at)) is not None:
            place.add_module(f"fw_{at}", form)
    return place


# --- checking ---------------------------------------------------------------------------------------------------------


def _checked(model: nn.Module, wired: Wired, given: Call) -> Wired:
    """The wired network after comparisons with the model, with the conditions that these have not shown to be idle.

    Raises:
        TraceError: it computes something else.
    """
    wrong = _differs(_run(model, given), wired, given)
    if wrong:
        raise TraceError(f"the wiring of {type(model).__name__} does not compute what the model does: {wrong}")
    agreed: dict[Any, list[bool]] = defaultdict(list)  # condition -> for each agreement, whether a size was larger
    needed: set[Any] = set()
    sizes = [given.shape for given in wired.wiring.inputs]
    conditions = wired.wiring.conditions
    if not all(evaluate_size(c, sizes) for c in conditions):
        raise TraceError("the conditions of the trace do not hold for its own inputs")
    given = smaller(wired, given, given)
    wired.wiring = replace(wired.wiring, conditions=())
    for changed in _variants(wired.wiring, conditions, given):
        try:
            expected = _run(model, changed)
        except Exception:  # the model itself does not take such sizes: nothing to compare
            continue
        tensors = _tensors_of(wired, changed)
        found = [tuple(t.shape) for t in tensors]
        broken = {c for c in conditions if not _holds(c, found)}
        wrong = _differs(expected, wired, changed)
        larger = any(n > m for shape, was in zip(found, sizes, strict=True) for n, m in zip(shape, was, strict=True))
        if not wrong:
            for condition in broken:
                agreed[condition].append(larger)
        elif broken:
            needed |= broken
        elif any(0 in shape for shape in found):
            needed |= {("ge", ("size", i, d), 1) for i, shape in enumerate(found) for d, n in enumerate(shape) if not n}
        else:
            raise TraceError(f"at the sizes {found} the wiring does not follow: {wrong}")
    kept = [c for c in conditions if c in needed or not _idle(c, agreed[c])]
    kept += sorted(needed - set(conditions), key=str)
    wired.wiring = replace(wired.wiring, conditions=independent(kept, sizes))
    return wired


def _idle(condition: Any, agreed: Sequence[bool]) -> bool:
    """Whether agreements where a condition does not hold show that it changes nothing.

    Sizes below the traced one are few, and tried at both ends; above it there is no end, so a bound stays there.
    """
    if condition[0] == "ne":
        return bool(agreed)
    return bool(agreed) and (not any(agreed) or (condition[0] == "eq" and len(agreed) > 3))


def _holds(condition: Any, sizes: Sequence[Any]) -> bool:
    try:
        return bool(evaluate_size(condition, sizes))
    except ZeroDivisionError:
        return False


def _tensors_of(wired: Wired, call: Call) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(_ordered(wired.wiring, call)) if isinstance(t, Tensor)]


def _ordered(wiring: Wiring, call: Call) -> Any:
    return call[0], {name: call[1][name] for name in wiring.kwargs}


def _differs(expected: Any, wired: Wired, call: Call) -> str:
    """What is wrong with the outputs of a wired network, or nothing."""
    try:
        found = pytree.tree_leaves(_run(wired, call))
    except Exception as error:  # an operator may raise anything on sizes it was not traced with
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"
    wanted = pytree.tree_leaves(expected)
    pairs = [(a, b) for a, b in zip(wanted, found, strict=False) if isinstance(a, Tensor)]
    if len(wanted) != len(found):
        return f"{len(found)} outputs where the model has {len(wanted)}"
    for a, b in pairs:
        if not isinstance(b, Tensor) or a.shape != b.shape:
            return f"an output of shape {tuple(getattr(b, 'shape', ()))} where the model's has {tuple(a.shape)}"
        if a.dtype.is_floating_point and a.numel():
            gap = (a.float() - b.float()).abs()
            gap = gap[~(a == b) & ~(a.isnan() & b.isnan())]
            largest = a.float().nan_to_num(0, 0, 0).abs().max().clamp_min(1e-6)
            if len(gap) and not float(gap.max() / largest) <= TOLERANCE:
                return f"an output differs by {float(gap.max() / largest):.1e}"
        elif not torch.equal(a, b):
            return "an output of integers differs"
    return ""


def _variants(wiring: Wiring, conditions: Sequence[Any], given: Call) -> Iterator[Call]:
    """The call at other sizes: every free size by itself larger and smaller, sizes that are tied together."""
    shapes = [t.shape for t in pytree.tree_leaves(_ordered(wiring, given)) if isinstance(t, Tensor)]
    ties: dict[tuple[int, int], tuple[int, int]] = {}
    for condition in conditions:
        if condition[0] == "eq" and all(isinstance(c, tuple) and c[0] == "size" for c in condition[1:]):
            ties[condition[1][1:]] = condition[2][1:]
    classes: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for number, found in enumerate(wiring.inputs):
        for d in found.free:  # sizes that are the same at the same place differ together, as those of a batch do
            tied = ties.get((number, d), (number, d))
            classes[tied[1], shapes[tied[0]][tied[1]]].append((number, d))
    for (d, size), places in classes.items():
        far = (4 * size + 3, 8 * size + 5) if size < SMALL else ()
        others = (0, 1, size + 1, 3 * size + 2) if d == 0 else (size + 1, 2 * size, 2 * size + 1, *far)
        lower = () if d == 0 else (size - 1, size // 2, size // 4, 3, 2, 1)
        yield _resized(wiring, given, dict.fromkeys(places, size))  # other values
        for other in dict.fromkeys(n for n in (*others, *lower) if 0 <= n != size and (n > 0 or d == 0)):
            if other in others or other < size:
                yield _resized(wiring, given, dict.fromkeys(places, other))
    beside = [(place, size) for (d, size), places in classes.items() if d for place in places]
    for part in (4, 8, 16, 32, 1 << 20) if len({place[1] for place, _ in beside}) > 1 else ():
        yield _resized(wiring, given, {place: max(1, size // part) for place, size in beside})


def _resized(wiring: Wiring, given: Call, sizes: Mapping[tuple[int, int], int]) -> Call:
    """The call with other sizes at these (input, dimension), and values drawn anew: real data may be all alike."""
    leaves, tree = pytree.tree_flatten(_ordered(wiring, given))
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    generator = torch.Generator().manual_seed(sum(sizes.values()))
    for number, place in enumerate(tensors):
        shape = [sizes.get((number, d), n) for d, n in enumerate(leaves[place].shape)]
        leaves[place] = _drawn(leaves[place], wiring.inputs[number], shape, generator)
    found: Call = pytree.tree_unflatten(leaves, tree)
    return found


def _drawn(like: Tensor, given: Input, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Values of the kind that a tensor has: normal with its spread, or whole numbers within its bounds."""
    if like.is_floating_point() or like.is_complex():
        spread = float(like.abs().float().std()) if like.numel() > 1 else 0.0
        drawn = torch.randn(shape, generator=generator) * (spread if spread > 0 else 1.0)
    else:
        drawn = torch.randint(given.low, given.high + 1, tuple(shape), generator=generator)
    return drawn.to(like.dtype).to(like.device)
