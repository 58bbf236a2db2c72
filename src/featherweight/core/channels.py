"""Which channels live and die together, and their removal: `channel_groups`, `remove_channels`.

`channel_groups` traces the model and lets labels flow through its graph (see `labels`); whatever shares a label is one
channel: rows of one weight, columns of the next, entries of norms, across residual sums, concatenations and views.
Before it answers it removes a few channels of every kind from a copy and compares the copy's output with masking; kinds
that the model's code does not follow (a size written into its source, say) are pinned and listed with the reason.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import Any
from typing import Literal as OneOf

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from featherweight.core.double import Double
from featherweight.core.example import smaller
from featherweight.core.labels import Flow, Literal, compact, components, flow_labels, step_of
from featherweight.core.ledger import note, skip
from featherweight.core.rewiring import Pick, picking
from featherweight.core.task import as_call, device_of, eval_mode, to_device
from featherweight.core.trace import interpret, operator_name, owner, placed, trace, weight_tensors
from featherweight.core.wired import Slot, Wired
from featherweight.errors import BadOption, CompressionError, unknown

Doomed = Mapping[str, Sequence[int] | Tensor] | Iterable[int] | Tensor
"""Channels to remove: {layer path: indices of its outputs}, or numbers of channels."""

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Slice:
    """Entries of one tensor that belong to a channel: `index` along `dim`, of the rows `rows` only if that is set."""

    path: str
    dim: int
    index: tuple[int, ...]
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Group:
    """Channels that share layers, and those layers."""

    channels: tuple[int, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Attribute:
    """An integer attribute (`at`: its place within a tuple) that counts entries of one vector of channels."""

    path: str
    key: str
    at: int | None
    ids: Tensor


@dataclass(frozen=True)
class Written:
    """A number in a wiring that counts entries of a vector of channels."""

    place: Slot
    ids: Tensor


@dataclass(frozen=True)
class Constant:
    """A result in a wiring of which steps use the part that belongs to channels, along a dimension."""

    pick: Pick
    ids: Tensor


@dataclass(frozen=True)
class Channels:
    """The removable channels of a model, numbered from 0. Valid until channels are removed.

    A vector of channels has one number an entry, -1 where the entry stays whatever is asked (see `pinned`).
    """

    count: int
    outputs: dict[str, Tensor]  # layer path -> channel of each of its outputs
    inputs: dict[str, Tensor]  # layer path -> channel of each of its inputs
    axes: dict[tuple[str, int], Tensor]  # (tensor, dimension) -> channel of each entry
    blocks: dict[str, Tensor]  # weight of a grouped convolution -> (groups, inputs of a group)
    equal: tuple[tuple[Tensor, ...], ...]  # families of vectors that must lose equally many entries each
    pinned: dict[str, str]  # layer path -> why some or all of its outputs stay
    attributes: tuple[Attribute, ...] = ()  # of modules whose sizes are not read off their own weights
    literals: tuple[Written, ...] = ()  # numbers in the wiring of a network without its class
    constants: tuple[Constant, ...] = ()  # without a weight, that meet channels
    rescales: tuple[tuple[tuple[str, ...], Tensor, Tensor], ...] = ()  # tensors, rows, channels of the head size
    norms: dict[str, tuple[Tensor, int]] = field(default_factory=dict)  # node -> channels, groups (0: no group norm)
    computed: dict[str, tuple[tuple[int, Tensor], ...]] = field(default_factory=dict)  # node -> (dimension, channels)
    program: ExportedProgram | None = field(default=None, repr=False)
    example_inputs: Any = field(default=None, repr=False)

    @cached_property
    def groups(self) -> list[Group]:
        """Sets of channels that share layers; removing one never changes the layers of another's outputs."""
        edges = [torch.stack([ids[:-1], ids[1:]]) for ids in (v[v >= 0] for v in self.outputs.values())]
        joined = torch.cat([*edges, torch.empty(2, 0, dtype=torch.long)], 1)
        part = components(joined[0], joined[1], self.count)
        found = []
        for number in part.unique().tolist():
            members = (part == number).nonzero().flatten()
            layers = tuple(p for p, ids in self.outputs.items() if torch.isin(ids, members).any())
            found.append(Group(tuple(members.tolist()), layers))
        return found

    def members(self, channel: int) -> list[tuple[str, int]]:
        """Every layer output (path, index) that is this channel."""
        return [(p, i) for p, ids in self.outputs.items() for i in (ids == channel).nonzero().flatten().tolist()]

    def slices(self, channel: int) -> list[Slice]:
        """Every entry of every tensor that goes with this channel."""
        return self._slices[channel]

    @cached_property
    def _slices(self) -> list[list[Slice]]:
        found: list[list[Slice]] = [[] for _ in range(self.count)]
        for (path, dim), ids in self.axes.items():
            for channel, index in _entries(ids).items():
                found[channel].append(Slice(path, dim, index))
        for path, table in self.blocks.items():
            height = len(self.axes[path, 0]) // len(table)
            for group, row in enumerate(table):
                for channel, index in _entries(row).items():
                    found[channel].append(Slice(path, 1, index, (group * height, (group + 1) * height)))
        return found

    def pool(self, scores: Mapping[str, Tensor], how: OneOf["sum", "mean", "max"] = "sum") -> Tensor:
        """One score for every channel (count,) from scores of layer outputs; NaN for channels that none of them has.

        Raises:
            BadOption: a layer that has no channels, or scores of the wrong length.
        """
        kind: Any = {"sum": "sum", "mean": "mean", "max": "amax"}[how]
        index, values = [], []
        for path, score in scores.items():
            ids = self._outputs(path)
            if len(ids) != len(score):
                raise BadOption(f"{len(score)} scores for {path}: it has {len(ids)} outputs, give one for each")
            index.append(ids[ids >= 0])
            values.append(score.detach().flatten().cpu()[ids >= 0].to(torch.float64))
        if not index:
            return torch.full((self.count,), torch.nan, dtype=torch.float64)
        blank = torch.full((self.count,), torch.nan, dtype=torch.float64)
        where = torch.cat(index)
        pooled = blank.scatter_reduce(0, where, torch.cat(values), kind, include_self=False)
        return torch.where(torch.isin(torch.arange(self.count), where), pooled, blank)

    def agreed(self, doomed: Mapping[str, Sequence[int] | Tensor]) -> Tensor:
        """Channels that every layer of the mapping that holds them wants removed, as numbers.

        Give every layer that was scored, with no indices where it wants none removed.
        """
        wanted, kept = (torch.zeros(self.count, dtype=torch.bool) for _ in range(2))
        for path, index in doomed.items():
            ids = self._outputs(path)
            chosen = torch.zeros(len(ids), dtype=torch.bool)
            chosen[self._checked(path, index, len(ids))] = True
            wanted[ids[chosen & (ids >= 0)]] = True
            kept[ids[~chosen & (ids >= 0)]] = True
        return (wanted & ~kept).nonzero().flatten()

    def chosen(self, doomed: Doomed) -> Tensor:
        """Numbers of the channels that are asked for, each once, in the order given; pinned ones are skipped aloud.

        Raises:
            BadOption: a layer without channels, or an index out of range.
        """
        if not isinstance(doomed, Mapping):
            numbers = doomed if isinstance(doomed, Tensor) else torch.tensor(list(doomed), dtype=torch.long)
            return _once(self._checked("channels", numbers, self.count))
        parts = [torch.empty(0, dtype=torch.long)]
        for path, index in doomed.items():
            ids = self._outputs(path)
            found = ids[self._checked(path, index, len(ids))]
            if (found < 0).any():
                skip(path, f"outputs that cannot be removed ({self.pinned.get(path, 'coupled to a pinned layer')})")
            parts.append(found[found >= 0])
        return _once(torch.cat(parts))

    def legal(self, doomed: Doomed, multiple: int = 1) -> Tensor:
        """What of this can be removed: no layer is emptied, and what must lose equally many does.

        Args:
            doomed: channels, the most expendable first: where some must stay, the last of them do.
            multiple: the number of outputs that every layer keeps is a multiple of this, or all of them.
        """
        numbers = self.chosen(doomed)
        rank = torch.full((self.count + 1,), -1)  # the last entry is for -1
        rank[numbers] = torch.arange(len(numbers))
        while self._spare(rank, multiple):
            pass
        return numbers[rank[numbers] >= 0]

    def _spare(self, rank: Tensor, multiple: int) -> bool:
        """Lets channels stay after all, given the order in which they go (-1: stays); whether any had to."""
        before = rank.clone()
        vectors = [(name, ids) for (name, _), ids in self.axes.items()]
        vectors += [(name, row) for name, table in self.blocks.items() for row in table]
        for name, ids in vectors:
            if not _staying(ids, rank).any():
                skip(name.rpartition(".")[0], "one channel kept: no layer is emptied")
                _return(ids, rank, 1)
        for family in self.equal:
            least = min(int((~_staying(ids, rank)).sum()) for ids in family)
            for ids in family:
                _return(ids, rank, int((~_staying(ids, rank)).sum()) - least)
        for ids in self.outputs.values() if multiple > 1 else ():
            kept = int(_staying(ids, rank).sum())
            _return(ids, rank, min(-(-kept // multiple) * multiple, len(ids)) - kept)
        return not torch.equal(before, rank)

    def _outputs(self, path: str) -> Tensor:
        if path not in self.outputs:
            raise unknown("layer with channels", path, self.outputs)
        return self.outputs[path]

    @staticmethod
    def _checked(path: str, index: Sequence[int] | Tensor, size: int) -> Tensor:
        chosen = torch.as_tensor(index, device="cpu").flatten()
        chosen = chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen.long()
        if len(chosen) and (int(chosen.min()) < 0 or int(chosen.max()) >= size):
            raise BadOption(f"{path}: index {int(chosen.min())}..{int(chosen.max())}, expected 0..{size - 1}")
        return chosen


def _entries(ids: Tensor) -> dict[int, tuple[int, ...]]:
    """Where each channel stands in a vector."""
    found: dict[int, list[int]] = defaultdict(list)
    for i, channel in enumerate(ids.tolist()):
        found[channel].append(i)
    return {channel: tuple(index) for channel, index in found.items() if channel >= 0}


def _once(numbers: Tensor) -> Tensor:
    return torch.tensor(list(dict.fromkeys(numbers.tolist())), dtype=torch.long)


def _staying(ids: Tensor, rank: Tensor) -> Tensor:
    """Which entries stay."""
    return rank[ids] < 0


def _return(ids: Tensor, rank: Tensor, count: int) -> None:
    """Lets the last channels of a vector in the order of removal stay, so many that `count` of its entries return."""
    while count > 0 and not (staying := _staying(ids, rank)).all():
        going = ids[~staying]
        last = going[rank[going].argmax()]
        rank[last] = -1
        count -= int((going == last).sum())


# --- finding them ----------------------------------------------------------------------------------------------------


def channel_groups(model: nn.Module, example_inputs: Any) -> Channels:
    """The channels of a model that can be removed, with everything that goes with each.

    Args:
        example_inputs: a tensor, a tuple of arguments, or a dictionary of keyword arguments.

    Raises:
        BadData: the model holds parametrizations (bake it first).
        TraceError: torch.export refuses the model.
    """
    example_inputs = to_device(example_inputs, device_of(model))
    if isinstance(model, Wired):
        example_inputs = smaller(model, example_inputs, as_call(example_inputs))
    program = trace(model, example_inputs)
    with eval_mode(model):
        flow = flow_labels(model, program, example_inputs)
    channels = _probed(model, _numbered(flow, _pins(flow), program, example_inputs))
    for path, reason in channels.pinned.items():
        skip(path, f"outputs that cannot be removed: {reason}")
    if any("the model's code does not follow" in reason for reason in channels.pinned.values()):
        note("more channels could go without the model's class: pass without_class=True, or wire(model) first")
    return channels


def _pins(flow: Flow) -> dict[int, str]:
    """The representatives of pinned labels, and why."""
    reasons: dict[int, str] = {}

    def add(labels: Tensor, reason: str) -> None:
        for root in flow.unions.find(labels).unique().tolist():
            reasons.setdefault(root, reason)

    for labels, reason in flow.pins:
        add(labels, reason)
    for (name, _), labels in flow.axes.items():
        if name in flow.fixed:
            add(labels, flow.fixed[name])
    used = {name for name, _ in flow.axes}
    for name, labels in flow.elements.items():
        varying = [n for n in compact(flow.unions.find(labels)).shape if n > 1]
        if name in flow.fixed or name in used or len(varying) != 1:
            add(labels, flow.fixed.get(name, "a weight that is used as data in more than one way"))
            for (tied, _), axis in flow.axes.items():
                if tied == name:
                    add(axis, "a weight that is also used as data")
    return reasons


def _numbered(flow: Flow, reasons: Mapping[int, str], program: ExportedProgram, example_inputs: Any) -> Channels:
    """Channels from labels: what is not pinned gets a number, in order of the layers."""
    axes = {key: flow.unions.find(labels) for key, labels in flow.axes.items()}
    for name, labels in flow.elements.items():
        settled = compact(flow.unions.find(labels))
        varying = [d for d in range(settled.dim()) if settled.size(d) > 1]
        if len(varying) == 1:
            axes[name, varying[0]] = settled.flatten()
    roots = _once(torch.cat([torch.empty(0, dtype=torch.long), *axes.values()]))
    free = torch.tensor([r for r in roots.tolist() if r not in reasons], dtype=torch.long)
    table = torch.full((len(flow.unions.parent),), -1)
    table[free] = torch.arange(len(free))

    def number(labels: Tensor) -> Tensor:
        return table[flow.unions.find(labels)]

    def number_or_none(labels: Tensor | None) -> Tensor | None:
        return None if labels is None else number(labels)

    pinned = {}
    for path, labels in flow.outputs.items():
        stays = [reasons[r] for r in flow.unions.find(labels).tolist() if r in reasons]
        if stays:
            pinned[path] = stays[0]
    norms = {node: (number(labels), 0) for node, labels in flow.norms.items()}
    axes = {key: table[labels] for key, labels in axes.items()}
    numbers: dict[str, list[tuple[int, Tensor | None]]] = defaultdict(list)
    literals: list[Written] = []
    for found in flow.literals:
        counted = _counted(flow, found.labels)
        place = _step(flow.model, found)
        if place is None or not isinstance(flow.model, Wired):
            numbers[owner(found.node)].append((found.number, number_or_none(counted)))
        elif counted is not None:
            literals += _written(flow.model, place, number(counted))
    attributes, tied = _counting(flow.model, numbers, axes)
    return Channels(
        count=len(free),
        outputs={path: number(labels) for path, labels in flow.outputs.items()},
        inputs={path: number(labels) for path, labels in flow.inputs.items()},
        axes=axes,
        blocks={name: number(labels) for name, labels in flow.blocks.items()},
        equal=(*(tuple(number(part) for part in family) for family in flow.equal), *tied),
        pinned=pinned,
        attributes=attributes,
        literals=tuple(literals),
        constants=tuple(_constants(flow, number)),
        rescales=tuple((r.tensors, r.rows, number(r.labels)) for r in flow.rescales),
        norms=norms | {node: (number(labels), groups) for node, (labels, groups) in flow.spans.items()},
        computed={
            node: tuple((d, axes[p]) for d in range(val.value.dim()) for p in val.places(d)[:1] if p in axes)
            for node, val in flow.computed.items()
        },
        program=program,
        example_inputs=example_inputs,
    )


def _constants(flow: Flow, number: Callable[[Tensor], Tensor]) -> Iterable[Constant]:
    """Constants that meet channels, each with the name of a buffer that does not exist yet."""
    taken = set(weight_tensors(flow.model))
    names = (name for i in count() if (name := f"picked_{i}") not in taken)
    for found, name in zip(flow.constants.values(), names, strict=False):
        result = found.step + len(flow.model.wiring.inputs)  # type: ignore[union-attr, arg-type]
        ids = number(found.labels)
        if (ids >= 0).any():
            yield Constant(Pick(tuple(sorted(set(found.users))), result, found.dim, name), ids)


def _counted(flow: Flow, labels: Tensor | None) -> Tensor | None:
    """The labels along a dimension that a number counts, one for each entry; None where it counts no channels.

    Of a weight's data they are known when all labels have flown: it holds channels along one dimension at most.
    """
    if labels is None or labels.dim() == 1:
        return labels
    labels = labels.flatten(1)
    found = compact(flow.unions.find(labels))
    along = found.size(0) > 1 or (len(labels) == 1 and labels.size(1) > 1)
    return found.flatten() if along and found.size(1) == 1 else None


def _written(model: Wired, place: Slot, ids: Tensor) -> list[Written]:
    """The number at a place, or the factor of it that counts channels: `batch * channels * height`, say."""
    factors = model.factors_at(place)
    if len(factors) == 1:
        return [Written(place, ids)]
    sizes = [1 if slot is None else value for slot, value in factors]
    if None in (given := [slot for slot, _ in factors]):
        sizes[given.index(None)] = len(ids) // math.prod(sizes)
    for i, (slot, _) in enumerate(factors):
        table = ids.view(math.prod(sizes[:i]), sizes[i], -1) if math.prod(sizes) == len(ids) else ids[:0].view(0, 1, 1)
        if slot is not None and len(table) and table.size(1) > 1 and (table == table[:1, :, :1]).all():
            return [Written(slot, table[0, :, 0])]
    return []


def _step(model: nn.Module, found: Literal) -> Slot | None:
    """Where a number stands in the wiring of a network without its class; None in other code."""
    step = step_of(model, found.node)
    if not isinstance(model, Wired) or step is None or model.wiring.steps[step].target.startswith("@"):
        return None
    place = (step, found.argument, found.at)
    held = model.number_at(*place)
    return place if held == found.number or len(model.factors_at(place)) > 1 else None


def _without(channels: Channels, refused: Mapping[int, str]) -> Channels:
    """The same with these channels pinned, for these reasons; the others are numbered anew."""
    table = torch.full((channels.count + 1,), -1)  # the last entry is for -1
    free = [n for n in range(channels.count) if n not in refused]
    table[free] = torch.arange(len(free))
    pinned = {
        path: next(refused[n] for n in ids.tolist() if n in refused)
        for path, ids in channels.outputs.items()
        if any(n in refused for n in ids.tolist())
    }
    return replace(
        channels,
        count=len(free),
        outputs={path: table[ids] for path, ids in channels.outputs.items()},
        inputs={path: table[ids] for path, ids in channels.inputs.items()},
        axes={key: table[ids] for key, ids in channels.axes.items()},
        blocks={name: table[ids] for name, ids in channels.blocks.items()},
        equal=tuple(tuple(table[ids] for ids in family) for family in channels.equal),
        pinned={**pinned, **channels.pinned},
        attributes=tuple(replace(a, ids=table[a.ids]) for a in channels.attributes),
        literals=tuple(replace(w, ids=table[w.ids]) for w in channels.literals),
        constants=tuple(replace(c, ids=table[c.ids]) for c in channels.constants),
        rescales=tuple((names, rows, table[ids]) for names, rows, ids in channels.rescales),
        norms={node: (table[ids], groups) for node, (ids, groups) in channels.norms.items()},
        computed={node: tuple((d, table[ids]) for d, ids in cut) for node, cut in channels.computed.items()},
    )


# --- trying a removal ------------------------------------------------------------------------------------------------


def kinds(channels: Channels) -> list[Tensor]:
    """Channels by the set of places they appear in: what works for one of a kind works for all of it."""
    places: list[list[int]] = [[] for _ in range(channels.count)]
    vectors = [*channels.axes.values(), *(row for table in channels.blocks.values() for row in table)]
    vectors += (
        [a.ids for a in channels.attributes] + [w.ids for w in channels.literals] + [c.ids for c in channels.constants]
    )
    vectors += [part for family in channels.equal for part in family]
    for place, ids in enumerate(vectors):
        for number in ids[ids >= 0].unique().tolist():
            places[number].append(place)
    kinds: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, where in enumerate(places):
        kinds[tuple(where)].append(number)
    return [torch.tensor(numbers) for numbers in kinds.values()]


def _probed(model: nn.Module, channels: Channels) -> Channels:
    """Removes channels of every kind from a copy of the model; pins kinds whose removal is not the same as masking.

    First all kinds at once, by halves where that fails; then sets of kinds such that every two are once apart, for
    sizes that must agree although nothing couples their channels (one read off the other's tensor at run time): such
    pairs must lose equally many. Sizes are tried without values where the code allows that.
    """
    lab = Lab(model, channels)
    refused: dict[int, str] = {}
    trials: dict[int, tuple[Tensor, Tensor]] = {}
    for i, kind in enumerate(kinds(channels)):
        together = _completed(channels, kind[len(kind) // 3])
        if together is None:
            refused |= dict.fromkeys(kind.tolist(), "the only channel of a layer, or tied to one that stays")
        else:
            trials[i] = kind, together

    difference = lab.difference

    def tried(chosen: Iterable[int]) -> str | None:
        doomed = [trials[i][1] for i in chosen]
        return difference(channels.legal(torch.cat(doomed).unique())) if doomed else None

    def grow(part: list[int], accepted: list[int]) -> list[int]:
        reason = tried([*accepted, *part])
        if reason is None:
            return [*accepted, *part]
        if len(part) == 1:
            refused.update(dict.fromkeys(trials[part[0]][0].tolist(), reason))
            return accepted
        return grow(part[len(part) // 2 :], grow(part[: len(part) // 2], accepted))

    accepted = grow(list(trials), [])
    ties: list[tuple[Tensor, ...]] = []
    apart = [[i for n, i in enumerate(accepted) if n >> bit & 1] for bit in range(len(accepted).bit_length())]
    difference = lab.misfit if lab.hollowed() else lab.difference
    if any(tried(part) is not None for part in apart):
        alone = {i: reason for i in accepted if (reason := tried([i])) is not None}
        while alone:
            i, reason = alone.popitem()
            partner = next((j for j in alone if len(trials[i][0]) == len(trials[j][0]) and not tried([i, j])), None)
            if partner is None:
                refused |= dict.fromkeys(trials[i][0].tolist(), reason)
            else:
                del alone[partner]
                ties.append((trials[i][0], trials[partner][0]))
    return _without(replace(channels, equal=(*channels.equal, *ties)), refused)


def _completed(channels: Channels, sample: Tensor) -> Tensor | None:
    """One channel, and what its families then have to lose as well; None if it cannot go."""
    doomed = sample.reshape(1)
    for _ in range(4):
        for family in channels.equal:
            lost = [torch.isin(ids, doomed) for ids in family]
            most = max(int(mask.sum()) for mask in lost)
            for ids, mask in zip(family, lost, strict=True):
                spare = _once(ids[~mask & (ids >= 0)])
                doomed = torch.cat([doomed, spare[: most - int(mask.sum())]])
    legal = channels.legal(_once(doomed))
    return legal if sample in legal else None


class Lab:
    """A copy of a model in double precision, without dead channels, on which removals are tried and undone."""

    def __init__(self, model: nn.Module, channels: Channels) -> None:
        self.channels, self.model = channels, copy.deepcopy(model).eval()
        self.inputs, self.dtype = channels.example_inputs, torch.float32
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in {id(t): t for t in weight_tensors(self.model).values()}.values():
                if tensor.is_floating_point():
                    noise = torch.rand(tensor.shape, generator=generator).to(tensor) + 0.5
                    size = tensor.abs().mean().nan_to_num(0.0, 0.0, 0.0).clamp_min(0.05)
                    tensor.copy_(torch.where(tensor.abs() > 1e-3 * size, tensor, size) * noise)
        self.tolerance = 0.05 if any(p.dtype in HALF for p in self.model.parameters()) else 2e-4
        # Some code insists on a precision of its own: the first that runs, and runs exactly, is taken.
        if not self.widened(torch.float64, 1e-9, 1e-7) and self.tolerance == 0.05:
            self.widened(torch.float32, 1e-5, 2e-4)

    def widened(self, dtype: torch.dtype, exact: float, tolerance: float) -> bool:
        """Goes over to another precision if the model's code and its graph agree there."""
        inputs = pytree.tree_map(
            lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, self.inputs
        )
        trial = copy.deepcopy(self.model).to(dtype)
        try:
            with torch.no_grad(), Double() if dtype == torch.float64 else nullcontext():
                expected = masked_outputs(trial, replace(self.channels, example_inputs=inputs), torch.empty(0))
                wrong = None if isinstance(trial, Wired) else verdict(trial, inputs, expected, exact)
        except (RuntimeError, TypeError):
            return False
        if wrong is None:
            self.model, self.inputs, self.tolerance, self.dtype = trial, inputs, tolerance, dtype
        return wrong is None

    def difference(self, doomed: Tensor) -> str | None:
        """Why removing these channels is not the same as masking them, or None where it is."""
        channels = replace(self.channels, example_inputs=self.inputs)
        with torch.no_grad(), self.precision():
            expected = masked_outputs(self.model, channels, doomed)
            undo = _remove(self.model, channels, doomed)
            try:
                return verdict(self.model, self.inputs, expected, self.tolerance)
            finally:
                for step in reversed(undo):
                    step()

    def hollowed(self) -> bool:
        """Makes a copy without values, on which a trial costs next to nothing; False where the code asks for values."""
        meta = torch.device("meta")
        held = {id(t): t.detach().to(meta) for t in weight_tensors(self.model).values()}
        held |= {id(p): nn.Parameter(held[id(p)], requires_grad=False) for p in self.model.parameters()}
        self.hollow, self.blank = copy.deepcopy(self.model, held), to_device(self.inputs, meta)
        args, kwargs = as_call(self.blank)
        try:
            with torch.no_grad(), self.precision():
                self.shapes = pytree.tree_leaves(self.hollow(*args, **kwargs))
        except Exception:  # whatever the user's code makes of such tensors
            return False
        return True

    def misfit(self, doomed: Tensor) -> str | None:
        """Why the code does not run after this removal, or gives outputs of other shapes; needs `hollowed`."""
        with torch.no_grad(), self.precision():
            undo = _remove(self.hollow, self.channels, doomed)
            try:
                return verdict(self.hollow, self.blank, self.shapes, 0.0)
            finally:
                for step in reversed(undo):
                    step()

    def precision(self) -> Any:
        """In which the copies run."""
        return Double() if self.dtype == torch.float64 else nullcontext()


def verdict(model: nn.Module, inputs: Any, expected: Sequence[Any], tolerance: float) -> str | None:
    args, kwargs = as_call(inputs)
    try:
        with torch.no_grad():
            found = model(*args, **kwargs)
    except Exception as error:  # the user's code may raise anything on sizes it did not expect
        text = next(iter(str(error).splitlines()), "")
        return f"the model's code does not follow a removal ({type(error).__name__}: {text[:120]})"
    return _differ(expected, found, tolerance)


def _differ(expected: Sequence[Any], found: Any, tolerance: float) -> str | None:
    """What is wrong with an output, or None."""
    for a, b in zip(expected, pytree.tree_leaves(found), strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        if a.shape != b.shape:
            return f"the output's shape would change from {tuple(a.shape)} to {tuple(b.shape)}"
        if a.numel() and not a.is_meta and (wrong := _moved(a, b, tolerance)):
            return f"the model's code does not follow a removal ({wrong})"
    return None


def _moved(a: Tensor, b: Tensor, tolerance: float) -> str:
    """By how much an output moved, if by more than the tolerance; whole numbers and what is not finite must agree.

    Beside the largest entry counts the typical one: a few huge entries (fills of masked places) hide nothing.
    """
    if not (a.is_floating_point() or a.is_complex()):
        return "" if torch.equal(a, b) else f"{int((a != b).sum())} of {a.numel()} of its outputs would change"
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return "other outputs would be infinite"
    if not finite.any():
        return ""
    sizes = a[finite].abs()
    alive = sizes[sizes > 0] if sizes.any() else sizes  # most of what a ReLU gives may be zero
    usual = alive[alive <= 1e3 * alive.median().clamp_min(1e-12)]
    scale = (usual if len(usual) else alive).max().clamp_min(1e-12)
    near = sizes <= 1e3 * scale
    gap = float(((a[finite] - b[finite]).abs() / torch.where(near, scale, sizes)).max())
    return "" if gap <= tolerance else f"its output would move by {gap:.1e}"


def masked_outputs(model: nn.Module, channels: Channels, doomed: Tensor) -> list[Any]:
    """What the traced graph computes when these channels' weights are zero: the outputs, flattened.

    Layer, RMS and group norms take their statistics over the channels that stay; attention keeps its scale.
    """
    assert channels.program is not None  # only absent in channels made by hand
    gone = torch.zeros(channels.count + 1, dtype=torch.bool)
    gone[doomed.long()] = True
    weights = weight_tensors(model)  # a tied one is the same object under each of its names
    masked: dict[int, Tensor] = {}
    for name, mask, dim in _masks(channels, gone):
        base = masked.get(id(weights[name]), weights[name].detach())
        masked[id(weights[name])] = base.masked_fill(_spread(mask, dim, base), 0)
    held = {name: masked.get(id(t), t.detach()) for name, t in weights.items()}

    def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.name in channels.norms:
            ids, groups = channels.norms[node.name]
            if gone[ids].any() and groups != ids.numel():
                kind = operator_name(node)
                if not kind.endswith("_norm"):
                    return _statistic(node, args, kwargs, ~gone[ids])
                return _norm(kind, args, kwargs, ~gone[ids], groups)
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        for dim, ids in channels.computed.get(node.name, ()):  # a direction of length zero is none
            shape = [len(ids) if d == dim else 1 for d in range(value.dim())]
            value = value.masked_fill(gone[ids].reshape(shape).to(value.device), 0)
        return value

    place = placed(channels.program, held, channels.example_inputs)
    return pytree.tree_leaves(interpret(channels.program, place, call))


def _masks(channels: Channels, gone: Tensor) -> Iterable[tuple[str, Tensor, int]]:
    """Tensor, mask along a dimension, that dimension: wherever something goes."""
    for (name, dim), ids in channels.axes.items():
        if gone[ids].any():
            yield name, gone[ids], dim
    for name, table in channels.blocks.items():
        if gone[table].any():
            yield name, gone[table], 1


def _spread(mask: Tensor, dim: int, over: Tensor) -> Tensor:
    """A mask along a dimension, or one of each group's own columns, shaped to broadcast over a tensor."""
    shape = [1] * over.dim()
    shape[dim] = over.shape[dim]
    if mask.dim() == 2:  # (groups, inputs of a group): the rows of each group have their own columns
        shape[0] = over.shape[0]
        mask = mask.repeat_interleave(over.shape[0] // len(mask), 0)
    return mask.reshape(shape).to(over.device)


@torch.no_grad()
def zero_channels(model: nn.Module, doomed: Doomed, *, channels: Channels) -> None:
    """Zeros, in place, everything that goes with these channels: their removal later on changes no output.

    Except where a norm takes its statistics over channels (`channels.norms`): there zeros still count.
    """
    gone = torch.zeros(channels.count + 1, dtype=torch.bool)
    gone[channels.chosen(doomed)] = True
    weights = weight_tensors(model)
    for name, mask, dim in _masks(channels, gone):
        weights[name].masked_fill_(_spread(mask, dim, weights[name]), 0)


def _norm(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any], keep: Tensor, groups: int) -> Tensor:
    """A layer, RMS or group norm with statistics over the kept channels only."""
    x, keep = args[0], keep.to(args[0].device)
    if groups:
        weight, bias = (args[i] if len(args) > i else None for i in (2, 3))
        wide = keep.reshape(groups, -1, *[1] * (x.dim() - 2)).expand(groups, -1, *x.shape[2:])
        split, dims = x.reshape(x.shape[0], groups, -1, *x.shape[2:]), tuple(range(2, x.dim() + 1))
        shape: tuple[int, ...] = (-1, *[1] * (x.dim() - 2))
    else:
        weight, bias = (args[i] if len(args) > i else None for i in (2, 3))
        bias = None if kind == "rms_norm" else bias
        dims = tuple(range(-len(args[1]), 0))
        wide, split, shape = keep.expand(x.shape[-keep.dim() :]), x, tuple(args[1])
    eps = kwargs.get(
        "eps", args[3 if kind == "rms_norm" else 4] if len(args) > (3 if kind == "rms_norm" else 4) else None
    )
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    count = (
        wide.expand(split.shape[-wide.dim() :]).sum(dims, keepdim=True)
        if groups == 0
        else wide.sum(tuple(range(1, wide.dim())), keepdim=True)
    )
    mean = 0 if kind == "rms_norm" else (split * wide).sum(dims, keepdim=True) / count
    centred = (split - mean) * wide
    out = (centred / (centred.square().sum(dims, keepdim=True) / count + eps).sqrt()).reshape(x.shape)
    out = out if weight is None else out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape)


def _statistic(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], keep: Tensor) -> Any:
    """A mean, variance or standard deviation over what is kept of the dimensions."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    given, kind = {**dict(zip(names, args, strict=False)), **kwargs}, operator_name(node)
    x, dims = args[0], given.get("dim")
    keep, dims = keep.to(x.device).expand(x.shape), tuple(range(x.dim())) if dims in (None, []) else dims
    fewer = given.get("correction", given.get("unbiased", True))
    count = keep.sum(dims, keepdim=True)
    mean = (x * keep).sum(dims, keepdim=True) / count
    var = ((x - mean) * keep).square().sum(dims, keepdim=True) / (count - (1 if fewer is None else int(fewer)))
    spread = var if kind.startswith("var") else var.sqrt()
    found = (mean,) if kind == "mean" else (spread, mean) if kind.endswith("mean") else (spread,)
    found = found if given.get("keepdim") else tuple(f.sum(dims) for f in found)
    return found if kind.endswith("_mean") else found[0]


# --- removing them ---------------------------------------------------------------------------------------------------


def remove_channels(
    model: nn.Module, doomed: Doomed, *, channels: Channels, optimizer: Optimizer | None = None
) -> nn.Module:
    """Removes channels and everything that goes with them, in place; checks that this equals masking them.

    What cannot go is left and said (`skip`): pinned channels, the last one of a layer, what would leave groups unequal.
    Attributes of modules follow their new sizes; each one changed is noted in `model._fw_edits[path][attribute]`.

    Args:
        doomed: {layer path: indices of its outputs} or numbers of channels, the most expendable first.
        channels: of this model as it is, from `channel_groups`.
        optimizer: its state is cut to the entries that stay.

    Raises:
        BadOption: an unknown layer or an index out of range; `channels` of another model, or from before a removal.
        CompressionError: the smaller model does not compute what masking does; the model is as it was.
    """
    numbers = channels.legal(doomed)
    _check_fits(model, channels)
    if not len(numbers):
        return model
    with eval_mode(model):
        expected = masked_outputs(model, channels, numbers)
        edits: dict[str, dict[str, Any]] = {}
        before = _hidden(model)
        undo = _remove(model, channels, numbers, edits, optimizer)
        half = any(p.dtype in HALF for p in model.parameters())
        wrong = verdict(model, channels.example_inputs, expected, 0.1 if half else 1e-3)
        if wrong is not None:
            for step in reversed(undo):
                step()
            raise CompressionError(f"channels were not removed: {wrong}; call channel_groups anew, or mask instead")
    model._fw_kept = sorted({*getattr(model, "_fw_kept", ()), *(before - _hidden(model))})  # type: ignore[assignment]
    made: dict[str, dict[str, Any]] = getattr(model, "_fw_edits", {})
    model._fw_edits = {p: {**made.get(p, {}), **edits.get(p, {})} for p in {**made, **edits}}  # type: ignore[assignment]
    return model


def _hidden(model: nn.Module) -> set[str]:
    """Buffers that are not in the state dict."""
    return {
        f"{path}.{key}".lstrip(".")
        for path, module in model.named_modules()
        for key in module._non_persistent_buffers_set
    }


def _check_fits(model: nn.Module, channels: Channels) -> None:
    weights = weight_tensors(model)
    for (name, dim), ids in channels.axes.items():
        if name not in weights or weights[name].shape[dim] != len(ids):
            raise BadOption(f"channels do not fit {name}: call channel_groups on this model, anew after each removal")


def _remove(
    model: nn.Module,
    channels: Channels,
    doomed: Tensor,
    edits: dict[str, dict[str, Any]] | None = None,
    optimizer: Optimizer | None = None,
) -> list[Callable[[], None]]:
    """Cuts tensors and follows up attributes; returns the steps that undo it, to be taken in reverse."""
    gone = torch.zeros(channels.count + 1, dtype=torch.bool)  # the last entry is for -1
    gone[doomed] = True
    cuts: dict[str, list[tuple[Tensor, int]]] = defaultdict(list)
    for name, mask, dim in _masks(channels, gone):
        cuts[name].append((~mask, dim))
    undo: list[Callable[[], None]] = []
    weights, owners = weight_tensors(model), holders(model)
    scale = {name: (rows, ids) for names, rows, ids in channels.rescales for name in names if gone[ids].any()}
    for name in dict.fromkeys([*cuts, *scale]):
        old = weights[name]
        new = old.detach().clone()
        if name in scale:
            rows, ids = scale[name]
            new[rows.to(new.device)] *= ((~gone[ids]).sum() / len(ids)).sqrt().to(new)
        for keep, dim in sorted(cuts.get(name, []), key=lambda cut: -cut[0].dim()):
            new = _cut(new, keep, dim)
        fresh: Tensor = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        for module, key in owners[id(old)]:
            undo.append(assign(module, key, fresh))
            if key in module._non_persistent_buffers_set:
                undo.append(_persistent(module, key))
        if optimizer is not None and isinstance(old, nn.Parameter) and isinstance(fresh, nn.Parameter):
            undo.append(_follow(optimizer, old, fresh, cuts.get(name, [])))
    for path, module in model.named_modules():
        for key, value in _attributes(path, module, channels, gone).items():
            undo.append(assign(module, key, value))
            if edits is not None:
                edits.setdefault(path, {})[key] = value
    changes = {w.place: int((~gone[w.ids]).sum()) for w in channels.literals if gone[w.ids].any()}
    if isinstance(model, Wired) and changes:
        undo.append(assign(model, "wiring", model.resized(changes)))
    picks = [c for c in channels.constants if gone[c.ids].any()]
    if isinstance(model, Wired) and picks:
        undo.append(assign(model, "wiring", picking(model.wiring, [c.pick for c in picks])))
        undo += [_buffer(model, c.pick.index, (~gone[c.ids]).nonzero().flatten()) for c in picks]
    return undo


def _cut(tensor: Tensor, keep: Tensor, dim: int) -> Tensor:
    """Keeps entries along a dimension; a mask (groups, inputs of a group) keeps columns of each group of rows."""

    def part(of: Tensor, mask: Tensor, along: int) -> Tensor:
        return of.index_select(along, mask.nonzero().flatten().to(tensor.device))

    if keep.dim() == 1:
        return part(tensor, keep, dim)
    groups = tensor.unflatten(0, (len(keep), -1))
    return torch.cat([part(g, k, 1) for g, k in zip(groups, keep, strict=True)])


def holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every (module, attribute) that holds a tensor, by the tensor."""
    found: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                found[id(tensor)].append((module, key))
    return found


def _persistent(module: nn.Module, key: str) -> Callable[[], None]:
    """Makes a buffer part of the state dict: what was cut out of it, its class cannot make anew."""
    module._non_persistent_buffers_set.discard(key)
    return lambda: module._non_persistent_buffers_set.add(key)


def assign(module: nn.Module, key: str, value: Any) -> Callable[[], None]:
    """Sets an attribute, and returns what sets it back."""
    old = getattr(module, key)
    setattr(module, key, value)
    return lambda: setattr(module, key, old)


def _buffer(model: nn.Module, name: str, value: Tensor) -> Callable[[], None]:
    """Gives a network a tensor that is no part of its state dict, and returns what takes it away."""
    model.register_buffer(name, value.to(device_of(model)), persistent=False)
    return lambda: delattr(model, name)


def _follow(
    optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, cuts: Sequence[tuple[Tensor, int]]
) -> Callable[[], None]:
    """Puts a new parameter in the place of an old one in an optimizer, state of its shape cut the same way."""
    places = [(g["params"], i) for g in optimizer.param_groups for i, p in enumerate(g["params"]) if p is old]
    for params, i in places:
        params[i] = new
    state = optimizer.state.pop(old, None)
    if state is not None:
        fresh = {}
        for key, value in state.items():
            fresh[key] = value
            if isinstance(value, Tensor) and value.shape == old.shape:
                for keep, dim in sorted(cuts, key=lambda cut: -cut[0].dim()):
                    fresh[key] = _cut(fresh[key], keep, dim)
        optimizer.state[new] = fresh

    def undo() -> None:
        for params, i in places:
            params[i] = old
        optimizer.state.pop(new, None)
        if state is not None:
            optimizer.state[old] = state

    return undo


# --- attributes that must agree again --------------------------------------------------------------------------------


def _attributes(path: str, module: nn.Module, channels: Channels, gone: Tensor) -> dict[str, Any]:
    """The attributes of a module that differ after a removal, with their new values."""
    found = sizes_of(module)
    if found is None:
        found = {}
        for a in channels.attributes:
            if a.path == path:
                held, kept = found.get(a.key, getattr(module, a.key)), int((~gone[a.ids]).sum())
                found[a.key] = (
                    kept if a.at is None else type(held)(kept if i == a.at else v for i, v in enumerate(held))
                )
    return {key: value for key, value in found.items() if getattr(module, key) != value}


def sizes_of(module: nn.Module) -> dict[str, Any] | None:  # noqa: PLR0911 - one straight table
    """Attributes of torch's own layers, read off their weights; None for any other module."""
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
    match module:
        case nn.modules.conv._ConvTransposeNd():
            groups = shape[0] if module.groups == module.in_channels and shape[1] == 1 else module.groups
            return {"in_channels": shape[0], "out_channels": shape[1] * groups, "groups": groups}
        case nn.modules.conv._ConvNd():
            each = module.out_channels // module.groups
            depthwise = module.groups > 1 and module.in_channels == module.groups
            groups = shape[0] // each if depthwise else module.groups
            return {"in_channels": shape[1] * groups, "out_channels": shape[0], "groups": groups}
        case nn.Linear():
            return {"in_features": shape[1], "out_features": shape[0]}
        case nn.Embedding():
            return {"embedding_dim": shape[1]}
        case nn.modules.batchnorm._NormBase():
            held = weight if weight is not None else module.running_mean
            return {} if held is None else {"num_features": len(held)}
        case nn.GroupNorm():
            if not shape:
                return None
            single = module.num_groups == module.num_channels and module.num_groups > 1
            return {"num_channels": shape[0], "num_groups": shape[0] if single else module.num_groups}
        case nn.LayerNorm() | nn.RMSNorm():
            return {"normalized_shape": shape} if shape else None
        case nn.PReLU():
            return {"num_parameters": shape[0]}
        case nn.RNNBase():
            sizes = (module.get_parameter(f"weight_{kind}_l0").shape[1] for kind in ("ih", "hh"))
            return dict(zip(("input_size", "hidden_size"), sizes, strict=True))
    return None


def _counting(
    model: nn.Module, numbers: Mapping[str, list[tuple[int, Tensor | None]]], axes: Mapping[tuple[str, int], Tensor]
) -> tuple[tuple[Attribute, ...], list[tuple[Tensor, ...]]]:
    """Attributes that count channels, and vectors that must lose equally many because one attribute counts them all.

    An attribute counts what a number of the same value in its module's code counts, or a size of its own weights.
    Where several attributes have the value of several numbers they correspond in order. That is a guess: `_probe`
    finds out whether it holds before anything relies on it.
    """
    found: list[Attribute] = []
    tied: list[tuple[Tensor, ...]] = []
    for path, module in model.named_modules():
        if sizes_of(module) is not None:
            continue
        counted = [(n, ids) for n, ids in numbers.get(path, []) if ids is None or len(ids) == n]  # not -1
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            name = f"{path}.{key}" if path else key
            counted += [(n, axes.get((name, d))) for d, n in enumerate(tensor.shape)]
        slots = _slots(module)
        for value in dict.fromkeys(slots.values()):
            own = [slot for slot, held in slots.items() if held == value]
            uses = [ids for n, ids in counted if n == value]
            in_turn = len(uses) % len(own) == 0 and len(_distinct(uses)) > 1
            for i, (key, at) in enumerate(own):
                mine = _distinct(uses[i :: len(own)] if in_turn else uses)
                if mine:
                    found.append(Attribute(path, key, at, mine[0]))
                    tied += [tuple(mine)] if len(mine) > 1 else []
    return tuple(found), tied


def _distinct(vectors: Iterable[Tensor | None]) -> list[Tensor]:
    """Each vector once, without those that are None or can lose nothing."""
    found: dict[tuple[int, ...], Tensor] = {}
    for ids in vectors:
        if ids is not None and (ids >= 0).any():
            found.setdefault(tuple(ids.tolist()), ids)
    return list(found.values())


def _slots(module: nn.Module) -> dict[tuple[str, int | None], int]:
    """Integers among a module's own attributes, also within tuples and lists, in the order they were set."""
    found: dict[tuple[str, int | None], int] = {}
    for key, value in vars(module).items():
        if key.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, int):
            found[key, None] = value
        elif isinstance(value, (tuple, list)) and type(value) in (tuple, list):
            found |= {(key, i): v for i, v in enumerate(value) if isinstance(v, int) and not isinstance(v, bool)}
    return found
