"""More channels than a network has, and the same function: copies that share what is read of their original."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.core.channels import HALF, Channels, assign, holders, sizes_of, verdict
from featherweight.core.rewiring import picking
from featherweight.core.task import as_call, device_of, eval_mode
from featherweight.core.trace import weight_tensors
from featherweight.core.wired import Wired

Undo = list[Callable[[], None]]

READS: dict[type[nn.Module], int] = {nn.Linear: 1, nn.Conv1d: 1, nn.Conv2d: 1, nn.Conv3d: 1}
READS |= dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 0)


def spread(ids: Tensor, copies: Tensor) -> Tensor:
    """For each entry of a widened vector of channels, the entry that it comes from; copies stand behind originals.

    Neighbouring entries of one channel (a map that was flattened) are copied as a whole.

    Args:
        ids: the channel of each entry, -1 for those that are no channel.
        copies: how many times each channel is there afterwards (count,).

    >>> spread(torch.tensor([0, 0, 1, 1, -1]), torch.tensor([2, 1])).tolist()
    [0, 1, 0, 1, 2, 3, 4]
    """
    times = torch.cat([copies, copies.new_ones(1)])[ids].tolist()
    found: list[int] = []
    start = 0
    for end in range(1, len(times) + 1):
        if end == len(times) or ids[end] != ids[start] or ids[start] < 0:
            found += list(range(start, end)) * times[start]
            start = end
    return torch.tensor(found, dtype=torch.long)


def again(ids: Tensor, copies: Tensor) -> Tensor:
    """Which entries of the widened vector are copies, not originals (new length,), bool.

    >>> again(torch.tensor([1, 0]), torch.tensor([1, 3])).tolist()
    [False, True, True, False]
    """
    index = spread(ids, copies).tolist()
    first = {entry: place for place, entry in reversed(list(enumerate(index)))}
    return torch.tensor([first[entry] != place for place, entry in enumerate(index)], dtype=torch.bool)


def widen_channels(model: nn.Module, copies: Tensor, channels: Channels) -> str:
    """Gives each channel so many places, in place; what reads it shares its weights among them: `w / copies`.

    With g the entry that each new one comes from, a layer becomes `U = W[g]` (biases, norms and whatever else is held
    for each channel alike), the next one `U = W[:, g] / copies[g]`.

    Args:
        copies: of each channel (count,), at least 1.
        channels: of this model as it is, from `channel_groups`.

    Returns:
        Why the model's outputs would move, after which it is as it was; empty where they do not.
    """
    args, kwargs = as_call(channels.example_inputs)
    half = any(p.dtype in HALF for p in model.parameters())
    with eval_mode(model):
        expected = pytree.tree_leaves(model(*args, **kwargs))
        edits: dict[str, dict[str, Any]] = {}
        undo = _widen(model, copies, channels, edits)
        wrong = verdict(model, channels.example_inputs, expected, 0.1 if half else 1e-4) if undo else "nothing fits it"
        if wrong is not None:
            for step in reversed(undo or []):
                step()
            return wrong
    made: dict[str, dict[str, Any]] = getattr(model, "_fw_edits", {})
    model._fw_edits = {p: {**made.get(p, {}), **edits.get(p, {})} for p in {**made, **edits}}  # type: ignore[assignment]
    return ""


def _widen(model: nn.Module, copies: Tensor, channels: Channels, edits: dict[str, dict[str, Any]]) -> Undo | None:
    """Widens tensors and follows up sizes; returns the steps that undo it. None where groups would grow unequally."""
    more = torch.cat([copies > 1, torch.zeros(1, dtype=torch.bool)])
    if any(len({int(spread(ids, copies).numel()) - len(ids) for ids in family}) > 1 for family in channels.equal):
        return None
    weights, held = weight_tensors(model), holders(model)
    reads = {f"{path}.weight": READS[type(m)] for path, m in model.named_modules() if type(m) in READS}
    fresh: dict[int, Tensor] = {}
    for name, table in channels.blocks.items():
        if more[table].any():
            fresh[id(weights[name])] = _columns(weights[name].detach(), table, copies)
    for (name, dim), ids in channels.axes.items():
        if more[ids].any():
            old = weights[name]
            shared = copies if reads.get(name) == dim or (dim == 1 and "weight_" in name) else None
            fresh[id(old)] = _along(fresh.get(id(old), old.detach()), dim, ids, copies, shared)
    undo: Undo = []
    for old in {id(t): t for t in weights.values() if id(t) in fresh}.values():
        new = fresh[id(old)]
        new = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        undo += [assign(module, key, new) for module, key in held[id(old)]]
    for path, module in model.named_modules():
        for key, value in _sizes(path, module, channels, copies).items():
            undo.append(assign(module, key, value))
            edits.setdefault(path, {})[key] = value
    return undo + _rewired(model, channels, copies, more)


def _along(tensor: Tensor, dim: int, ids: Tensor, copies: Tensor, shared: Tensor | None) -> Tensor:
    """A tensor with its entries along a dimension copied, and divided by the number of copies if they are `shared`."""
    index = spread(ids, copies)
    new = tensor.index_select(dim, index.to(tensor.device))
    if shared is None:
        return new
    times = torch.cat([shared, shared.new_ones(1)])[ids[index]].to(new)
    return new / times.view([-1 if d == dim else 1 for d in range(new.dim())])


def _columns(weight: Tensor, table: Tensor, copies: Tensor) -> Tensor:
    """The weight of a grouped convolution with the inputs of each group (groups, inputs of a group) copied."""
    groups = weight.unflatten(0, (len(table), -1))
    return torch.cat([_along(g, 1, ids, copies, copies) for g, ids in zip(groups, table, strict=True)])


def _sizes(path: str, module: nn.Module, channels: Channels, copies: Tensor) -> dict[str, Any]:
    """The attributes of a module that differ now, with their new values."""
    found = sizes_of(module)
    if found is None:
        found = {}
        for a in (a for a in channels.attributes if a.path == path):
            held, size = found.get(a.key, getattr(module, a.key)), len(spread(a.ids, copies))
            found[a.key] = size if a.at is None else type(held)(size if i == a.at else v for i, v in enumerate(held))
    return {key: value for key, value in found.items() if getattr(module, key) != value}


def _rewired(model: nn.Module, channels: Channels, copies: Tensor, more: Tensor) -> Undo:
    """The sizes and constants of a network without its class."""
    if not isinstance(model, Wired):
        return []
    undo: Undo = []
    changes = {w.place: len(spread(w.ids, copies)) for w in channels.literals if more[w.ids].any()}
    if changes:
        undo.append(assign(model, "wiring", model.resized(changes)))
    picks = [c for c in channels.constants if more[c.ids].any()]
    if picks:
        undo.append(assign(model, "wiring", picking(model.wiring, [c.pick for c in picks])))
    for c in picks:
        model.register_buffer(c.pick.index, spread(c.ids, copies).to(device_of(model)), persistent=False)
        undo.append(lambda name=c.pick.index: delattr(model, name))  # type: ignore[misc]
    return undo
