"""Products of activations: matrix products and attention."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from featherweight.core.labels.flow import RULES, Call, Rescale, Val, carrier, labels_of, lay, rule
from featherweight.core.labels.movement import move
from featherweight.core.labels.weights import affine
from featherweight.core.trace import operator_name


def contract(call: Call, a: Val, da: int, b: Val, db: int) -> None:
    """The channels of a along da meet those of b along db and are summed away."""
    flow = call.flow
    (la, _), (lb, _) = flow.arrive(a, da), flow.arrive(b, db)
    tracked = [i for i in (la, lb) if i is not None and len(i) > 1]
    if not tracked:
        return
    if la is None or lb is None:
        call.pin(Val(None, tracked[0]), why="with a factor of fixed size")
        return
    flow.unions.unite(la, lb)
    if not (a.zero or b.zero):
        call.pin(Val(None, la), why="of factors that are not zero when masked")


def product(call: Call, a: Val, b: Val) -> Any:
    """Batched matrix product of two activations."""
    dims = call.value.dim()
    if a.value.dim() < 2 or b.value.dim() < 2:
        call.pin(a, b, why="with a vector")
        return Val(call.value)
    ca, cb = carrier(a.labels), carrier(b.labels)
    if -1 in (ca,) or cb == -2:
        contract(call, a, -1, b, -2)
    kept = []
    if ca is not None and ca != -1:
        kept.append((a, ca, b))
    if cb is not None and cb != -2:
        kept.append((b, cb, a))
    return Val(call.value, carried(call, kept, dims), a.zero if ca not in (None, -1) else b.zero)


def carried(call: Call, kept: list[tuple[Val, int, Val]], dims: int) -> Tensor | None:
    """Labels that pass through a product: of rows, columns, or a batch dimension that both factors share."""
    labels: Tensor | None = None
    for val, at, other in kept:
        assert val.labels is not None  # has a carrier
        own = val.labels.reshape([1] * (dims - val.labels.dim()) + list(val.labels.shape))
        shared = at < -2 and -at <= other.value.dim() and other.value.shape[at] > 1
        if shared and carrier(other.labels) != at:
            call.pin(val, why="beside a factor of fixed size")
            continue
        if labels is not None:
            if shared:
                call.flow.unions.unite(labels, own)
            else:
                labels, own = torch.broadcast_tensors(labels, own)
                call.flow.unions.unite(labels, own)
        labels = own if labels is None else labels
    return None if labels is None else call.flow.settle(labels)


@rule("matmul", "bmm", "mm")
def matmul(call: Call) -> Any:
    """With a weight on the right a linear layer, otherwise a product of activations."""
    a, b = call.args[:2]
    if b.name is not None and b.value.dim() == 2 and a.name is None:
        return affine(call, a, b, None, ins=0, outs=1)
    return product(call, call.flow.as_activation(a), call.flow.as_activation(b))


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Any:
    """Queries and keys share labels through their product, the values' pass to the output."""
    flow = call.flow
    q, k, v = map(flow.as_activation, call.args[:3])
    mask = call.arg(3, "attn_mask")
    cq, ck, cv = (carrier(x.labels) for x in (q, k, v))
    if -1 in (cq, ck):
        contract(call, q, -1, k, -1)
        if call.kwargs.get("scale") is None and q.labels is not None and ck == cq:
            rescale(call, q)
    labels: Tensor | None = None
    if cv == -1:
        labels = v.labels
        call.pin(mask, why="with a mask for every head")
    else:
        heads = [x for x, c in ((q, cq), (k, ck), (v, cv)) if c not in (None, -1)]
        sizes = {x.value.shape[-3] for x in (q, k, v) if x.value.dim() > 2}
        for x in heads:
            if carrier(x.labels) != -3 or len(heads) != 3 or len(sizes) != 1:
                call.pin(*heads, why="over another dimension than heads or their size")
        if heads and isinstance(mask, Val) and mask.value.dim() > 2 and mask.value.shape[-3] > 1:
            call.pin(*heads, mask, why="with a mask for every head")
        for x in heads[1:]:
            flow.unions.unite(*torch.broadcast_tensors(heads[0].labels, x.labels))
        labels = heads[0].labels if heads else None
    return Val(call.value, None if labels is None else flow.settle(labels), v.zero)


def rescale(call: Call, q: Val) -> None:
    """Finds the rows of the layer that make the queries, through data movement only; pins where it cannot."""
    assert q.labels is not None  # held by the caller
    node, path = call.node.args[0], []
    while isinstance(node, fx.Node) and (node.target is operator.getitem or RULES.get(operator_name(node)) is move):
        path.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or operator_name(node) != "linear":
        call.pin(q, why="with its default scale, after another operator than a linear layer")
        return
    shape = node.meta["val"].shape
    index: Any = torch.arange(shape[-1]).expand(shape)
    for step in reversed(path):
        if step.target is operator.getitem:
            index = index[step.args[1]]
        else:
            index = step.target(index.contiguous(), *step.args[1:], **step.kwargs)  # type: ignore[operator]
    names = tuple(
        call.flow.names[s.name] for s in node.args[1:3] if isinstance(s, fx.Node) and s.name in call.flow.names
    )
    call.flow.rescales.append(Rescale(names, torch.unique(index), q.labels.flatten()))


@rule("einsum")
def einsum(call: Call) -> Any:
    """Letters that are summed away meet as in a product; those that stay carry their labels on."""
    flow, vals = call.flow, [call.flow.as_activation(v) for v in call.args[1]]
    terms, result = spelled(call.args[0], [v.value.dim() for v in vals])
    found: dict[str, Tensor] = {}
    for letter in dict.fromkeys("".join(terms)):
        owners = [(v, term.index(letter)) for v, term in zip(vals, terms, strict=True) if letter in term]
        tracked = [v for v, at in owners if carrier(v.labels) == at - v.value.dim()]
        if any(term.count(letter) > 1 for term in terms) or (tracked and len(tracked) < len(owners)):
            call.pin(*tracked, why="with a factor of fixed size")
        elif tracked:
            found[letter] = labels_of(tracked[0].labels).flatten()
            for other in tracked[1:]:
                flow.unions.unite(found[letter], labels_of(other.labels).flatten())
            if letter not in result and not any(v.zero for v in tracked):
                call.pin(*tracked, why="of factors that are not zero when masked")
    labels: Tensor | None = None
    for at, letter in enumerate(result):
        if letter in found:
            own = lay(found[letter], at, len(result))
            labels = own if labels is None else labels
            flow.unions.unite(labels, own)
    kept = [v for v, term in zip(vals, terms, strict=True) if any(n in found and n in result for n in term)]
    zero = any(v.zero and carrier(v.labels) is not None for v in kept)
    return Val(call.value, None if labels is None else flow.settle(labels), zero)


def spelled(equation: str, dims: list[int]) -> tuple[list[str], str]:
    """The letters of every factor and of the result; dimensions under an ellipsis get capital letters from behind.

    >>> spelled("...ij,jk->...ik", [3, 2])
    (['Aij', 'jk'], 'Aik')
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    wide = [n - len(term.replace("...", "")) if "..." in term else 0 for term, n in zip(terms, dims, strict=True)]
    hidden = "".join(reversed(spare[: max(wide, default=0)]))
    terms = [term.replace("...", hidden[len(hidden) - n :]) for term, n in zip(terms, wide, strict=True)]
    if not arrow:
        letters = "".join(terms)
        right = "..." + "".join(sorted(c for c in dict.fromkeys(letters) if letters.count(c) == 1 and c not in hidden))
    return terms, right.replace("...", hidden)
