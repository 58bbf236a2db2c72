"""Operators that meet pointwise: where activations meet, their labels are united."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from featherweight.core.labels.flow import Call, Val, align, carrier, compact, is_val, labels_of, lay, plain, rule
from featherweight.core.labels.weights import per_channel

POINTWISE = """
    abs acos acosh add addcdiv addcmul asin asinh atan atan2 atanh bernoulli bitwise_and bitwise_not bitwise_or ceil
    celu clamp clamp_max clamp_min clone contiguous cos cosh deg2rad detach div dropout alpha_dropout feature_dropout
    elu eq erf erfc exp exp2 expm1 empty_like floor floor_divide fmod full_like gelu ge gt hardshrink hardsigmoid
    hardswish hardtanh isfinite isinf isnan le leaky_relu lerp lift_fresh_copy log log10 log1p log2 log_sigmoid
    logical_and logical_not logical_or logical_xor logit lt masked_fill maximum minimum mish mul nan_to_num ne neg
    ones_like pow rand_like randn_like reciprocal relu relu6 remainder round rrelu rsqrt rsub selu sigmoid sign silu
    sin sinh softplus softshrink sqrt square sub tan tanh tanhshrink threshold to type_as _to_copy true_divide trunc
    where xlogy zeros_like alias view_as_real float half bfloat16 double
"""


@rule(*POINTWISE.split())
def pointwise(call: Call) -> Any:
    """Where activations meet, labels are united; a constant of full size along the channels pins them."""
    flow, out = call.flow, call.value
    given = call.values()
    vals = [flow.as_data(v) for v in given]
    sizes = [(1,) * (out.dim() - v.value.dim()) + tuple(v.value.shape) for v in vals]
    tags = [None if v.labels is None else align(v.labels, out.dim()) for v in vals]
    active = [i for i, v in enumerate(vals) if v.labels is not None and not v.data]
    active = active or [i for i, v in enumerate(vals) if v.labels is not None]
    if not active:
        return Val(out)
    varying = [d for d in range(out.dim()) if any(labels_of(tags[i]).size(d) > 1 for i in active)]
    spans = [not varying or any(size[d] > 1 for d in varying) for size in sizes]
    joined = [i for i, v in enumerate(vals) if v.labels is not None and spans[i]]
    joined.sort(key=lambda i: vals[i].data)
    base, *others = torch.broadcast_tensors(*(labels_of(tags[i]) for i in joined))
    for other in others:
        flow.unions.unite(base, other)
    for node, v, size in zip(call.nodes(), vals, sizes, strict=True):
        if v.labels is None and any(size[d] > 1 for d in varying) and not picked(call, node, v, base):
            flow.pin(base, f"{call.name} with a constant of the same size")
            return Val(out)
    still_data = all(vals[i].data for i in joined) and all(v.value.numel() == 1 for v in vals if v.labels is None)
    labels = flow.unions.find(base) if still_data else flow.settle(base)
    return Val(out, labels, keeps_zero(call, [given[i] for i in joined if vals[i].zero]), data=still_data)


def picked(call: Call, node: Any, x: Val, labels: Tensor) -> bool:
    """Whether a constant can be cut to the channels that it meets (labels, of as many dimensions as the result)."""
    at = carrier(labels)
    if at is None or compact(labels).numel() != labels.size(at):
        return False
    ids = call.flow.constant(call.node, node, at + x.value.dim(), x.value.shape[at])
    if ids is not None:
        call.flow.unions.unite(lay(ids, at, labels.dim()), labels)
    return ids is not None


SAMPLES = (-1.7, -0.3, 0.0, 0.6, 1.7)


def keeps_zero(call: Call, zeros: Sequence[Val]) -> bool:
    """Whether the result of a pointwise operator is zero where these arguments are: tried on a few numbers.

    The other arguments take every combination of numbers of both signs and zero (but for divisors), true and false.
    """
    others = [v for v in call.values() if not any(v is z for z in zeros)]
    if not zeros or len(others) > 4:
        return False
    numbers = [n for n in SAMPLES if n or call.name not in ("div", "true_divide", "floor_divide", "remainder", "fmod")]
    grid = torch.cartesian_prod(*[torch.tensor(numbers)] * max(len(others), 1)).reshape(-1, max(len(others), 1))

    def sample(x: Any) -> Any:
        if not isinstance(x, Val) or not isinstance(x.value, Tensor):
            return plain(x)
        place = next((i for i, v in enumerate(others) if v is x), None)
        if place is None:
            return torch.zeros(len(grid), dtype=x.value.dtype)
        column = grid[:, place]
        return column > 0 if x.value.dtype == torch.bool else column.to(x.value.dtype)

    args, kwargs = (pytree.tree_map(sample, tree, is_leaf=is_val) for tree in (call.args, call.kwargs))
    try:
        return not bool(call.node.target(*args, **kwargs).to(torch.float64).any())  # type: ignore[operator]
    except (RuntimeError, TypeError, AttributeError):
        return False


@rule("prelu")
def prelu(call: Call) -> Any:
    """A slope for every channel, or one for all."""
    x, slope = call.args[:2]
    if slope.value.numel() > 1:
        return per_channel(call, x, [slope], 1, zero=True)
    return Val(call.value, x.labels, x.zero)


@rule("cumsum", "softmax", "_softmax", "log_softmax", "_log_softmax")
def along(call: Call) -> Any:
    """Pointwise in every dimension but one."""
    x, dim = call.args[0], call.arg(1, "dim")
    labels, elsewhere = call.flow.arrive(x, dim)
    if labels is not None and not elsewhere and call.value.shape[dim] > 1 and carrier(x.labels) is not None:
        call.pin(x, why="over the channels")
    return Val(call.value, x.labels, x.zero and call.name == "cumsum")
