"""Reductions, pooling and resampling: dimensions other than the channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from featherweight.core.labels.flow import Call, Val, bare, carrier, full, rule
from featherweight.core.labels.movement import as_list
from featherweight.core.labels.pointwise import pointwise
from featherweight.core.trace import operator_name

SUMS = ("sum", "linalg_vector_norm", "norm")  # zeros add nothing to them


@rule(
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "logsumexp",
    "linalg_vector_norm",
    "norm",
    "prod",
    "any",
    "all",
)
def reduce(call: Call) -> Any:
    """Over other dimensions labels stay.

    Over the channels a sum or a norm may run where they are zero when masked; a mean or a variance where it is the
    statistic of a norm written by hand, which is then taken over the channels that stay. Nothing else may.
    """
    if call.name in ("max", "min") and len(call.args) > 1 and isinstance(call.args[1], Val):
        return pointwise(call)
    x = call.flow.as_data(call.args[0])
    if x.labels is None:
        return bare(call.value)
    position = 2 if call.name in ("linalg_vector_norm", "norm") else 1
    given = call.arg(position, "dim")
    n = x.value.dim()
    dims = {d % n for d in as_list(given)} if given not in (None, []) and n else set(range(n))
    axes = {d for d in range(n) if x.labels.size(d) > 1}
    results = call.value if isinstance(call.value, (tuple, list)) else (call.value,)
    if axes & dims:
        if is_statistic(call.node):
            call.flow.norms[call.node.name] = x.labels
        elif not (call.name in SUMS and x.zero and not x.data):
            call.pin(x, why="over the channels")
        found = tuple(Val(v) for v in results)
    else:
        labels = x.labels
        for d in sorted(dims, reverse=True):
            labels = labels.narrow(d, 0, 1) if results[0].dim() == n else labels.select(d, 0)
        zero = x.zero and call.name not in ("prod", "logsumexp", "any", "all")
        found = tuple(Val(v, labels, zero, data=x.data) for v in results)
    return found if isinstance(call.value, (tuple, list)) else found[0]


# What may lie between a mean and the value that it scales, in a norm written by hand.
BETWEEN = ("add", "to", "_to_copy", "clamp_min", "clamp", "maximum", "detach", "expand", "getitem", "mul", "unsqueeze")
EXPONENTS = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}
CASTS = ("to", "_to_copy", "float", "double", "type_as", "contiguous", "detach", "alias", "clone")


def is_statistic(node: fx.Node) -> bool:
    """Whether a mean or a variance is that of a norm: subtracted from its own values, or its root divides those.

    Recognised on the graph, for a mean that means something else (a map of attention, say) is another network when it
    is taken over fewer channels.
    """
    name = operator_name(node)
    if name not in ("mean", "var", "var_mean", "std", "std_mean") or not node.users:
        return False
    power = 0.5 if name.startswith("std") else 1.0
    return all(_norms(user, node, node, power) for user in node.users)


def _norms(node: fx.Node, source: fx.Node, statistic: fx.Node, power: float) -> bool:
    """Whether what is made of a statistic ends as a norm does.

    Args:
        source: what of the statistic enters here.
        power: to which it was raised on the way, a standard deviation being the half power of a variance.
    """
    name, size = operator_name(node), source.meta["val"]
    tensors = [a for a in node.args if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), Tensor)]
    if any(a is not source and a.meta["val"].numel() > size.numel() for a in tensors if isinstance(size, Tensor)):
        return _ends_a_norm(node, name, source, statistic, power)
    if name == "pow" and isinstance(node.args[1], (int, float)):
        power *= node.args[1]
    elif name in EXPONENTS:
        power *= EXPONENTS[name]
    elif name not in BETWEEN:
        return False
    return bool(node.users) and all(_norms(u, node, statistic, power) for u in node.users)


def _ends_a_norm(node: fx.Node, name: str, source: fx.Node, statistic: fx.Node, power: float) -> bool:
    """Whether values meet their own statistic: less their mean, or over their mean or their deviation."""
    value = next(a for a in node.args if a is not source)
    inside = _bare(statistic.args[0])
    kind = operator_name(statistic)
    if not isinstance(value, fx.Node) or kind.endswith("_mean"):
        return (
            isinstance(value, fx.Node) and _bare(value) in (inside, *_centred(inside)) and name in ("sub", "mul", "div")
        )
    if kind == "mean" and power == 1.0:
        return name in ("sub", "div") and node.args[0] is value and _bare(value) is inside
    squared = _base_of_square(inside) if kind == "mean" else inside
    if squared is None:
        return False
    whole = [_bare(squared.args[0])] if _is_centred(squared) else []
    own = _bare(value) in (squared, *_centred(squared), *whole, *(c for w in whole for c in _centred(w)))
    return own and ((name == "mul" and power == -0.5) or (name == "div" and power == 0.5 and node.args[0] is value))


def _bare(node: Any) -> Any:
    """The value behind casts and copies."""
    while isinstance(node, fx.Node) and operator_name(node) in CASTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _base_of_square(node: Any) -> Any:
    """What was squared, or None."""
    if not isinstance(node, fx.Node):
        return None
    name = operator_name(node)
    if name == "square" or (name == "pow" and node.args[1] == 2):
        return _bare(node.args[0])
    return _bare(node.args[0]) if name == "mul" and _bare(node.args[0]) is _bare(node.args[1]) else None


def _is_centred(node: Any) -> bool:
    return isinstance(node, fx.Node) and operator_name(node) == "sub"


def _centred(node: Any) -> list[fx.Node]:
    """Values less their mean, as far as the graph has them."""
    users, seen = [node] if isinstance(node, fx.Node) else [], []
    while users:
        one = users.pop()
        for user in one.users:
            if operator_name(user) in CASTS:
                users.append(user)
            elif operator_name(user) == "sub" and _bare(user.args[0]) is node:
                seen.append(user)
    return seen


@rule(
    *(
        f"{kind}_pool{n}d"
        for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp", "_adaptive_avg")
        for n in (1, 2, 3)
    ),
    *(f"max_pool{n}d_with_indices" for n in (2, 3)),
    *(
        f"upsample_{kind}"
        for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d", "trilinear3d")
    ),
    *(f"_upsample_{kind}" for kind in ("nearest_exact1d", "nearest_exact2d", "bilinear2d_aa", "bicubic2d_aa")),
    "grid_sampler",
)
def spatial(call: Call) -> Any:
    """Pooling and resampling: works on the last dimensions, channel by channel."""
    x = call.flow.as_data(call.args[0])
    if x.labels is None:
        return bare(call.value)
    last = 3 if "3d" in call.name else 1 if "1d" in call.name else 2
    at = carrier(x.labels)
    call.pin(*call.values()[1:])
    if at is not None and -at <= last:
        if (pooled := windows(call, x)) is not None:
            return Val(call.value, pooled, x.zero)
        call.pin(x, why="over the channels")
    labels = x.labels if at is None or -at > last else x.labels.flatten()[:1].reshape([1] * x.value.dim())
    if isinstance(call.value, (tuple, list)):
        return tuple(Val(v, labels, x.zero) for v in call.value)
    return Val(call.value, labels, x.zero)


def windows(call: Call, x: Val) -> Tensor | None:
    """The channels of windows side by side along the last dimension, if each lies within one, as in a flattened map."""
    if x.labels is None or call.name not in ("avg_pool1d", "max_pool1d") or carrier(x.labels) != -1:
        return None
    size, stride, padding = (
        _one(call.arg(i, name, 0)) for i, name in ((1, "kernel_size"), (2, "stride"), (3, "padding"))
    )
    if stride not in (0, size) or padding or _one(call.arg(4, "dilation", 1)) > 1 or x.value.shape[-1] % size:
        return None
    held = x.labels.unflatten(-1, (-1, size))
    return held[..., 0] if bool((held == held[..., :1]).all()) else None


def _one(value: Any) -> int:
    """A setting that is a number, or a list of one; an empty list is none."""
    return int((*value, 0)[0]) if isinstance(value, (list, tuple)) else int(value)


@rule("glu")
def glu(call: Call) -> Any:
    """The first half times the sigmoid of the second."""
    flow, x, dim = call.flow, call.flow.as_data(call.args[0]), call.arg(1, "dim", -1)
    if x.labels is None:
        return Val(call.value)
    a, b = full(x).chunk(2, dim)
    flow.unions.unite(a, b)
    return Val(call.value, flow.settle(a), x.zero)
