"""Label flow: which entries of which tensors are the same channel, found by executing a traced graph on labels.

Beside every activation travels an integer tensor of the same shape (kept with size 1 where it does not vary) whose
entries name channels. Layers with weights give their output channels fresh labels and tie the labels that arrive to
their input channels; operators that only move data are executed on the labels themselves; where activations meet
pointwise, labels are united. After every step an activation's labels vary along one dimension only, so that what is
left after a removal is again a box. An operator that is not in the table pins the labels that it touches.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from featherweight.core.labels.computed import CONSUMERS, STATISTICS, computed_weights
from featherweight.core.task import to_device
from featherweight.core.trace import first_names, graph_inputs, interpret, operator_name, placed, weight_tensors
from featherweight.core.wired import Wired, refs


class Unions:
    """Union-find over whole tensors of labels."""

    def __init__(self) -> None:
        self.parent = torch.empty(0, dtype=torch.long)

    def fresh(self, count: int) -> Tensor:
        """So many new labels."""
        start = len(self.parent)
        self.parent = torch.cat([self.parent, torch.arange(start, start + count)])
        return torch.arange(start, start + count)

    def find(self, labels: Tensor) -> Tensor:
        """The representative of every label."""
        roots = self.parent[labels]
        while not torch.equal(above := self.parent[roots], roots):
            roots = above
        return roots

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Makes a[i] and b[i] the same channel; shapes broadcast."""
        ra, rb = (self.find(t).flatten() for t in torch.broadcast_tensors(a, b))
        differ = ra != rb
        if not differ.any():
            return
        ids, ends = torch.unique(torch.stack([ra[differ], rb[differ]]), return_inverse=True)
        part = components(ends[0], ends[1], len(ids))
        least = torch.full((int(part.max()) + 1,), int(ids.max()) + 1).scatter_reduce(0, part, ids, "amin")
        self.parent[ids] = least[part]


def components(a: Tensor, b: Tensor, nodes: int) -> Tensor:
    """The connected component of each node of a graph with edges (a[i], b[i])."""
    graph = coo_matrix((np.ones(len(a), dtype=np.int8), (a.numpy(), b.numpy())), shape=(nodes, nodes))
    return torch.from_numpy(connected_components(graph, directed=False)[1]).long()


@dataclass(frozen=True)
class Val:
    """One value of the graph while labels flow."""

    value: Any
    labels: Tensor | None = (
        None  # as many dimensions as value, size 1 where constant; None: nothing here can be removed
    )
    zero: bool = False  # whether a masked channel is exactly zero here
    name: str | None = None  # set for a weight that arrived as it is, up to a permutation of its dimensions
    dims: tuple[int, ...] = ()  # that permutation
    data: bool = False  # a weight that entered as data: its elements have labels of their own
    made: tuple[Val, ...] = ()  # the weights that this weight of a layer is computed of, entry by entry

    @property
    def weighs(self) -> bool:
        """Whether this is a weight that can be cut, as it is or by what it is computed of."""
        return self.name is not None or bool(self.made)

    def places(self, dim: int) -> list[tuple[str, int]]:
        """Which dimensions of which weights a dimension of this one is."""
        back = dim % self.value.dim() - self.value.dim()
        size = self.value.shape[back]
        owners = (self,) if self.name is not None else self.made
        fitting = [w for w in owners if w.value.dim() >= -back and w.value.shape[back] == size]
        return [(w.name, w.dims[back]) for w in fitting if w.name is not None]

    def main(self) -> str | None:
        """The name of this weight, or of the largest that it is computed of."""
        owners = (self,) if self.name is not None else self.made
        return max(owners, key=lambda w: w.value.numel()).name if owners else None


@dataclass(frozen=True)
class Literal:
    """A number that stood in the code at one call, and the labels that it counts (None: it does not change)."""

    node: fx.Node
    argument: int | str  # position or name
    at: int | None  # place within the argument, where that is a list
    number: int
    labels: Tensor | None  # (number,), or (number, ...) for a weight's data, which vary along another dimension as well


@dataclass
class Constant:
    """A result without channels that meets some along a dimension: the wiring can pick a part of it."""

    step: int  # that made it
    dim: int
    labels: Tensor
    users: list[int] = field(default_factory=list)  # the steps where it does


@dataclass(frozen=True)
class Rescale:
    """Rows of a layer that feeds queries: they absorb sqrt(kept / all), as attention divides by its root."""

    tensors: tuple[str, ...]
    rows: Tensor
    labels: Tensor  # (head size,)


@dataclass
class Flow:
    """What the walk over the graph finds out."""

    model: nn.Module
    unions: Unions = field(default_factory=Unions)
    axes: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # (weight, dimension) -> labels along it
    blocks: dict[str, Tensor] = field(default_factory=dict)  # grouped convolution -> (groups, inputs of a group)
    elements: dict[str, Tensor] = field(default_factory=dict)  # weight that entered as data -> label of each element
    outputs: dict[str, Tensor] = field(default_factory=dict)  # layer -> labels of its outputs
    inputs: dict[str, Tensor] = field(default_factory=dict)
    equal: list[tuple[Tensor, ...]] = field(default_factory=list)
    pins: list[tuple[Tensor, str]] = field(default_factory=list)
    fixed: dict[str, str] = field(default_factory=dict)  # weight -> why none of its dimensions may change
    literals: list[Literal] = field(default_factory=list)
    constants: dict[tuple[fx.Node, int], Constant] = field(default_factory=dict)
    rescales: list[Rescale] = field(default_factory=list)
    norms: dict[str, Tensor] = field(default_factory=dict)  # node of a norm or of its statistic -> labels
    spans: dict[str, tuple[Tensor, int]] = field(default_factory=dict)  # node of a group norm -> labels, groups
    computed: dict[str, Val] = field(default_factory=dict)  # node -> the weight of a layer that it computes
    statistics: list[tuple[str, Val, tuple[int, ...]]] = field(default_factory=list)  # node, of what, over what
    names: dict[str, str] = field(default_factory=dict)  # placeholder -> weight
    aliases: dict[str, list[str]] = field(default_factory=dict)  # weight -> all its names
    entered: dict[str, str] = field(default_factory=dict)  # layer -> the weight that it is known by

    def pin(self, labels: Tensor | None, reason: str) -> None:
        """These channels stay."""
        if labels is not None:
            self.pins.append((torch.unique(labels), reason))

    def pin_value(self, val: Val, reason: str) -> None:
        """Whatever this value holds stays."""
        for weight in (val, *val.made):
            if weight.name is not None:
                self.fixed.setdefault(weight.name, reason)
        self.pin(val.labels, reason)

    def axis(self, val: Val, dim: int) -> Tensor:
        """Labels along a dimension of a weight, fresh ones the first time."""
        places = val.places(dim)
        if not any(place in self.axes for place in places):
            self.axes[places[0]] = self.unions.fresh(val.value.shape[dim])
        labels = next(self.axes[place] for place in places if place in self.axes)
        for place in places:
            self.unions.unite(self.axes.setdefault(place, labels.clone()), labels)
        return labels

    def tie(self, val: Any, dim: int, labels: Tensor | None, reason: str) -> None:
        """These labels are a weight's entries along a dimension; without labels its entries stay, for this reason."""
        if not isinstance(val, Val) or not isinstance(val.value, Tensor):
            return
        if not val.weighs:
            own = val.labels if val.labels is not None and val.labels.dim() == 1 and labels is not None else None
            if own is None:
                self.pin_value(val, reason)
                self.pin(labels, f"{reason}: its weight is computed")
            elif labels is not None:
                self.unions.unite(own, labels)
            return
        if labels is None:
            self.pin(self.axis(val, dim), reason)
            return
        for place in val.places(dim):
            self.unions.unite(self.axes.setdefault(place, labels.clone()), labels)

    def as_data(self, val: Val) -> Val:
        """A weight that is used as data gets a label for every element."""
        if val.name is None or val.labels is not None or val.value.numel() <= 1 or not val.value.is_floating_point():
            return val
        if val.name not in self.elements:
            shape = [val.value.shape[val.dims.index(d)] for d in range(len(val.dims))]
            self.elements[val.name] = self.unions.fresh(val.value.numel()).view(shape)
        return Val(val.value, self.elements[val.name].permute(val.dims), True, data=True)

    def settle(self, labels: Tensor) -> Tensor:
        """Representatives, at most one dimension varying: the others are coupled along it, the fewest losses first."""
        labels = compact(self.unions.find(labels))
        varying = [d for d in range(labels.dim()) if labels.size(d) > 1]
        if len(varying) <= 1:
            return labels
        carrier = max(varying, key=lambda d: (self._classes(labels, d), d))
        slabs = labels.movedim(carrier, 0).flatten(1)
        self.unions.unite(slabs[:, :1], slabs[:, 1:])
        return compact(self.unions.find(labels))

    def constant(self, user: fx.Node, node: Any, dim: int, size: int) -> Tensor | None:
        """Labels for a result without channels along a dimension (from the front); None if no part can be picked."""
        at, by = (step_of(self.model, n) for n in (node, user))
        if at is None or by is None or not isinstance(self.model, Wired):
            return None
        wiring = self.model.wiring
        if wiring.steps[by].target.startswith("@") or len(wiring.inputs) + at not in refs(wiring.steps[by].args):
            return None
        if (node, dim) not in self.constants:
            self.constants[node, dim] = Constant(at, dim, self.unions.fresh(size))
        found = self.constants[node, dim]
        found.users.append(by)
        return found.labels

    def computed_weight(self, node: fx.Node, args: Any, kwargs: Any, value: Any) -> Any:
        """A weight that a node computes out of weights; what its statistics run over is noted."""
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, Val)]
        made = tuple({w.name: w for a in given for w in (a, *a.made) if w.name is not None}.values())
        if operator_name(node) in STATISTICS:
            dims = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else range(args[0].value.dim())
            of = Val(args[0].value, made=made)
            self.statistics.append((node.name, of, tuple(d % of.value.dim() for d in dims)))
        elif any(operator_name(user) in CONSUMERS for user in node.users):
            self.computed[node.name] = Val(value, made=made)
        return tuple(Val(v, made=made) for v in value) if isinstance(value, tuple) else Val(value, made=made)

    def settle_statistics(self) -> None:
        """Notes the channels over which statistics of computed weights run; those of two dimensions at once stay."""
        for name, val, dims in self.statistics:
            held = {d: self.axes[p] for d in dims for p in val.places(d) if p in self.axes}
            tables = [self.blocks[w.name] for w in val.made if w.name in self.blocks and 1 in dims]
            for labels in (*held.values(), *tables) if len(held) + len(tables) > 1 or tables else ():
                self.pin(labels, "a mean over more than one dimension of a computed weight")
            for dim, labels in held.items():
                self.norms[name] = lay(labels, dim, val.value.dim())

    def as_activation(self, val: Val) -> Val:
        """A weight's data as one factor among activations: settled like them."""
        val = self.as_data(val)
        return Val(val.value, self.settle(val.labels), val.zero) if val.data and val.labels is not None else val

    def _classes(self, labels: Tensor, dim: int) -> int:
        """How many channels would be left if each slab along this dimension had to go as a whole."""
        slabs = labels.movedim(dim, 0).flatten(1)
        ids, index = torch.unique(slabs, return_inverse=True)
        rows = torch.arange(len(slabs))[:, None].expand_as(index)
        return int(components(rows.flatten(), len(slabs) + index.flatten(), len(slabs) + len(ids)).max()) + 1

    def arrive(self, val: Val, dim: int) -> tuple[Tensor | None, bool]:
        """Labels along one dimension, and whether labels lie along another one."""
        if val.name is not None:
            val = self.as_data(val)
        if val.labels is None:
            return None, False
        labels, dim, size = val.labels, dim % val.value.dim(), val.value.shape[dim]
        if val.data and labels.size(dim) > 1:
            slabs = labels.movedim(dim, 0).flatten(1)
            self.unions.unite(slabs[:, :1], slabs)
            return self.unions.find(slabs[:, 0]), False
        if any(n > 1 for d, n in enumerate(labels.shape) if d != dim):
            return None, True
        return labels.flatten().expand(size), False


def step_of(model: nn.Module, node: Any) -> int | None:
    """The step of a network without its class that made a node; None in other code."""
    if not isinstance(model, Wired) or not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    return node.meta.get("custom", {}).get("step")


def compact(labels: Tensor) -> Tensor:
    """Size 1 along every dimension in which the labels do not vary."""
    for d in range(labels.dim()):
        if labels.size(d) > 1 and (labels == labels.narrow(d, 0, 1)).all():
            labels = labels.narrow(d, 0, 1)
    return labels


def full(val: Val) -> Tensor:
    """A value's labels in its own shape."""
    assert val.labels is not None  # held by the callers
    return val.labels.expand(val.value.shape)


def carrier(labels: Tensor | None) -> int | None:
    """The dimension along which settled labels vary, counted from the end."""
    if labels is None:
        return None
    return next((d - labels.dim() for d in range(labels.dim()) if labels.size(d) > 1), None)


def align(labels: Tensor, dims: int) -> Tensor:
    """Labels with leading dimensions of size 1, as broadcasting adds them."""
    return labels.reshape((1,) * (dims - labels.dim()) + tuple(labels.shape))


def labels_of(labels: Tensor | None) -> Tensor:
    """Labels that are known to be there."""
    assert labels is not None  # held by the callers
    return labels


def is_val(x: Any) -> bool:
    """A leaf of the trees that the operators' arguments are."""
    return isinstance(x, Val)


def lay(ids: Tensor, dim: int, dims: int) -> Tensor:
    """A vector of labels along one dimension of so many."""
    shape = [1] * dims
    shape[dim] = len(ids)
    return ids.reshape(shape)


@dataclass(frozen=True)
class Call:
    """One node of the graph: its arguments as values with labels, and its result."""

    flow: Flow
    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Any

    def arg(self, index: int, name: str = "", default: Any = None) -> Any:
        """An argument by position or name."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def nodes(self) -> list[fx.Node]:
        """The nodes that made the tensors among the arguments."""
        made = zip(pytree.tree_leaves((self.args, self.kwargs), is_leaf=is_val), self._leaves(), strict=True)
        return [node for val, node in made if isinstance(val, Val) and isinstance(val.value, Tensor)]

    def _leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.node.args, self.node.kwargs))

    def values(self) -> list[Val]:
        """All tensors among the arguments."""
        leaves = pytree.tree_leaves((self.args, self.kwargs), is_leaf=is_val)
        return [v for v in leaves if isinstance(v, Val) and isinstance(v.value, Tensor)]

    @property
    def name(self) -> str:
        """The operator."""
        return operator_name(self.node)

    def pin(self, *vals: Any, why: str = "") -> None:
        """Pins values, for this operator's sake."""
        for val in vals:
            if isinstance(val, Val):
                self.flow.pin_value(val, f"{self.name}{' ' + why if why else ''}")

    def counts(self, index: int, name: str, *labels: Tensor | None) -> None:
        """Says which labels the number, or each number of the list, at an argument counts (None: it stays).

        A list that is shorter than its labels ends where it ends; an argument that was left out says nothing.
        """
        given = plain(self.arg(index, name))
        numbers = given if isinstance(given, (tuple, list)) else [given]
        argument: int | str = index if index < len(self.args) else name
        for place, (n, ids) in enumerate(zip(numbers, labels, strict=False)):
            if isinstance(n, int) and not isinstance(n, bool):
                at = place if isinstance(given, (tuple, list)) else None
                self.flow.literals.append(Literal(self.node, argument, at, n, ids))

    def again(self, *args: Any) -> Any:
        """The operator itself, executed on labels."""
        args, kwargs = to_device((args, plain(self.kwargs)), torch.device("cpu"))  # where labels are
        try:
            return self.node.target(*args, **kwargs)  # type: ignore[operator]
        except RuntimeError:  # a view of labels that are themselves an expanded view
            return self.node.target(args[0].contiguous(), *args[1:], **kwargs)  # type: ignore[operator]


def plain(tree: Any) -> Any:
    """Values without their labels."""
    return pytree.tree_map(lambda x: x.value if isinstance(x, Val) else x, tree, is_leaf=is_val)


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enters a function into the table of operators."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def flow_labels(model: nn.Module, program: ExportedProgram, example_inputs: Any) -> Flow:
    """Walks the graph once; afterwards the flow holds every label of every weight."""
    flow = Flow(model)
    first, weights = first_names(model), weight_tensors(model)
    tensors = graph_inputs(program).tensors
    for name, canonical in first.items():
        flow.aliases.setdefault(canonical, []).append(name)
    place: dict[str, Any] = {}
    for name, value in placed(program, weights, example_inputs).items():
        known = first.get(tensors[name]) if name in tensors else None
        dims = tuple(range(value.dim())) if isinstance(value, Tensor) else ()
        place[name] = Val(value, name=known, dims=dims)
        if known:
            flow.names[name] = known
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):  # ties its inner size to its outer one
            for name, _ in module.named_parameters():
                key = f"{path}.{name}" if path else name
                flow.fixed[first[key]] = "MultiheadAttention"

    def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], (tuple, list)) else Val(plain(args[0])[plain(args[1])])
        value = node.target(*plain(args), **plain(kwargs))  # type: ignore[operator]
        if node in computed:
            return flow.computed_weight(node, args, kwargs, value)
        known = RULES.get(operator_name(node), unknown)
        return known(Call(flow, node, args, kwargs, value))

    computed = computed_weights(program, flow.names)
    with torch.no_grad():
        output = interpret(program, place, call)
    flow.settle_statistics()
    for val in pytree.tree_leaves(output, is_leaf=is_val):
        if isinstance(val, Val):
            flow.pin_value(val, "output of the model")
            if val.labels is not None:
                flow.pins.insert(0, flow.pins.pop())  # the first reason that is given counts
    for name, labels in flow.elements.items():
        if not any(name == used for used, _ in flow.axes):  # rows that nothing took go along with those that are used
            flow.settle(labels)
    return flow


def bare(value: Any) -> Any:
    """Values without labels around a result, tensors in lists and tuples one by one."""
    if isinstance(value, (tuple, list)):
        return tuple(bare(v) for v in value)
    return Val(value)


def unknown(call: Call) -> Any:
    """Pins what an operator touches that has no rule; an assertion has no result and touches nothing."""
    if call.value is None:
        return None
    call.pin(*call.values(), why="(no rule)")
    return bare(call.value)
