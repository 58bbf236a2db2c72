"""Operators that move data: executed on the labels themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featherweight.core.labels.flow import Call, Val, bare, carrier, compact, full, labels_of, lay, plain, rule


def moved(call: Call, x: Val, labels: Any) -> Any:
    """A result of data movement: settled unless it is still a weight's data."""
    if isinstance(labels, (tuple, list)):
        return tuple(moved_one(call, x, v, i) for v, i in zip(call.value, labels, strict=True))
    return moved_one(call, x, call.value, labels)


def moved_one(call: Call, x: Val, value: Tensor, labels: Tensor) -> Val:
    found = compact(labels) if x.data else call.flow.settle(labels)
    return Val(value, found, x.zero, data=x.data)


MOVES = """
    permute transpose t numpy_T matrix_H mT adjoint movedim swapaxes swapdims flatten squeeze unsqueeze flip chunk
    expand expand_as unbind repeat repeat_interleave tile pixel_shuffle pixel_unshuffle channel_shuffle
    split split_with_sizes tensor_split unsafe_split unsafe_chunk view_as reshape_as diagonal unfold select slice
    narrow roll index index_select view reshape _unsafe_view unflatten rot90 hsplit vsplit broadcast_to
"""


@rule(*MOVES.split())
def move(call: Call) -> Any:
    """Executes the operator on the labels; says what its numbers count, and pins where they could not follow."""
    flow, x = call.flow, call.args[0]
    order = permutation(call, x)
    if order is not None:
        return Val(call.value, name=x.name, dims=order)
    x = flow.as_data(x)
    if call.name == "index_select" and x.labels is None and call.args[2].name is not None:
        return Val(call.value, lay(flow.axis(call.args[2], 0), call.args[1], call.value.dim()))  # picked before
    if call.name == "expand_as" and x.labels is None:
        return widened(call, x, call.args[1])
    for other in call.values()[1:]:
        if call.name not in ("view_as", "reshape_as", "expand_as"):
            call.pin(other, why="as an index")
    if x.labels is None:
        return bare(call.value)
    if not x.data and picks_channels(call, x):
        call.pin(x, why="of single channels")
    elif call.name in ("slice", "narrow"):
        cut_out(call, x)
    labels = call.again(full(x), *plain(call.args[1:]))
    found = moved(call, x, labels)
    record(call, x, found)
    return found


def widened(call: Call, x: Val, like: Val) -> Val:
    """What is the same for all channels, repeated for each channel of another value: it follows that one's size."""
    at = carrier(like.labels)
    if at is None or (-at <= x.value.dim() and x.value.shape[at] > 1):
        return Val(call.value)
    return Val(call.value, like.labels)


def permutation(call: Call, x: Val) -> tuple[int, ...] | None:
    """The order of dimensions after a weight was transposed or permuted; None for anything else."""
    if x.name is None or x.labels is not None or call.name not in ("permute", "transpose", "t", "numpy_T", "mT"):
        return None
    grid = torch.empty(tuple(range(2, 2 + x.value.dim())), device="meta")
    shape = call.again(grid, *plain(call.args[1:])).shape
    return tuple(x.dims[n - 2] for n in shape)


def picks_channels(call: Call, x: Val) -> bool:
    """Whether the operator takes channels by number: they would be others after a removal."""
    at = carrier(x.labels)
    if at is None:
        return False
    dims, axis = x.value.dim(), at + x.value.dim()
    where = call.arg(1, "dim", 0)
    picked = {
        "select": lambda: where % dims == axis,
        "unbind": lambda: where % dims == axis,
        "index_select": lambda: where % dims == axis,
        "roll": lambda: axis in {d % dims for d in as_list(call.arg(2, "dims", [axis]))},
        "index": lambda: axis < len(where) and where[axis] is not None,
        "unfold": lambda: where % dims == axis,
        "diagonal": lambda: True,
        "rot90": lambda: True,
    }
    return bool(picked.get(call.name, lambda: False)())


def cut_out(call: Call, x: Val) -> None:
    """A part of the channels: its ends count those before them; every second one is of pairs that go together."""
    dim = call.arg(1, "dim", 0) % x.value.dim()
    ids, size = along(x, dim), x.value.shape[dim]
    if ids is None or call.value.shape == x.value.shape:
        return
    if call.name == "narrow":
        start = plain(call.arg(2, "start"))
        call.counts(2, "start", ids[:start])
        call.counts(3, "length", ids[start : start + call.value.shape[dim]])
        return
    step, start, end = plain((call.arg(4, "step", 1), call.arg(2, "start"), call.arg(3, "end")))
    if step == 1:
        call.counts(2, "start", ids[:start] if start else None)
        call.counts(3, "end", ids[:end] if isinstance(end, int) and end < size else None)
    elif size % step or not 0 <= (start or 0) < step or (isinstance(end, int) and end < size):
        call.pin(x, why="of single channels")
    else:
        blocks = ids.unflatten(0, (-1, step))
        call.flow.unions.unite(blocks[:, :1], blocks)


def as_list(dims: Any) -> list[int]:
    """One dimension or several."""
    return list(dims) if isinstance(dims, (tuple, list)) else [dims]


def along(x: Val, dim: int) -> Tensor | None:
    """The labels that a size counts: along a dimension, and of a weight's data across the others too."""
    if x.data:
        return full(x).movedim(dim, 0).flatten(1)
    return labels_of(x.labels).flatten() if carrier(x.labels) == dim - x.value.dim() else None


def record(call: Call, x: Val, found: Any) -> None:
    """What the sizes that stand in the code count, and which parts must lose equally many."""
    if call.name in ("view", "reshape", "_unsafe_view", "unflatten", "expand", "broadcast_to"):
        sizes = list(plain(call.args[2] if call.name == "unflatten" else call.arg(1, "size")))
        lead = call.args[1] % x.value.dim() if call.name == "unflatten" else found.value.dim() - len(sizes)
        index, name = (2, "sizes") if call.name == "unflatten" else (1, "size")
        call.counts(index, name, *(along(found, d + lead) for d in range(len(sizes))))
    if ("split" in call.name or "chunk" in call.name) and x.labels is not None:
        dim = call.arg(2, "dim", 0) % x.value.dim()
        if carrier(x.labels) != dim - x.value.dim():
            return
        parts = x.labels.flatten().split([v.value.shape[dim] for v in found])
        if len({len(p) for p in parts}) == 1:
            call.flow.equal.append(tuple(parts))
        elif call.name != "split_with_sizes":
            call.pin(x, why="into unequal parts")
        if "split" in call.name:
            call.counts(1, "split_size", *parts)


@rule("cat", "concat", "concatenate", "stack")
def cat(call: Call) -> Any:
    """Labels side by side; a part without labels stays, and pins the others where it lies beside their channels."""
    flow, vals, dim = call.flow, [call.flow.as_data(v) for v in call.args[0]], call.arg(1, "dim", 0)
    labelled = [v for v in vals if v.labels is not None]
    if not labelled:
        return Val(call.value)
    all_data = all(v.data for v in vals)
    axis = dim % call.value.dim()
    pieces = []
    for v in vals:
        if v.labels is not None:
            pieces.append(full(v))
            continue
        if v.value.dim() != labelled[0].value.dim():
            continue
        active = next((u for u in labelled if not u.data), labelled[0])
        at = carrier(active.labels)
        if call.name != "stack" and (at is None or at + v.value.dim() == axis):
            fresh = flow.unions.fresh(v.value.shape[axis])
            flow.pin(fresh, f"{call.name} with a constant")
            pieces.append(lay(fresh, axis, v.value.dim()).expand(v.value.shape))
        else:
            call.pin(*labelled, why="with a constant")
            like = full(active) if call.name == "stack" else full(active).narrow(axis, 0, 1)
            pieces.append(like.expand(v.value.shape))
    labels = call.again(pieces, dim)
    zero = all(v.zero for v in labelled)
    return Val(call.value, compact(labels) if all_data else flow.settle(labels), zero, data=all_data)


@rule(
    "pad",
    "constant_pad_nd",
    *(f"{kind}_pad{n}d" for kind in ("reflection", "replication", "circular") for n in (1, 2, 3)),
)
def pad(call: Call) -> Any:
    """Padding beside the channels is channels of its own, if it is zeros; elsewhere it changes nothing."""
    flow, x, amounts = call.flow, call.flow.as_data(call.args[0]), list(call.args[1])
    if x.labels is None:
        return Val(call.value)
    mode = call.arg(2, "mode", "constant") if call.name == "pad" else call.name
    value = call.arg(3, "value", 0) if call.name == "pad" else call.arg(2, "value", 0)
    zeros = mode in ("constant", "constant_pad_nd") and not value
    at = carrier(x.labels)
    if at is None and x.value.dim() > 1:
        at = 1 - x.value.dim() if call.value.shape[1] != x.value.shape[1] else None
    before, behind = (
        amounts[2 * (-at - 1) : 2 * (-at - 1) + 2] if at is not None and -at * 2 <= len(amounts) else (0, 0)
    )
    labels = x.labels
    if at is not None and (before or behind):
        if not zeros or min(before, behind) < 0:
            call.pin(x, why="beside the channels")
        ids = labels.flatten().expand(x.value.shape[at])
        front, back = flow.unions.fresh(max(before, 0)), flow.unions.fresh(max(behind, 0))
        ids = torch.cat([front, ids[max(-before, 0) : len(ids) - max(-behind, 0)], back])
        labels = lay(ids, at, x.value.dim())
        counted: list[Tensor | None] = [None] * len(amounts)
        counted[2 * (-at - 1) : 2 * (-at - 1) + 2] = [front, back]
        call.counts(1, "pad", *counted)
    return Val(call.value, flow.settle(labels), x.zero and zeros)
