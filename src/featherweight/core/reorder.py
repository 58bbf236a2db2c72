"""Channels that may trade places, and a new order for them: the network computes what it did.

What a removal knows of coupled layers a new order needs too: rows of one weight, columns of the next, norms between
them, copies of a channel across views. Channels may trade places if they appear in the same places of the network,
equally often (within one group of a grouped convolution or norm, say).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.core.channels import Channels, Lab, kinds, verdict
from featherweight.core.forms import Affine, Codes, Product, Table, codes_of, declare_codes
from featherweight.core.ledger import skip
from featherweight.core.surgery import WEIGHTED, Where, targets
from featherweight.core.task import as_call
from featherweight.core.trace import weight_tensors
from featherweight.errors import BadOption, CompressionError


@dataclass(frozen=True)
class Exchange:
    """Channels that may trade places, in the order of their places, and the weight whose rows make them.

    `places` are the rows of that weight, (channels, rows of each).
    """

    name: str
    members: Tensor
    places: Tensor


def exchanges(model: nn.Module, channels: Channels) -> list[Exchange]:
    """The sets of channels that may trade places, inputs before outputs; each was tried on a copy of the model.

    What has to stay is skipped aloud: channels that appear in places of their own, constants, weights whose codes are
    for runs of entries, and whatever the network's code does not follow.
    """
    fixed = _fixed(model, channels)
    lab = Lab(model, channels)
    args, kwargs = as_call(lab.inputs)
    with torch.no_grad(), lab.precision():
        expected = pytree.tree_leaves(lab.model(*args, **kwargs))
    found = []
    for members in kinds(channels):
        chosen = _maker(model, channels, members)
        if len(members) < 2 or chosen is None or not _even(channels, members):
            continue
        if reason := next((fixed[c] for c in members.tolist() if c in fixed), _moved(lab, channels, members, expected)):
            skip(chosen.name.rpartition(".")[0], f"its channels keep their order: {reason}")
        else:
            found.append(chosen)
    turn = {name: i for i, (name, _) in enumerate(channels.axes)}
    return sorted(found, key=lambda one: turn[one.name])


def chosen(found: Sequence[Exchange], model: nn.Module, where: Where) -> list[Exchange]:
    """Those whose rows are in layers that `where` chooses.

    Raises:
        BadOption: there are none.
    """
    paths = targets(model, where, WEIGHTED)
    kept = [one for one in found if one.name.rpartition(".")[0] in paths]
    if not kept:
        raise BadOption("no hidden units may trade places in the layers that were chosen: leave this method out")
    return kept


def _fixed(model: nn.Module, channels: Channels) -> dict[int, str]:
    """Channels that no new order is known for, and why."""
    reasons: dict[int, str] = {}
    for constant in channels.constants:
        reasons |= dict.fromkeys(constant.ids.tolist(), "the network computes something of its own for each")
    for (name, dim), ids in channels.axes.items():
        codes = _codes(model, name)
        if codes is not None and _in_runs(codes, dim):
            reasons |= dict.fromkeys(ids.tolist(), f"the codes of {name} stand for several weights each")
    return reasons


def _in_runs(codes: Codes, dim: int) -> bool:
    """Whether codes are for runs of entries that a new order along this dimension would tear apart."""
    if isinstance(codes.rule, Affine) and codes.rule.block and codes.rule.scale.numel() > 1:
        return dim != 0 or prod(codes.shape[1:]) % codes.rule.block != 0
    return isinstance(codes.rule, Product) and (dim != 0 or codes.rule.axis is not None)


def _maker(model: nn.Module, channels: Channels, members: Tensor) -> Exchange | None:
    """The first layer whose rows make all these channels and whose columns are none of them."""
    for (name, dim), ids in channels.axes.items():
        module, _, key = name.rpartition(".")
        if dim or key != "weight" or not isinstance(model.get_submodule(module), WEIGHTED):
            continue
        columns = channels.blocks.get(name, channels.axes.get((name, 1), ids[:0]))
        rows = [(ids == c).nonzero().flatten() for c in members.tolist()]
        if all(len(row) for row in rows) and not torch.isin(columns, members).any():
            return Exchange(name, members, torch.stack(rows)) if len({len(row) for row in rows}) == 1 else None
    return None


def _even(channels: Channels, members: Tensor) -> bool:
    """Whether each appears equally often wherever any does."""
    vectors = [*channels.axes.values(), *(row for table in channels.blocks.values() for row in table)]
    counts = (torch.bincount(ids[ids >= 0], minlength=channels.count)[members] for ids in vectors)
    return all(bool((count == count[0]).all()) for count in counts)


def _moved(lab: Lab, channels: Channels, members: Tensor, expected: Sequence[object]) -> str | None:
    """Why the copy computes something else with these channels in reverse, or None; the copy is as it was."""
    back = members.flip(0)
    with torch.no_grad(), lab.precision():
        _reorder(lab.model, channels, members, back)
        wrong = verdict(lab.model, lab.inputs, expected, lab.tolerance)
        _reorder(lab.model, channels, members, back)
    return None if wrong is None else wrong.replace("a removal", "a new order")


@torch.no_grad()
def reorder(model: nn.Module, channels: Channels, members: Tensor, order: Tensor) -> None:
    """Puts the channel `members[order[i]]` where `members[i]` was, in place, with all that goes with it and its codes.

    `channels` is as true of the model afterwards as before: its numbers are those of places.

    Raises:
        CompressionError: the codes of a weight did not come along (a defect: nothing that a caller can do leads here).
    """
    named = {name: codes for name in weight_tensors(model) if (codes := _codes(model, name)) is not None}
    for name, takes in _reorder(model, channels, members, members[order]).items():
        if name in named:
            module, _, key = name.rpartition(".")
            codes = _taken_codes(named[name], takes)
            if not torch.equal(codes.decode(), weight_tensors(model)[name].detach().cpu()):
                raise CompressionError(f"the codes of {name} did not follow its weights: report this")
            declare_codes(model.get_submodule(module), key, codes)


def _codes(model: nn.Module, name: str) -> Codes | None:
    module, _, key = name.rpartition(".")
    return codes_of(model.get_submodule(module), key)


Take = tuple[int, Tensor]
"""A dimension and the entry that each place of it takes; (groups, inputs of a group) where each group has its own."""


def _reorder(model: nn.Module, channels: Channels, members: Tensor, sources: Tensor) -> dict[str, list[Take]]:
    """Moves all tensors; what each takes, by every name it has."""
    table = torch.arange(channels.count + 1)
    table[members] = sources
    table[-1] = -1
    takes: dict[str, list[Take]] = {}
    for name, dim, ids in _vectors(channels):
        if torch.isin(ids, members).any():
            rows = torch.stack([_take(row, table) for row in ids.reshape(-1, ids.shape[-1])])
            takes.setdefault(name, []).append((dim, rows.view(ids.shape)))
    weights = weight_tensors(model)
    shared = {id(weights[name]): own for name, own in takes.items()}  # a tied tensor moves once
    for tensor in {id(weights[name]): weights[name] for name in takes}.values():
        tensor.copy_(_taken(tensor, shared[id(tensor)]))
    return {name: shared[id(tensor)] for name, tensor in weights.items() if id(tensor) in shared}


def _vectors(channels: Channels) -> Iterator[tuple[str, int, Tensor]]:
    for (name, dim), ids in channels.axes.items():
        yield name, dim, ids
    for name, groups in channels.blocks.items():
        yield name, 1, groups


def _take(ids: Tensor, table: Tensor) -> Tensor:
    """Which entry each place of a vector takes: the k-th of a channel takes the k-th of the one that comes there."""
    take = torch.empty_like(ids)
    take[table[ids].argsort(stable=True)] = ids.argsort(stable=True)
    return take


def _taken(tensor: Tensor, takes: Sequence[Take]) -> Tensor:
    """A tensor in a new order."""
    for dim, index in takes:
        if index.dim() == 1:
            tensor = tensor.index_select(dim, index.to(tensor.device))
        else:
            groups = zip(tensor.unflatten(0, (len(index), -1)), index.to(tensor.device), strict=True)
            tensor = torch.cat([group.index_select(dim, own) for group, own in groups])
    return tensor


def _taken_codes(codes: Codes, takes: Sequence[Take]) -> Codes:
    """The codes of a weight that was put into a new order."""
    rule = codes.rule
    if isinstance(rule, Product):  # rows alone, each of them whole
        rows = codes.symbols.dim() - 2
        return replace(codes, symbols=_taken(codes.symbols, [(rows, index) for _, index in takes]))
    symbols = _taken(codes.symbols.view(codes.shape), takes).view(codes.symbols.shape)
    along = [(0, index) for dim, index in takes if dim == rule.axis]
    if isinstance(rule, Table):
        return replace(codes, symbols=symbols, rule=replace(rule, values=_taken(rule.values, along)))
    if rule.block:
        along = [(0, index) for dim, index in takes if dim == 0]
    scale, zero = (_in_rows(one, codes.shape[0] if rule.block else 0, along) for one in (rule.scale, rule.zero_point))
    return replace(codes, symbols=symbols, rule=replace(rule, scale=scale, zero_point=zero))


def _in_rows(values: Tensor, rows: int, takes: Sequence[Take]) -> Tensor:
    """Scales or zero points in a new order: one for each index, or several for each of `rows` rows."""
    if values.numel() == 1:
        return values
    return _taken(values.view(rows or len(values), -1), takes).reshape(values.shape)
