"""Pairs of layers between which a positive scale per channel can move without any change of the function.

Between the two stands only what commutes with positive scales, `f(s x) = s f(x)`: ReLU and its leaky kin, pooling,
reshaping. A chain of convolution, depthwise convolution, convolution is two pairs that share their middle layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx, nn

from featherweight.core.forms import Mask, activation_forms, codes_of, form_names, forms_of
from featherweight.core.surgery import altered
from featherweight.core.trace import graph_inputs, operator_name, trace

Weighted: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
SCALED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Operators of one tensor that commute with positive scales of its channels and leave these where they are.
ACTIVATIONS = {"relu", "leaky_relu"}
POOLS = {
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)),
    *("mean", "constant_pad_nd", "pad"),
}
IDLE = {"dropout", "clone", "detach", "alias", "contiguous", "detach_"}
SHAPES = {"flatten", "view", "reshape", "_unsafe_view", "squeeze", "unsqueeze"}


@dataclass(frozen=True)
class Pair:
    """Two layers, by path; `columns` of the second's inputs are one output of the first; `through`: what is between."""

    first: str
    second: str
    columns: int = 1
    through: tuple[str, ...] = ()


def on_grids(model: nn.Module) -> bool:
    """Whether grids or codes, on weights or activations, fit the present scales of a model, which would lose them."""
    forms = (form for module in model.modules() for name in form_names(module) for form in forms_of(module, name))
    held = any(codes_of(module) is not None for module in model.modules())
    return held or bool(activation_forms(model)) or any(not isinstance(form, Mask) for form in forms)


def find_pairs(model: nn.Module, example_inputs: Any) -> tuple[list[Pair], dict[str, str]]:
    """All pairs of a plain model, in order, and for every other layer why it is the first of none.

    Raises:
        TraceError: the model cannot be traced.
        BadData: it holds forms.
    """
    program = trace(model, example_inputs)
    names = graph_inputs(program).tensors
    layers = {path: m for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, SCALED)}
    calls: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if path := _layer(node, names, layers):
            calls.setdefault(path, []).append(node)
    places = {nodes[0]: path for path, nodes in calls.items()}
    refused = {path: why for path in calls if (why := _refusal(path, layers, calls[path]))}
    pairs, reasons = [], dict(refused)
    for path, nodes in calls.items():
        if path not in refused:
            found = _follow(path, nodes[0], places, refused, layers)
            if isinstance(found, Pair):
                pairs.append(found)
            else:
                reasons[path] = found
    return pairs, reasons


def _layer(node: fx.Node, names: dict[str, str], layers: dict[str, Weighted]) -> str:
    """The path of the layer that a node computes, or nothing."""
    if node.op != "call_function" or len(node.args) < 2 or not isinstance(node.args[1], fx.Node):
        return ""
    name = operator_name(node)
    if name != "linear" and not name.startswith("conv"):
        return ""
    path = names.get(node.args[1].name, "").rpartition(".")[0]
    return path if path in layers else ""


def _refusal(path: str, layers: dict[str, Weighted], nodes: list[fx.Node]) -> str:
    layer = layers[path]
    if len(nodes) > 1:
        return "it is called more than once"
    if sum(other.weight is layer.weight for other in {id(m): m for m in layers.values()}.values()) > 1:
        return "its weight is shared with another layer"
    return altered(layer)


def _follow(
    path: str, node: fx.Node, places: dict[fx.Node, str], refused: dict[str, str], layers: dict[str, Weighted]
) -> Pair | str:
    """The pair that a layer is the first of, or why there is none."""
    channels = layers[path].weight.shape[0]
    dim = node.meta["val"].dim() - 1 if isinstance(layers[path], nn.Linear) else 1
    if not isinstance(layers[path], nn.Linear) and node.meta["val"].dim() != layers[path].weight.dim():
        return "its inputs have no batch dimension"
    through: list[str] = []
    while len(node.users) == 1:
        node, before = next(iter(node.users)), node
        if node in places and node.args[0] is before:
            second = places[node]
            if second in refused:
                return f"{second}, which follows, cannot be scaled: {refused[second]}"
            return _pair(path, second, channels, dim, before, layers, tuple(through))
        if why := _minds(node, before, dim):
            return why
        through.append(operator_name(node))
    return "several operators read what it puts out" if node.users else "nothing reads it"


def _minds(node: fx.Node, before: fx.Node, dim: int) -> str:
    """Why an operator does not commute with scales of the channels of its input; empty if it does."""
    name = operator_name(node) if node.op == "call_function" else "the model's output"
    seen = before.meta["val"]
    if name not in ACTIVATIONS | POOLS | IDLE | SHAPES or node.args[0] is not before:
        return f"what follows is {name}, which does not commute with scales of its channels"
    if name in SHAPES and not _keeps(seen, node.meta["val"], dim):
        return f"{name} moves its channels"
    if name == "mean" and (dim in _dims(node, seen.dim()) or not _dims(node, 1)):
        return "mean goes over its channels"
    if name in {"constant_pad_nd", "pad"} and [a for a in node.args[2:] if a not in (0, 0.0, "constant", None)]:
        return "what it puts out is padded with something else than zeros"
    return ""


def _dims(node: fx.Node, dims: int) -> list[int]:
    given = node.args[1] if len(node.args) > 1 else []
    return [cast(int, d) % dims for d in (given if isinstance(given, (list, tuple)) else [given])]


def _keeps(before: Tensor, after: Tensor, dim: int) -> bool:
    """Whether a change of shape leaves channels as runs of equal length in the same dimension."""
    if before.shape == after.shape:
        return True
    if dim != 1 or after.dim() < 2 or before.shape[0] != after.shape[0]:
        return False
    kept = after.shape[1] == before.shape[1] and prod(after.shape[2:]) == prod(before.shape[2:])
    return kept or (after.dim() == 2 and after.shape[1] == prod(before.shape[1:]))


def _pair(
    path: str,
    second: str,
    channels: int,
    dim: int,
    before: fx.Node,
    layers: dict[str, Weighted],
    through: tuple[str, ...],
) -> Pair | str:
    reads = layers[second]
    last = isinstance(reads, nn.Linear)
    width = reads.in_features if isinstance(reads, nn.Linear) else reads.in_channels
    if (before.meta["val"].dim() - 1 if last else 1) != dim or width % channels:
        return f"{second}, which follows, reads another dimension than it puts out"
    return Pair(path, second, width // channels, through)


# --- scales -----------------------------------------------------------------------------------------------------------


def rows(layer: Weighted) -> Tensor:
    """The weight as (outputs, what makes each)."""
    return layer.weight.detach().flatten(1)


def incoming(layer: Weighted, columns: int) -> Tensor:
    """The weight as (channels that it reads, what reads each), `columns` inputs being one channel."""
    weight = layer.weight.detach()
    groups = getattr(layer, "groups", 1)
    by_group = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).transpose(1, 2)
    return by_group.reshape(groups * weight.shape[1] // columns, -1)


def ranges(model: nn.Module, pair: Pair) -> tuple[Tensor, Tensor]:
    """`max|W|` of every channel in the first layer, that makes it, and in the second, that reads it."""
    first, second = layers_of(model, pair)
    return rows(first).abs().amax(1).double(), incoming(second, pair.columns).abs().amax(1).double()


def layers_of(model: nn.Module, pair: Pair) -> tuple[Weighted, Weighted]:
    """The two layers."""
    return cast(Weighted, model.get_submodule(pair.first)), cast(Weighted, model.get_submodule(pair.second))


@torch.no_grad()
def scale(model: nn.Module, pair: Pair, by: Tensor) -> None:
    """Divides every channel of the first layer by its positive scale, multiplies what reads it in the second."""
    first, second = layers_of(model, pair)
    out = by.view(-1, *[1] * (first.weight.dim() - 1))
    first.weight.copy_(first.weight.double() / out)
    if first.bias is not None:
        first.bias.copy_(first.bias.double() / by)
    groups = getattr(second, "groups", 1)
    read = by.repeat_interleave(pair.columns).view(groups, 1, -1)
    spread = read.expand(-1, second.weight.shape[0] // groups, -1).reshape(second.weight.shape[:2])
    second.weight.copy_(second.weight.double() * spread.view(*spread.shape, *[1] * (second.weight.dim() - 2)))


def equalize_pairs(
    model: nn.Module, pairs: Iterable[Pair], tolerance: float = 1e-3, passes: int = 50
) -> tuple[dict[str, Tensor], int]:
    """Scales every pair so that its two layers have the same range in every channel.

    `s_i = sqrt(r1_i / r2_i)` (Nagel et al., ICCV 2019, eq. 11), pair after pair, until no scale changes by more than
    `tolerance`. A channel that one of the two has as zeros only is left alone.

    Returns:
        By what each first layer's channels were divided in all, and how many passes it took.
    """
    held = list(pairs)
    total = {pair.first: torch.ones(len(ranges(model, pair)[0]), dtype=torch.float64) for pair in held}
    done, largest = 0, float("inf")
    while largest >= tolerance and done < passes:
        done, largest = done + 1, 0.0
        for pair in held:
            made, read = ranges(model, pair)
            alive = (made > 0) & (read > 0)
            by = torch.where(alive, (made / read.where(alive, torch.ones_like(read))).sqrt(), 1.0)
            largest = max(largest, float(by.log().abs().max()))
            scale(model, pair, by)
            total[pair.first] *= by.cpu()
    return total, done
