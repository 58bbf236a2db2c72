"""One way to get a model's graph: `trace`, torch.export without Dynamo, with errors that a user can act on."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export._tree_utils import reorder_kwargs
from torch.export.graph_signature import InputKind
from torch.fx import traceback
from torch.utils import _pytree as pytree

from featherweight.core.forms import form_names
from featherweight.core.structured import as_operators
from featherweight.core.task import as_call, device_of, eval_mode, to_device
from featherweight.errors import BadData, TraceError

STILL_WORKS = "masks, quantized weights and weight sharing still work on it, whatever needs the graph does not"


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps torch's own account of a trace that failed to itself: the error says it in one sentence."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    dynamic_shapes: Any = None,
    gradients: bool = False,
    training: bool = False,
) -> ExportedProgram:
    """The model's graph in evaluation mode, as torch.export sees it (strict=False); the model is left as it was.

    Each structured layer is one operator of its own.

    Args:
        example_inputs: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
        dynamic_shapes: as torch.export takes them; every size is fixed when left out.
        gradients: trace as where gradients are recorded, so that what the code computes without them is seen.
        training: trace in training mode.

    Raises:
        BadData: the model holds forms.
        TraceError: torch.export refuses; says at what, and what still works without a graph.
    """
    for path, module in model.named_modules():
        if form_names(module):
            raise BadData(f"{path or 'the model'} still holds a form: call bake(model) before tracing it")
    args, kwargs = to_device(as_call(example_inputs), device_of(model))
    # Warnings about attributes assigned while tracing (recurrent layers keep a list of their weights) concern nobody.
    with eval_mode(model), uncached(model), traceback.preserve_node_meta(), warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        model.train(training)
        try:
            with torch.set_grad_enabled(gradients), as_operators(model):
                program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
            return inlined(program)
        except Exception as error:
            raise TraceError(
                f"{type(model).__name__} cannot be traced ({_cause(error)}): write the forward pass without that, "
                f"or go on without a graph ({STILL_WORKS})"
            ) from error


def by_name(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of each argument (its dynamic sizes, say) by the argument's name, as torch.export wants it."""
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Switches off the key-value caches that language models of transformers return beside their outputs."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = [config for config in found if getattr(config, "use_cache", None) is True]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs:
            config.use_cache = True


BLOCKS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def inlined(program: ExportedProgram) -> ExportedProgram:
    """The same program, blocks under `torch.no_grad()` or autocast written out; results of the former detached."""
    graph, module = program.graph, program.graph_module
    while blocks := [n for n in graph.nodes if str(n.target) in BLOCKS]:
        node = blocks[0]
        body = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
        inner = getattr(module, str(node.args[body].target))
        inputs = [n for n in inner.graph.nodes if n.op == "placeholder"]
        places = dict(zip(inputs, node.args[body + 1 :], strict=True))
        with graph.inserting_before(node):
            kept = results = list(graph.graph_copy(inner.graph, places))
            if str(node.target) == BLOCKS[0] and node.args[0] is False:
                kept = [graph.call_function(torch.ops.aten.detach.default, (r,)) for r in results]
        for new, old in zip(kept, results, strict=True):
            new.meta["val"] = old.meta.get("val")  # but not the module: a layer would swallow the detaching
        for user in list(node.users):
            user.replace_all_uses_with(kept[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
    return program


def _cause(error: BaseException) -> str:
    """The first line of what torch says, with its type where that is all that helps."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0].rstrip(".:") if lines else "no reason given"
    return f"{type(error).__name__}: {text[:300]}"


@dataclass(frozen=True)
class Inputs:
    """What the placeholders of a traced graph stand for."""

    tensors: dict[str, str]  # placeholder -> name of a parameter or buffer
    constants: dict[str, Any]  # placeholder -> a tensor that the trace lifted out of the code
    given: list[str]  # the user's tensors, in order of the flattened arguments


def graph_inputs(program: ExportedProgram) -> Inputs:
    """Sorts the placeholders of a program into weights, constants and what the user gives."""
    tensors: dict[str, str] = {}
    constants: dict[str, Any] = {}
    given: list[str] = []
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            tensors[name] = str(spec.target)
        elif spec.kind == InputKind.USER_INPUT:
            given.append(name)
        else:
            constants[name] = program.constants.get(str(spec.target))
    return Inputs(tensors, constants, given)


def owner(node: fx.Node) -> str:
    """Path of the innermost module whose code called this node; "" is the model itself."""
    stack: Mapping[str, Any] | None = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def operator_name(node: fx.Node) -> str:
    """Name of an operator without namespace and overload, the in-place twin under the same name: `add_.Tensor` is add.

    >>> from torch import fx
    >>> operator_name(fx.Graph().call_function(torch.ops.aten.add_.Tensor))
    'add'
    """
    target = node.target
    packet = str(getattr(target, "_opname", None) or getattr(target, "__name__", target))
    return packet[:-1] if packet.endswith("_") and not packet.endswith("__") else packet


def weight_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by every name it has (tied ones under each)."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {**named, **dict(model.named_buffers(remove_duplicate=False))}


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(t), name) for name, t in weight_tensors(model).items()}


def placed(program: ExportedProgram, weights: Mapping[str, Tensor], example_inputs: Any) -> dict[str, Any]:
    """What every placeholder holds: parameters by name, and copies of buffers, constants and the user's inputs."""
    inputs = graph_inputs(program)
    args, kwargs = as_call(example_inputs)
    spec = program.call_spec.in_spec
    given = pytree.tree_leaves((args, reorder_kwargs(kwargs, spec) if spec is not None else kwargs))
    values = {name: weights[target] for name, target in inputs.tensors.items()}
    values |= inputs.constants | dict(zip(inputs.given, given, strict=True))
    # In-place operators of the graph must not reach the caller's tensors.
    parameters = set(program.graph_signature.parameters)
    kept = {name for name, target in inputs.tensors.items() if target in parameters}
    return {k: v.clone() if isinstance(v, Tensor) and k not in kept else v for k, v in values.items()}


def interpret(
    program: ExportedProgram, place: Mapping[str, Any], call: Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]
) -> Any:
    """Walks the graph: `place` holds the placeholders' values, `call(node, args, kwargs)` computes a node.

    Values may be of any type; each is dropped after its last use. Returns what the output node collects.
    """
    held: dict[fx.Node, Any] = {}
    left = {node: len(node.users) for node in program.graph.nodes}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            held[node] = place[node.name]
        elif node.op == "get_attr":
            held[node] = getattr(program.graph_module, str(node.target))
        elif node.op == "output":
            return fx.node.map_arg(node.args[0], held.__getitem__)
        else:
            args, kwargs = (fx.node.map_arg(a, held.__getitem__) for a in (node.args, node.kwargs))
            held[node] = call(node, args, kwargs)
        for used in node.all_input_nodes:
            left[used] -= 1
            if not left[used]:
                del held[used]
    return None
