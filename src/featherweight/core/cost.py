"""What a model costs: parameters, non-zeros and multiply-accumulates (MACs), layer by layer, for one sample.

MACs are counted on the traced graph, from shapes alone: convolutions, linear layers, matrix products, attention and
recurrent layers. Additions, norms, activations and pooling are not counted, here or anywhere in this package. Of a
structured layer what it executes is counted: Fourier transforms where it has them (n log2 n for n real numbers), and
the making of its weight, once a call.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from featherweight.core.ledger import note
from featherweight.core.recurrent import SharedRecurrent, dense_size
from featherweight.core.structured import NAME, StructuredLayer, told_layer
from featherweight.core.task import as_call, device_of, eval_mode, to_device
from featherweight.core.trace import graph_inputs, operator_name, owner, trace
from featherweight.errors import BadData, TraceError


def raw_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers as they are, each tied tensor once."""
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in held.values())


@dataclass(frozen=True)
class Row:
    """One layer: its own parameters (tied ones only where they come first), and the MACs of its code per sample."""

    params: int = 0
    nonzeros: int = 0
    macs: int = 0


@dataclass(frozen=True)
class Cost:
    """Totals and rows by module path; the path "" is the model's own code."""

    params: int
    nonzeros: int
    macs: int
    layers: dict[str, Row]
    complete: bool = True  # False: the graph could not be traced, and MACs outside of layers are missing
    note: str = ""


def cost(model: nn.Module, example_inputs: Any) -> Cost:
    """Parameters, non-zeros and MACs of one sample: what the example inputs cost over the size of their batch.

    Args:
        example_inputs: a tensor, a tuple of arguments, or a dictionary of keyword arguments; batch first.

    Raises:
        BadData: the model holds parametrizations (bake it first), or no input is a tensor with a batch.
    """
    batch = batch_size(example_inputs)
    remark = ""
    try:
        macs = _graph_macs(model, example_inputs)
    except TraceError as error:
        macs = _layer_macs(model, example_inputs)
        remark = f"MACs are those of layers only, products in the model's own code are missing: {error}"
        note(remark)
    rows: dict[str, Row] = {}
    own = _params(model)
    for path in [*own, *(p for p in macs if p not in own)]:
        params, nonzeros = own.get(path, (0, 0))
        rows[path] = Row(params, nonzeros, round(macs.get(path, 0) / batch))
    return Cost(
        params=sum(r.params for r in rows.values()),
        nonzeros=sum(r.nonzeros for r in rows.values()),
        macs=round(sum(macs.values()) / batch),
        layers=rows,
        complete=not remark,
        note=remark,
    )


def batch_size(example_inputs: Any) -> int:
    """First dimension of the first tensor.

    Raises:
        BadData: there is no tensor with a dimension.
    """
    for leaf in pytree.tree_leaves(as_call(example_inputs)):
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] > 0:
            return int(leaf.shape[0])
    raise BadData("the example inputs hold no tensor with a batch: pass a tensor, a tuple or a dictionary of them")


def _params(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Parameters and non-zeros by the path of the module that owns them; shared ones once."""
    found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for name, p in model.named_parameters():
        path = name.rpartition(".")[0]
        params, nonzeros = found[path]
        found[path] = params + p.numel(), nonzeros + int(torch.count_nonzero(p.detach()))
    return dict(found)


# --- on the graph -----------------------------------------------------------------------------------------------------

Count = Callable[[fx.Node], int]


def _graph_macs(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    program = trace(model, example_inputs)
    tensors = graph_inputs(program).tensors
    for node in program.graph.nodes:
        count = COUNTS.get(operator_name(node)) if node.op == "call_function" else None
        if count is not None:  # a network without its class has only wiring there: the weight says whose code it was
            weights = [tensors[n.name] for n in node.all_input_nodes if n.name in tensors]
            path = owner(node) or (weights[0].rpartition(".")[0] if weights else "")
            found[path] += count(node)
    return dict(found)


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta["val"]
    return tuple(value[0].shape if isinstance(value, (tuple, list)) else value.shape)


def _conv(node: fx.Node) -> int:
    """Every output element takes a product for every weight of its filter."""
    return math.prod(_shape(node)) * math.prod(_shape(node.args[1])[1:])


def _conv_transpose(node: fx.Node) -> int:
    """Every input element is multiplied with every weight of its filter."""
    return math.prod(_shape(node.args[0])) * math.prod(_shape(node.args[1])[1:])


def _linear(node: fx.Node) -> int:
    return math.prod(_shape(node)) * _shape(node.args[0])[-1]


def _addmm(node: fx.Node) -> int:
    return math.prod(_shape(node)) * _shape(node.args[1])[-1]


def _bilinear(node: fx.Node) -> int:
    return math.prod(_shape(node)) * math.prod(_shape(node.args[2])[1:])


def _attention(node: fx.Node) -> int:
    """Queries with keys, then weights with values; a causal mask saves nothing here."""
    q, k, v = (_shape(node.args[i]) for i in range(3))
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _einsum(node: fx.Node) -> int:
    """The product of all index sizes; dots stand for what broadcasts."""
    text, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    sizes: dict[str, int] = {}
    dots = 1
    for term, operand in zip(text.split("->")[0].split(","), operands, strict=True):  # type: ignore[arg-type]
        shape = list(_shape(operand))
        left, _, right = term.partition("...")
        sizes |= dict(zip(left, shape, strict=False))
        sizes |= dict(zip(reversed(right), reversed(shape), strict=False))
        dots = max(dots, math.prod(shape[len(left) : len(shape) - len(right)])) if "..." in term else dots
    return math.prod(sizes.values()) * dots if len(operands) > 1 else 0  # type: ignore[arg-type]


def _recurrent(node: fx.Node) -> int:
    """Every step multiplies every weight matrix once a sample."""
    steps = math.prod(_shape(node.args[0])[:-1])
    matrices = [_shape(w) for w in node.args[2]]  # type: ignore[union-attr]
    return steps * sum(math.prod(s) for s in matrices if len(s) == 2)


def _structured(node: fx.Node) -> int:
    return told_layer(str(node.args[2]))[0].macs(_shape(node.args[0]), _shape(node))


COUNTS: Mapping[str, Count] = {
    NAME: _structured,
    **dict.fromkeys((f"conv{n}d" for n in (1, 2, 3)), _conv),
    **dict.fromkeys((f"conv_transpose{n}d" for n in (1, 2, 3)), _conv_transpose),
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), _linear),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm"), _addmm),
    "bilinear": _bilinear,
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
}


# --- without a graph --------------------------------------------------------------------------------------------------


def _layer_macs(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """MACs of the layers that torch has, seen by hooks while the example runs through the model."""
    found: dict[str, int] = defaultdict(int)
    handles = []
    for path, module in model.named_modules():

        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, path: str = path) -> None:
            found[path] += _module_macs(module, (*args, *kwargs.values()), out)

        handles.append(module.register_forward_hook(seen, with_kwargs=True))
    args, kwargs = to_device(as_call(example_inputs), device_of(model))
    try:
        with eval_mode(model):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {path: macs for path, macs in found.items() if macs}


def _module_macs(module: nn.Module, args: tuple[Any, ...], out: Any) -> int:  # noqa: PLR0911 - one straight table
    match module:
        case StructuredLayer():
            return module.macs(args[0].shape, out.shape)
        case nn.modules.conv._ConvTransposeNd():
            return args[0].numel() * math.prod(module.weight.shape[1:])
        case nn.modules.conv._ConvNd():
            return out.numel() * math.prod(module.weight.shape[1:])
        case nn.Linear():
            return out.numel() * module.weight.shape[1]
        case nn.Bilinear():
            return out.numel() * math.prod(module.weight.shape[1:])
        case SharedRecurrent():
            return math.prod(args[0].shape[:-1]) * dense_size(module) + module.making()
        case nn.RNNBase():
            x = args[0].data if isinstance(args[0], nn.utils.rnn.PackedSequence) else args[0]
            return math.prod(x.shape[:-1]) * sum(p.numel() for p in module.parameters() if p.dim() == 2)
        case nn.RNNCellBase():
            return math.prod(args[0].shape[:-1]) * sum(p.numel() for p in module.parameters() if p.dim() == 2)
        case nn.MultiheadAttention():
            queries, keys = (a.numel() // a.shape[-1] for a in args[:2])
            length = args[1].shape[1 if module.batch_first and args[1].dim() == 3 else 0]
            projections = queries * 2 * module.embed_dim**2 + keys * module.embed_dim * (module.kdim + module.vdim)
            return projections + queries * length * 2 * module.embed_dim
    return 0
