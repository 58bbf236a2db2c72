"""Passes over an ONNX graph: what makes quantized layers fuse in a runtime, and what makes the bytes repeatable."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
COARSE = 0.005  # of the largest bias of a layer: what its biases may move by to become integers


class Values:
    """Who makes a value of a graph: an initializer's array, or a node."""

    def __init__(self, proto: ModelProto) -> None:
        self.graph = proto.graph
        self.initializers = {t.name: t for t in self.graph.initializer}
        self.makers = {name: node for node in self.graph.node for name in node.output}

    def array(self, name: str) -> Array | None:
        """The constant of this name, or None."""
        found = self.initializers.get(name)
        return numpy_helper.to_array(found) if found is not None else None

    def dequantized(self, name: str) -> tuple[NodeProto, Array, Array] | None:
        """(DequantizeLinear node, scale, zero point) behind a value, or None."""
        node = self.makers.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return None
        scale = self.array(node.input[1])
        zero = self.array(node.input[2]) if len(node.input) > 2 else np.zeros((), np.int8)
        return (node, scale, zero) if scale is not None and zero is not None else None

    def add(self, name: str, array: Array) -> str:
        """A new initializer."""
        tensor = numpy_helper.from_array(np.asarray(array, order="C"), name)  # a scalar stays one
        self.graph.initializer.append(tensor)
        self.initializers[name] = self.graph.initializer[-1]
        return name


def constants_to_initializers(proto: ModelProto) -> None:
    """Constant nodes become initializers, equal ones one: runtimes fuse quantized layers only around initializers."""
    values = Values(proto)
    nodes = []
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            values.add(node.output[0], numpy_helper.to_array(node.attribute[0].t))
        else:
            nodes.append(node)
    _replace_nodes(proto, nodes)


def without_idle_relus(proto: ModelProto) -> None:
    """Drops every Relu and Clip whose input is on a grid that does not reach beyond it."""
    values = Values(proto)
    renamed: dict[str, str] = {}
    nodes = []
    for node in proto.graph.node:
        _rename(node, renamed)
        bounds = _bounds(values, node)
        found = values.dequantized(node.input[0]) if bounds is not None else None
        outputs = {o.name for o in proto.graph.output}
        if bounds is not None and found is not None and node.output[0] not in outputs:
            limits = np.iinfo(found[2].dtype)
            low, high = ((np.array([limits.min, limits.max]) - found[2].astype(np.int32)) * found[1]).tolist()
            if low >= bounds[0] and high <= bounds[1] * (1 + 1e-6):
                renamed[node.output[0]] = node.input[0]
                continue
        nodes.append(node)
    _replace_nodes(proto, nodes)


def _bounds(values: Values, node: NodeProto) -> tuple[float, float] | None:
    if node.op_type == "Relu":
        return 0.0, float("inf")
    if node.op_type != "Clip":
        return None
    found = [values.array(name) if name else None for name in [*node.input[1:], "", ""][:2]]
    if any(name and edge is None for name, edge in zip(node.input[1:], found, strict=False)):
        return None
    low = float(found[0]) if found[0] is not None else float("-inf")
    return low, float(found[1]) if found[1] is not None else float("inf")


def transposed_weights(proto: ModelProto) -> None:
    """DequantizeLinear then Transpose of a stored matrix becomes DequantizeLinear of the transposed matrix."""
    values = Values(proto)
    nodes = []
    for node in proto.graph.node:
        found = values.dequantized(node.input[0]) if node.op_type == "Transpose" else None
        stored = values.array(found[0].input[0]) if found is not None else None
        if found is None or stored is None or stored.ndim != 2:
            nodes.append(node)
            continue
        name = values.add(node.output[0] + "_stored", stored.T)
        told = {a.name: a.i for a in found[0].attribute}
        inputs = [name, *found[0].input[1:]]
        if "block_size" in told:
            inputs[1] = values.add(node.output[0] + "_scale", found[1].T)
        told["axis"] = 1 - told.get("axis", 1)
        nodes.append(helper.make_node("DequantizeLinear", inputs, [node.output[0]], **told))
    _replace_nodes(proto, nodes)


def explicit_zero_points(proto: ModelProto) -> None:
    """Gives stored weights the zero point that they do not need: ONNX Runtime fuses Gemm only where it stands."""
    values = Values(proto)
    for node in proto.graph.node:
        scale = values.array(node.input[1]) if node.op_type == "DequantizeLinear" and len(node.input) == 2 else None
        stored = values.array(node.input[0]) if scale is not None else None
        if scale is not None and stored is not None and scale.ndim < 2:
            node.input.append(values.add(f"{node.output[0]}_zero", np.zeros(scale.shape, stored.dtype)))


def four_bits(proto: ModelProto) -> None:
    """Stored integers with a scale a block that fit into four bits take no more than that."""
    values = Values(proto)
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and any(a.name == "block_size" for a in node.attribute):
            stored = values.array(node.input[0])
            if stored is not None and stored.size and stored.min() >= -8 and stored.max() <= 7:
                held = values.initializers[node.input[0]]
                held.CopyFrom(numpy_helper.from_array(stored.astype(ml_dtypes.int4), node.input[0]))


def integer_biases(proto: ModelProto) -> float:
    """Biases between a quantized input and a stored weight become int32 on the product of the two scales.

    Where that product is coarse, as for few bits, a bias would move by more than `COARSE` of the largest of its layer:
    then the biases of that layer stay float. Returns the largest change of a bias, relative to the largest of its
    layer.
    """
    values, moved, nodes = Values(proto), 0.0, []
    for node in proto.graph.node:
        if node.op_type in ("Conv", "Gemm") and len(node.input) == 3:
            act, weight, bias = (
                values.dequantized(node.input[0]),
                values.dequantized(node.input[1]),
                values.array(node.input[2]),
            )
            if act is not None and act[1].ndim == 0 and weight is not None and bias is not None and bias.ndim == 1:
                scale = (act[1].astype(np.float64) * weight[1].astype(np.float64)).astype(np.float32)
                symbols = np.round(bias.astype(np.float64) / scale)
                change = np.abs(symbols * scale - bias).max(initial=0) / max(np.abs(bias).max(initial=0), 1e-30)
                if np.abs(symbols).max(initial=0) < 2**30 and change <= COARSE:
                    moved = max(moved, float(change))
                    name = f"{node.output[0]}_bias"
                    stored = values.add(f"{name}_stored", symbols.astype(np.int32))
                    step = values.add(f"{name}_scale", scale)
                    nodes.append(helper.make_node("DequantizeLinear", [stored, step], [name], axis=0))
                    node.input[2] = name
        nodes.append(node)
    _replace_nodes(proto, nodes)
    return moved


def tidy(proto: ModelProto) -> bytes:
    """The bytes of a model without anything that depends on where it was made; equal constants are stored once."""
    seen: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    renamed: dict[str, str] = {}
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        short = tensor.name.replace(".parametrizations.weight.0.", ".weight.")
        renamed[tensor.name] = seen.setdefault((tensor.data_type, array.shape, array.tobytes()), short)
        tensor.name = short
    for node in proto.graph.node:
        _rename(node, renamed)
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    used = {name for node in proto.graph.node for name in node.input} | {o.name for o in proto.graph.output}
    kept = [t for t in proto.graph.initializer if t.name in used]
    _replace_initializers(proto, kept)
    for item in (proto, proto.graph, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    proto.graph.ClearField("value_info")
    proto.graph.name = "featherweight"
    proto.producer_name, proto.producer_version = "featherweight", ""
    return proto.SerializeToString(deterministic=True)


def name_batch(proto: ModelProto, dynamic: bool) -> None:
    """Calls the first dynamic dimension `batch`."""
    if not dynamic:
        return
    values = [*proto.graph.input, *proto.graph.output]
    symbols = [v.type.tensor_type.shape.dim[0].dim_param for v in values if v.type.tensor_type.shape.dim]
    symbol = next((s for s in symbols if s), None)
    for value in values:
        for dim in value.type.tensor_type.shape.dim:
            if symbol is not None and dim.dim_param == symbol:
                dim.dim_param = "batch"


def _rename(node: NodeProto, renamed: dict[str, str]) -> None:
    for i, name in enumerate(node.input):
        if name in renamed:
            node.input[i] = renamed[name]


def _replace_nodes(proto: ModelProto, nodes: list[NodeProto]) -> None:
    """The nodes that are left, without those whose outputs nobody reads."""
    needed = {o.name for o in proto.graph.output}
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if any(name in needed for name in node.output) or any(a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute):
            needed |= set(node.input) | _inner_reads(node)
            kept.append(node)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)


def _inner_reads(node: NodeProto) -> set[str]:
    """What the subgraphs of a node read."""
    graphs = [g for a in node.attribute for g in ([a.g] if a.type == a.GRAPH else a.graphs)]
    return {name for g in graphs for inner in g.node for name in {*inner.input, *_inner_reads(inner)}}


def _replace_initializers(proto: ModelProto, kept: list[TensorProto]) -> None:
    copies = [TensorProto.FromString(t.SerializeToString()) for t in kept]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(copies)
