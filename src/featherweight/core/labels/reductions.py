"""Reductions, pooling and resampling: dimensions other than the channels."""

from __future__ import annotations

from typing import Any

from featherweight.core.labels.flow import Call, Val, bare, carrier, full, rule
from featherweight.core.labels.movement import as_list
from featherweight.core.labels.pointwise import pointwise


@rule(
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "var",
    "std",
    "logsumexp",
    "linalg_vector_norm",
    "norm",
    "prod",
    "any",
    "all",
)
def reduce(call: Call) -> Any:
    """Over other dimensions labels stay; a sum may run over channels that are zero when masked, nothing else may."""
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
        if not (call.name == "sum" and x.zero and not x.data):
            call.pin(x, why="over the channels")
        found = tuple(Val(v) for v in results)
    else:
        labels = x.labels
        for d in sorted(dims, reverse=True):
            labels = labels.narrow(d, 0, 1) if results[0].dim() == n else labels.select(d, 0)
        zero = x.zero and call.name not in ("prod", "logsumexp", "any", "all")
        found = tuple(Val(v, labels, zero, data=x.data) for v in results)
    return found if isinstance(call.value, (tuple, list)) else found[0]


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
        call.pin(x, why="over the channels")
    labels = x.labels if at is None or -at > last else x.labels.flatten()[:1].reshape([1] * x.value.dim())
    if isinstance(call.value, (tuple, list)):
        return tuple(Val(v, labels, x.zero) for v in call.value)
    return Val(call.value, labels, x.zero)


@rule("glu")
def glu(call: Call) -> Any:
    """The first half times the sigmoid of the second."""
    flow, x, dim = call.flow, call.flow.as_data(call.args[0]), call.arg(1, "dim", -1)
    if x.labels is None:
        return Val(call.value)
    a, b = full(x).chunk(2, dim)
    flow.unions.unite(a, b)
    return Val(call.value, flow.settle(a), x.zero)
