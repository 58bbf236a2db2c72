"""Weights that are computed of others, entry by entry: a direction times a length, a weight less its mean.

Such a weight is cut by cutting what it is made of. Its statistics are taken over what stays, as those of a norm are.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, fx
from torch.export import ExportedProgram

from featherweight.core.trace import operator_name

CONSUMERS = ("linear", *(f"conv{n}d" for n in (1, 2, 3)), *(f"conv_transpose{n}d" for n in (1, 2, 3)))
ENTRYWISE_NAMES = """
    abs add clamp clamp_min clamp_max clone contiguous detach div exp log mul neg pow reciprocal relu rsqrt sigmoid sign
    softplus sqrt square sub tanh to _to_copy type_as alias _weight_norm lift_fresh_copy getitem
"""
ENTRYWISE = ENTRYWISE_NAMES.split()
STATISTICS = ("mean", "var", "std", "var_mean", "std_mean")
SUMS = ("sum", "linalg_vector_norm", "norm")


def computed_weights(program: ExportedProgram, weights: Collection[str]) -> set[fx.Node]:
    """The nodes that compute weights of layers out of weights, and nothing else.

    Args:
        weights: placeholders that are parameters or buffers.
    """
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "call_function" and operator_name(node) in (*ENTRYWISE, *STATISTICS, *SUMS):
            tensors = [a for a in node.all_input_nodes if _size(a) > 1]
            if tensors and all(a in found or _is_weight(a, weights) for a in tensors):
                found.add(node)
    while leaking := {n for n in found if not _stays_within(n, found, weights)}:
        found -= leaking
    return found


def _size(node: fx.Node) -> int:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return value.numel() if isinstance(value, Tensor) else 0


def _is_weight(node: fx.Node, weights: Collection[str]) -> bool:
    value = node.meta.get("val")
    return node.name in weights and isinstance(value, Tensor) and value.is_floating_point()


def _stays_within(node: fx.Node, found: set[fx.Node], weights: Collection[str]) -> bool:
    """Whether a node and the weights that it takes are used for nothing else, and all that it takes still counts."""
    own = [a for a in node.all_input_nodes if _size(a) > 1]
    alone = all(user in found for a in own if a not in found for user in a.users)
    return (
        alone and all(a in found or a.name in weights for a in own) and all(_serves(node, u, found) for u in node.users)
    )


def _serves(node: fx.Node, user: fx.Node, found: set[fx.Node]) -> bool:
    consumed = user.op == "call_function" and operator_name(user) in CONSUMERS and user.args[1] is node
    return user in found or (consumed and all(a is not node for i, a in enumerate(user.args) if i != 1))
