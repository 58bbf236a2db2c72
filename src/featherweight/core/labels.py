"""Label flow: which entries of which tensors are the same channel, found by executing a traced graph on labels.

Beside every activation travels an integer tensor of the same shape (kept with size 1 where it does not vary) whose
entries name channels. Layers with weights give their output channels fresh labels and tie the labels that arrive to
their input channels; operators that only move data are executed on the labels themselves; where activations meet
pointwise, labels are united. After every step an activation's labels vary along one dimension only, so that what is
left after a removal is again a box. An operator that is not in the table pins the labels that it touches.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from featherweight.core.task import to_device
from featherweight.core.trace import first_names, graph_inputs, interpret, operator_name, owner, placed, weight_tensors


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


@dataclass(frozen=True)
class Literal:
    """Numbers that stood in the code at one call, each with the labels that it counts (None: it does not change)."""

    path: str
    operator: str
    numbers: tuple[tuple[int, Tensor | None], ...]


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
    rescales: list[Rescale] = field(default_factory=list)
    norms: dict[str, Tensor] = field(default_factory=dict)  # node of a layer or RMS norm -> labels along its dimension
    spans: dict[str, tuple[Tensor, int]] = field(default_factory=dict)  # node of a group norm -> labels, groups
    names: dict[str, str] = field(default_factory=dict)  # placeholder -> weight
    aliases: dict[str, list[str]] = field(default_factory=dict)  # weight -> all its names
    entered: dict[str, str] = field(default_factory=dict)  # layer -> the weight that it is known by

    def pin(self, labels: Tensor | None, reason: str) -> None:
        """These channels stay."""
        if labels is not None:
            self.pins.append((torch.unique(labels), reason))

    def pin_value(self, val: Val, reason: str) -> None:
        """Whatever this value holds stays."""
        if val.name is not None:
            self.fixed.setdefault(val.name, reason)
        self.pin(val.labels, reason)

    def axis(self, val: Val, dim: int) -> Tensor:
        """Labels along a dimension of a weight, fresh ones the first time."""
        assert val.name is not None  # held by the callers
        key = (val.name, val.dims[dim])
        if key not in self.axes:
            self.axes[key] = self.unions.fresh(val.value.shape[dim])
        return self.axes[key]

    def tie(self, val: Any, dim: int, labels: Tensor | None, reason: str) -> None:
        """These labels are a weight's entries along a dimension; without labels its entries stay, for this reason."""
        if not isinstance(val, Val) or not isinstance(val.value, Tensor):
            return
        if val.name is None:
            own = val.labels if val.labels is not None and val.labels.dim() == 1 and labels is not None else None
            if own is None:
                self.pin_value(val, reason)
                self.pin(labels, f"{reason}: its weight is computed")
            elif labels is not None:
                self.unions.unite(own, labels)
            return
        if labels is None:
            self.pin(self.axis(val, dim), reason)
        elif (key := (val.name, val.dims[dim])) in self.axes:
            self.unions.unite(self.axes[key], labels)
        else:
            self.axes[key] = labels.clone()

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

    def literal(self, *numbers: tuple[Any, Tensor | None]) -> None:
        """Says which labels the numbers in the code count."""
        kept = tuple((n, ids) for n, ids in numbers if isinstance(n, int) and not isinstance(n, bool))
        self.flow.literals.append(Literal(owner(self.node), self.name, kept))

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
        known = RULES.get(operator_name(node), unknown)
        return known(Call(flow, node, args, kwargs, value))

    with torch.no_grad():
        output = interpret(program, place, call)
    for val in pytree.tree_leaves(output, is_leaf=is_val):
        if isinstance(val, Val):
            flow.pin_value(val, "output of the model")
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


# --- pointwise -------------------------------------------------------------------------------------------------------

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
    if any(v.labels is None and any(size[d] > 1 for d in varying) for v, size in zip(vals, sizes, strict=True)):
        flow.pin(base, f"{call.name} with a constant of the same size")
    still_data = all(vals[i].data for i in joined) and all(v.value.numel() == 1 for v in vals if v.labels is None)
    labels = flow.unions.find(base) if still_data else flow.settle(base)
    return Val(out, labels, keeps_zero(call, [given[i] for i in joined if vals[i].zero]), data=still_data)


def keeps_zero(call: Call, zeros: Sequence[Val]) -> bool:
    """Whether the result of a pointwise operator is zero where these arguments are: tried on a few numbers."""

    def sample(x: Any) -> Any:
        if not isinstance(x, Val) or not isinstance(x.value, Tensor):
            return plain(x)
        if any(x is z for z in zeros):
            return torch.zeros(4, dtype=x.value.dtype)
        return torch.tensor([0.3, 0.6, 0.9, 1.7]).to(x.value.dtype)

    args, kwargs = (pytree.tree_map(sample, tree, is_leaf=is_val) for tree in (call.args, call.kwargs))
    try:
        return bool(zeros) and not bool(call.node.target(*args, **kwargs).to(torch.float64).any())  # type: ignore[operator]
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


# --- data movement ---------------------------------------------------------------------------------------------------


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
    for other in call.values()[1:]:
        if call.name not in ("view_as", "reshape_as", "expand_as"):
            call.pin(other, why="as an index")
    if x.labels is None:
        return bare(call.value)
    if not x.data and picks_channels(call, x):
        call.pin(x, why="of single channels")
    labels = call.again(full(x), *plain(call.args[1:]))
    found = moved(call, x, labels)
    record(call, x, found)
    return found


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
        "slice": lambda: where % dims == axis and call.value.shape != x.value.shape,
        "narrow": lambda: where % dims == axis and call.value.shape != x.value.shape,
        "roll": lambda: axis in {d % dims for d in as_list(call.arg(2, "dims", [axis]))},
        "index": lambda: axis < len(where) and where[axis] is not None,
        "unfold": lambda: where % dims == axis,
        "diagonal": lambda: True,
        "rot90": lambda: True,
    }
    return bool(picked.get(call.name, lambda: False)())


def as_list(dims: Any) -> list[int]:
    """One dimension or several."""
    return list(dims) if isinstance(dims, (tuple, list)) else [dims]


def record(call: Call, x: Val, found: Any) -> None:
    """What the sizes that stand in the code count, and which parts must lose equally many."""
    if call.name in ("view", "reshape", "_unsafe_view", "unflatten", "expand", "broadcast_to"):
        sizes = list(plain(call.args[2] if call.name == "unflatten" else call.arg(1, "size")))
        lead = call.args[1] % x.value.dim() if call.name == "unflatten" else found.value.dim() - len(sizes)
        counted = carrier(found.labels)
        axis = None if counted is None else counted + found.value.dim() - lead
        ids = None if found.labels is None else found.labels.flatten()
        call.literal(*((n, ids if d == axis else None) for d, n in enumerate(sizes)))
    if ("split" in call.name or "chunk" in call.name) and x.labels is not None:
        dim = call.arg(2, "dim", 0) % x.value.dim()
        if carrier(x.labels) != dim - x.value.dim():
            return
        parts = x.labels.flatten().split([v.value.shape[dim] for v in found])
        sizes = as_list(plain(call.args[1])) if "split" in call.name else []
        if len({len(p) for p in parts}) == 1:
            call.flow.equal.append(tuple(parts))
        elif call.name != "split_with_sizes":
            call.pin(x, why="into unequal parts")
        call.literal(*zip(sizes, parts, strict=False))


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
        numbers: list[tuple[int, Tensor | None]] = [(n, None) for n in amounts]
        numbers[2 * (-at - 1) : 2 * (-at - 1) + 2] = [(before, front), (behind, back)]
        call.literal(*numbers)
    return Val(call.value, flow.settle(labels), x.zero and zeros)


# --- reductions and neighbourhoods -----------------------------------------------------------------------------------


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


# --- layers with weights ---------------------------------------------------------------------------------------------


def enter(call: Call, weight: Val, inputs: Tensor | None, outputs: Tensor | None) -> None:
    """Notes what a layer's inputs and outputs are, under its path.

    A tied weight is noted under the layer that uses it; a second weight of one module under the weight's own name.
    """
    if weight.name is None:
        return
    flow, name = call.flow, weight.name
    name = next((n for n in flow.aliases.get(name, ()) if n.rpartition(".")[0] == owner(call.node)), name)
    path = name.rpartition(".")[0]
    if flow.entered.setdefault(path, name) != name and not {name, flow.entered[path]} & norm_names(path):
        path = name
    if inputs is not None:
        flow.inputs[path] = inputs
    if outputs is not None:
        flow.outputs[path] = outputs


def norm_names(path: str) -> set[str]:
    """The four vectors of a norm, which are one layer."""
    return {f"{path}.{name}" for name in ("bias", "running_mean", "running_var")}


def affine(call: Call, x: Val, weight: Val, bias: Any, ins: int, outs: int, dim: int = -1) -> Any:
    """A matrix of weights along one dimension of x (a linear layer, or a convolution of one group)."""
    flow = call.flow
    if weight.name is None:
        call.pin(x, weight, bias, why="with a computed weight")
        return Val(call.value)
    arrived, elsewhere = flow.arrive(x, dim)
    flow.tie(weight, ins, arrived, "input of the model or of fixed size")
    out = flow.axis(weight, outs)
    flow.tie(bias, 0, out, call.name)
    enter(call, weight, arrived, out)
    if elsewhere:  # works beside the channels (on tokens, say), which pass through
        flow.pin(out, f"{call.name} over another dimension than the channels")
        labels = x.labels if dim == -1 else None
        if labels is None:
            call.pin(x, why="over another dimension than the channels")
        return Val(call.value, labels, False)
    return Val(call.value, flow.settle(lay(out, dim, call.value.dim())), True)


@rule("linear")
def linear(call: Call) -> Any:
    """Weight (out, in)."""
    return affine(call, call.args[0], call.args[1], call.arg(2, "bias"), ins=1, outs=0)


@rule("addmm")
def addmm(call: Call) -> Any:
    """bias + x @ weight, the weight (in, out)."""
    bias, x, weight = call.args[:3]
    return affine(call, x, weight, bias, ins=0, outs=1)


@rule(*(f"conv{n}d" for n in (1, 2, 3)))
def conv(call: Call) -> Any:
    """Weight (out, in / groups, ...); depthwise: an input and its outputs are one channel; grouped: equal losses."""
    flow, x, weight, bias = call.flow, call.args[0], call.args[1], call.arg(2, "bias")
    groups = call.arg(6, "groups", 1)
    dim = 1 - call.value.dim() if call.value.dim() == x.value.dim() else 0
    if groups == 1 or weight.name is None:
        return affine(call, x, weight, bias, ins=1, outs=0, dim=dim)
    arrived, elsewhere = flow.arrive(x, dim)
    out = flow.axis(weight, 0)
    flow.tie(bias, 0, out, call.name)
    enter(call, weight, arrived, out)
    by_group = out.view(groups, -1)
    if elsewhere:
        call.pin(x, why="over another dimension than the channels")
    if weight.value.shape[1] == 1:
        if arrived is None:
            flow.pin(out, f"{call.name}, depthwise on the input or a fixed size")
        else:
            flow.unions.unite(by_group, arrived[:, None])
            call.literal((groups, arrived))
    else:
        flow.equal.append(tuple(by_group))
        if arrived is not None:
            flow.equal.append(tuple(arrived.view(groups, -1)))
            if weight.name in flow.blocks:
                flow.unions.unite(flow.blocks[weight.name], arrived.view(groups, -1))
            else:
                flow.blocks[weight.name] = arrived.view(groups, -1).clone()
    return Val(call.value, flow.settle(lay(out, dim, call.value.dim())), True)


@rule(*(f"conv_transpose{n}d" for n in (1, 2, 3)))
def conv_transpose(call: Call) -> Any:
    """Weight (in, out / groups, ...)."""
    flow, x, weight, bias = call.flow, call.args[0], call.args[1], call.arg(2, "bias")
    groups = call.arg(6, "groups", 1)
    dim = 1 - call.value.dim() if call.value.dim() == x.value.dim() else 0
    if groups == 1 or weight.name is None:
        return affine(call, x, weight, bias, ins=0, outs=1, dim=dim)
    arrived, _ = flow.arrive(x, dim)
    if arrived is None or weight.value.shape[1] != 1:
        call.pin(x, weight, bias, why="in groups")
        return Val(call.value)
    flow.tie(weight, 0, arrived, call.name)
    flow.tie(bias, 0, arrived, call.name)
    enter(call, weight, arrived, arrived)
    call.literal((groups, arrived))
    return Val(call.value, flow.settle(lay(arrived, dim, call.value.dim())), True)


@rule("embedding")
def embedding(call: Call) -> Any:
    """Weight (words, size): words stay, the size is channels."""
    flow, weight = call.flow, call.args[0]
    if weight.name is None:
        call.pin(weight, why="with a computed table")
        return Val(call.value)
    flow.pin(flow.axis(weight, 0), "embedding: its rows are the vocabulary")
    out = flow.axis(weight, 1)
    enter(call, weight, None, out)
    return Val(call.value, flow.settle(lay(out, -1, call.value.dim())), True)


def per_channel(call: Call, x: Val, weights: Iterable[Any], dim: int, *, zero: bool) -> Any:
    """Weights that are vectors along one dimension of x: norms, slopes."""
    flow, given = call.flow, [w for w in weights if isinstance(w, Val) and isinstance(w.value, Tensor)]
    arrived, elsewhere = flow.arrive(x, dim)
    if elsewhere:
        call.pin(x, *given, why="over another dimension than the channels")
        return Val(call.value)
    for weight in given:
        flow.tie(weight, 0, arrived, "input of the model or of fixed size")
        enter(call, weight, arrived, arrived)
    if arrived is None:
        return Val(call.value)
    return Val(call.value, flow.settle(lay(arrived, dim, call.value.dim())), zero)


@rule("batch_norm", "instance_norm")
def batch_norm(call: Call) -> Any:
    """Weight, bias, running mean and running variance along dimension 1."""
    affine_zero = all(isinstance(call.arg(i), Val) for i in (1, 2))
    return per_channel(call, call.args[0], call.args[1:5], 1, zero=affine_zero)


@rule("group_norm")
def group_norm(call: Call) -> Any:
    """Groups of neighbouring channels that must lose equally many; a group of one channel goes with it."""
    flow, x, groups = call.flow, call.args[0], call.args[1]
    found = per_channel(call, x, call.args[2:4], 1, zero=isinstance(call.arg(3, "bias"), Val))
    arrived, _ = flow.arrive(x, 1)
    if arrived is not None and found.labels is not None:
        if 1 < groups < len(arrived):
            flow.equal.append(tuple(arrived.view(groups, -1)))
        flow.spans[call.node.name] = (arrived, groups)
        call.literal((groups, arrived if groups == len(arrived) and groups > 1 else None))
    return found


@rule("layer_norm", "rms_norm")
def layer_norm(call: Call) -> Any:
    """Statistics over the last dimensions; weight and bias of their shape."""
    flow, x, shape = call.flow, call.flow.as_activation(call.args[0]), list(call.args[1])
    weights = [w for w in call.args[2:4] if isinstance(w, Val)]
    at = carrier(x.labels)
    if x.labels is None:
        call.pin(*weights, why="over a fixed size")
        return Val(call.value)
    if at is None or -at > len(shape):  # normalises something else than channels
        call.pin(*weights, why="over another dimension than the channels")
        return Val(call.value, x.labels, False)
    ids = x.labels.flatten()
    for weight in weights:
        flow.tie(weight, at + len(shape), ids, call.name)
        if len(shape) == 1:
            enter(call, weight, ids, ids)
    flow.norms[call.node.name] = lay(ids, at, len(shape))
    call.literal(*((n, ids if d == at + len(shape) else None) for d, n in enumerate(shape)))
    biased = call.name == "rms_norm" or len(weights) == 2
    return Val(call.value, flow.settle(x.labels), biased)


# --- products of activations -----------------------------------------------------------------------------------------


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


# --- recurrent layers ------------------------------------------------------------------------------------------------


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(call: Call) -> Any:
    """Hidden unit j is one channel in all layers and directions, for a module has one hidden size."""
    flow, x, states, weights = call.flow, *call.args[:3]
    biased, layers, both = call.args[3], call.args[4], call.args[7]
    gates = {"lstm": 4, "gru": 3}.get(call.name, 1)
    each = 4 if biased else 2
    directions = 2 if both else 1
    if len(weights) != each * layers * directions or any(w.name is None for w in weights):
        call.pin(*call.values(), why="with projections or computed weights")
        return bare(call.value)
    call.pin(*(s for s in (states if isinstance(states, (tuple, list)) else [states])), why="as an initial state")
    hidden = flow.axis(weights[1], 1)
    arrived, elsewhere = flow.arrive(x, -1)
    if elsewhere:
        call.pin(x, why="over another dimension than the channels")
    enter(call, weights[0], arrived, hidden)
    for i in range(layers * directions):
        w_ih, w_hh, *biases = weights[each * i : each * (i + 1)]
        flow.tie(w_hh, 1, hidden, call.name)
        for w in (w_ih, w_hh, *biases):
            flow.tie(w, 0, hidden.repeat(gates), call.name)
        first = i < directions
        flow.tie(w_ih, 1, arrived if first else hidden.repeat(directions), "input of the model or of fixed size")
    out, *finals = call.value
    labels = flow.settle(lay(hidden.repeat(directions), -1, out.dim()))
    return (Val(out, labels, True), *(Val(s, flow.settle(lay(hidden, -1, s.dim())), True) for s in finals))
