"""Layers with weights: linear, convolutions, embeddings, norms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from featherweight.core.labels.flow import Call, Val, carrier, lay, rule
from featherweight.core.trace import owner


def enter(call: Call, weight: Val, inputs: Tensor | None, outputs: Tensor | None) -> None:
    """Notes what a layer's inputs and outputs are, under its path.

    A tied weight is noted under the layer that uses it; a second weight of one module under the weight's own name.
    """
    flow, name = call.flow, weight.main()
    if name is None:
        return
    name = next((n for n in flow.aliases.get(name, ()) if n.rpartition(".")[0] == owner(call.node)), name)
    path = name.rpartition(".")[0]
    if flow.entered.setdefault(path, name) != name and not {name, flow.entered[path]} & norm_names(path):
        path = name
    if inputs is not None:
        flow.inputs[path] = inputs
    if outputs is not None:
        flow.outputs[path] = outputs


def norm_names(path: str) -> set[str]:
    """The four vectors of a norm, which are one layer."""
    return {f"{path}.{name}" for name in ("bias", "running_mean", "running_var")}


def affine(call: Call, x: Val, weight: Val, bias: Any, ins: int, outs: int, dim: int = -1) -> Any:
    """A matrix of weights along one dimension of x (a linear layer, or a convolution of one group)."""
    flow = call.flow
    if not weight.weighs:
        call.pin(x, weight, bias, why="with a computed weight")
        return Val(call.value)
    arrived, elsewhere = flow.arrive(x, dim)
    flow.tie(weight, ins, arrived, "input of the model or of fixed size")
    out = flow.axis(weight, outs)
    flow.tie(bias, 0, out, call.name)
    enter(call, weight, arrived, out)
    if elsewhere:  # works beside the channels (on tokens, say), which pass through
        flow.pin(out, f"{call.name} over another dimension than the channels")
        labels = x.labels if dim == -1 else None
        if labels is None:
            call.pin(x, why="over another dimension than the channels")
        return Val(call.value, labels, False)
    return Val(call.value, flow.settle(lay(out, dim, call.value.dim())), True)


@rule("linear")
def linear(call: Call) -> Any:
    """Weight (out, in)."""
    return affine(call, call.args[0], call.args[1], call.arg(2, "bias"), ins=1, outs=0)


@rule("addmm")
def addmm(call: Call) -> Any:
    """bias + x @ weight, the weight (in, out)."""
    bias, x, weight = call.args[:3]
    return affine(call, x, weight, bias, ins=0, outs=1)


@rule(*(f"conv{n}d" for n in (1, 2, 3)))
def conv(call: Call) -> Any:
    """Weight (out, in / groups, ...); depthwise: an input and its outputs are one channel; grouped: equal losses."""
    flow, x, weight, bias = call.flow, call.args[0], call.args[1], call.arg(2, "bias")
    groups = call.arg(6, "groups", 1)
    dim = 1 - call.value.dim() if call.value.dim() == x.value.dim() else 0
    if groups == 1 or not weight.weighs:
        return affine(call, x, weight, bias, ins=1, outs=0, dim=dim)
    arrived, elsewhere = flow.arrive(x, dim)
    out = flow.axis(weight, 0)
    flow.tie(bias, 0, out, call.name)
    enter(call, weight, arrived, out)
    by_group = out.view(groups, -1)
    if elsewhere:
        call.pin(x, why="over another dimension than the channels")
    if weight.value.shape[1] == 1:
        if arrived is None:
            flow.pin(out, f"{call.name}, depthwise on the input or a fixed size")
        else:
            flow.unions.unite(by_group, arrived[:, None])
            call.counts(6, "groups", arrived)
    else:
        flow.equal.append(tuple(by_group))
        if arrived is not None:
            flow.equal.append(tuple(arrived.view(groups, -1)))
            table = arrived.view(groups, -1)
            for name, _ in weight.places(1):
                flow.unions.unite(flow.blocks.setdefault(name, table.clone()), table)
                if (name, 0) not in weight.places(0):
                    flow.pin(table, f"{call.name} with a computed weight")
    return Val(call.value, flow.settle(lay(out, dim, call.value.dim())), True)


@rule(*(f"conv_transpose{n}d" for n in (1, 2, 3)))
def conv_transpose(call: Call) -> Any:
    """Weight (in, out / groups, ...)."""
    flow, x, weight, bias = call.flow, call.args[0], call.args[1], call.arg(2, "bias")
    groups = call.arg(6, "groups", 1)
    dim = 1 - call.value.dim() if call.value.dim() == x.value.dim() else 0
    if groups == 1 or not weight.weighs:
        return affine(call, x, weight, bias, ins=0, outs=1, dim=dim)
    arrived, _ = flow.arrive(x, dim)
    if arrived is None or weight.value.shape[1] != 1:
        call.pin(x, weight, bias, why="in groups")
        return Val(call.value)
    flow.tie(weight, 0, arrived, call.name)
    flow.tie(bias, 0, arrived, call.name)
    enter(call, weight, arrived, arrived)
    call.counts(6, "groups", arrived)
    return Val(call.value, flow.settle(lay(arrived, dim, call.value.dim())), True)


@rule("embedding")
def embedding(call: Call) -> Any:
    """Weight (words, size): words stay, the size is channels."""
    flow, weight = call.flow, call.args[0]
    if weight.name is None:
        call.pin(weight, why="with a computed table")
        return Val(call.value)
    flow.pin(flow.axis(weight, 0), "embedding: its rows are the vocabulary")
    out = flow.axis(weight, 1)
    enter(call, weight, None, out)
    return Val(call.value, flow.settle(lay(out, -1, call.value.dim())), True)


def per_channel(call: Call, x: Val, weights: Iterable[Any], dim: int, *, zero: bool) -> Any:
    """Weights that are vectors along one dimension of x: norms, slopes."""
    flow, given = call.flow, [w for w in weights if isinstance(w, Val) and isinstance(w.value, Tensor)]
    arrived, elsewhere = flow.arrive(x, dim)
    if elsewhere:
        call.pin(x, *given, why="over another dimension than the channels")
        return Val(call.value)
    for weight in given:
        flow.tie(weight, 0, arrived, "input of the model or of fixed size")
        enter(call, weight, arrived, arrived)
    if arrived is None:
        return Val(call.value)
    return Val(call.value, flow.settle(lay(arrived, dim, call.value.dim())), zero)


@rule("batch_norm", "instance_norm")
def batch_norm(call: Call) -> Any:
    """Weight, bias, running mean and running variance along dimension 1."""
    affine_zero = all(isinstance(call.arg(i), Val) for i in (1, 2))
    return per_channel(call, call.args[0], call.args[1:5], 1, zero=affine_zero)


@rule("group_norm")
def group_norm(call: Call) -> Any:
    """Groups of neighbouring channels that must lose equally many; a group of one channel goes with it."""
    flow, x, groups = call.flow, call.args[0], call.args[1]
    found = per_channel(call, x, call.args[2:4], 1, zero=isinstance(call.arg(3, "bias"), Val))
    arrived, _ = flow.arrive(x, 1)
    if arrived is not None and found.labels is not None:
        if 1 < groups < len(arrived):
            flow.equal.append(tuple(arrived.view(groups, -1)))
        flow.spans[call.node.name] = (arrived, groups)
        call.counts(1, "num_groups", arrived if groups == len(arrived) and groups > 1 else None)
    return found


@rule("layer_norm", "rms_norm")
def layer_norm(call: Call) -> Any:
    """Statistics over the last dimensions; weight and bias of their shape."""
    flow, x, shape = call.flow, call.flow.as_activation(call.args[0]), list(call.args[1])
    weights = [w for w in call.args[2:4] if isinstance(w, Val)]
    at = carrier(x.labels)
    if x.labels is None:
        call.pin(*weights, why="over a fixed size")
        return Val(call.value)
    if at is None or -at > len(shape):  # normalises something else than channels
        call.pin(*weights, why="over another dimension than the channels")
        return Val(call.value, x.labels, False)
    ids = x.labels.flatten()
    for weight in weights:
        flow.tie(weight, at + len(shape), ids, call.name)
        if len(shape) == 1:
            enter(call, weight, ids, ids)
    flow.norms[call.node.name] = lay(ids, at, len(shape))
    call.counts(1, "normalized_shape", *(ids if d == at + len(shape) else None for d in range(len(shape))))
    biased = call.name == "rms_norm" or len(weights) == 2
    return Val(call.value, flow.settle(x.labels), biased)
