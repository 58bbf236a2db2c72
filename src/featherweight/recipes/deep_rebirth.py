"""DeepRebirth: layers that only cost time are merged into the convolutions beside them, which learn what they did."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.capture import layer_io
from featherweight.core.fit import MakeOptimizer, Optimizers, make_optimizer
from featherweight.core.flow import Flow, Step, follow
from featherweight.core.fold import fold_batchnorm
from featherweight.core.forms import bake, mask_zeros, masked_names, own_modules
from featherweight.core.layers import layer_spec
from featherweight.core.ledger import note, skip
from featherweight.core.reconstruct import Moments, augmented, gather, put, refusal
from featherweight.core.residual import steps_behind
from featherweight.core.surgery import altered, swap
from featherweight.core.task import Batch, Task, eval_mode
from featherweight.errors import BadOption, FormatError

Kind = Literal["exact", "learned", "no"]
"""Whether a merge changed nothing, must be learned, or could not be done."""

POSITIONS, RIDGE = 10, 1e-4  # of every map in the least squares, and its pull towards the old weights
POOLS = (nn.MaxPool2d, nn.AvgPool2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NOTHING = (
    "the network has nothing that could be merged: no batch norm behind a layer, no convolution with a pooling or "
    "local response norm as a module of its own behind it, no block that concatenates branches: choose another method"
)


@recipe(
    paper="Li et al., AAAI 2018, arXiv:1708.04728",
    family="prune",
    needs={"labels", "train"},
    small={"epochs": 1, "finetune": 1, "calibration_batches": 2},
)
def deep_rebirth(
    model: nn.Module,
    task: Task,
    *,
    merge: Literal["both", "streamline", "branch"] = "both",
    kernel: Literal["same", "field"] = "same",
    faster: Positive = 10.0,
    epochs: Amount = 2,
    finetune: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = "sgd",
    calibration_batches: Count = 16,
) -> nn.Module:
    """Merges norms, poolings and parallel branches into convolutions, front to back, and relearns each new layer.

    Dawei Li, Xiaolong Wang, Deguang Kong, "DeepRebirth: Accelerating Deep Neural Network Execution on Mobile Devices",
    AAAI 2018. Streamline merging: batch norms are multiplied into the layer before them, exactly; local response norms
    are dropped; a pooling is dropped and its stride moves into the convolution before it. Branch merging: of a block
    that concatenates branches one is kept, and its last convolution widened to the width of all. A new convolution
    starts at `min ||Y - conv(X)||^2`, Y what the old layers put out in the original network, X what it reads now; then
    the network is trained with `faster` times the learning rate for the new layer.

    What can be merged exactly is: an average pooling behind a convolution, without a nonlinearity between, is a larger
    kernel with the product of the strides; parallel convolutions of the same stride are one with the largest kernel,
    smaller ones in its middle.

    Departs from the paper: of a block the branch with the most layers (of those the largest kernel) is kept, where the
    paper keeps two of four; a pooling before a convolution, and what is no module of its own (a function in the
    network's code), stay; the least squares start is ours in its details. What this saves is time: batch norms and
    poolings have no MACs in our count, a stride that moves forward saves MACs too.

    Args:
        merge: "streamline", "branch" or "both".
        kernel: of a convolution that takes over a pooling: the "same" as before, or the whole "field" that pooling and
            convolution see; the latter also where sizes leave no choice.
        faster: factor of the learning rate of the new layer while it learns.
        epochs: training after every merged layer.
        finetune: training at the end, the learning rate falling to zero.
        lr: learning rate of both.
        optimizer: of both, as in `fit`.
        calibration_batches: batches for least squares.

    Raises:
        BadOption: there is nothing to merge.
        TraceError: the network cannot be traced.
    """
    masked = masked_names(model)
    bake(model)
    before = sum(isinstance(module, NORMS) for module in model.modules())
    fold_batchnorm(model, task.inputs())
    folded = before - sum(isinstance(module, NORMS) for module in model.modules())
    original, batches = copy.deepcopy(model), list(islice(task.calibrating(), calibration_batches))

    def relearn(path: str) -> None:
        mask_zeros(model, masked)
        new = list(model.get_submodule(path).parameters())
        task.fit(
            model, task, epochs=epochs, lr=lr, optimizer=with_faster(optimizer, new, faster), label=f"relearn {path}"
        )
        bake(model)

    merged = 0
    sides = Sides(model, original, task, batches, frozenset(path for path, _ in masked))
    for stream in streams(model, task) if merge != "branch" else ():
        kind = merge_stream(sides, stream, kernel)
        merged += kind != "no"
        if kind == "learned":
            relearn(stream.conv)
    for block in blocks(model, task) if merge != "streamline" else ():
        kind, path = merge_block(sides, block)
        merged += kind != "no"
        if kind == "learned":
            relearn(path)
    if not folded + merged:
        raise BadOption(NOTHING)
    note(f"{folded} batch norms folded, {merged} poolings, norms and blocks merged")
    mask_zeros(model, masked)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def with_faster(optimizer: Optimizers, new: Sequence[nn.Parameter], factor: float) -> MakeOptimizer:
    """The same optimizer with `factor` times the learning rate for new parameters."""
    chosen = {id(p) for p in new}

    def make(params: list[nn.Parameter], lr: float) -> Optimizer:
        made = make_optimizer(optimizer, [p for p in params if id(p) not in chosen], lr)
        made.add_param_group({"params": [p for p in params if id(p) in chosen], "lr": factor * lr})
        return made

    return make


@final
@dataclass(frozen=True)
class Sides:
    """The network that changes and the one it was, with the batches on which the first learns what the second did."""

    model: nn.Module
    original: nn.Module
    task: Task
    batches: Sequence[Batch]
    masked: frozenset[str] = frozenset()

    def reads(self, path: str, batch: Batch) -> Tensor:
        """What a module of the network that changes reads."""
        return next(iter(layer_io(self.model, path, self.task, [batch])))[0]

    def puts_out(self, path: str, batch: Batch) -> Tensor:
        """What a module of the original network puts out."""
        return next(iter(layer_io(self.original, path, self.task, [batch])))[1]

    def regress(self, path: str, target: str, free: Tensor) -> None:
        """Least squares of a convolution to what `target` puts out, over the `free` weights (outputs, columns).

        An output of which no weight is free stays as it is, its bias too.
        """
        conv = cast(nn.Conv2d, self.model.get_submodule(path))
        if reason := refusal(conv):
            note(f"{path} starts from the old weights: {reason}")
            return
        generator = torch.Generator().manual_seed(0)
        pairs = ((self.reads(path, batch), self.puts_out(target, batch)) for batch in self.batches)
        rows = (row for x, y in pairs for row in gather(conv, x, y, POSITIONS, generator))
        bias = free.any(1, keepdim=True) & (conv.bias is not None)
        put(conv, Moments.of(rows).refit(augmented(conv), torch.cat([free, bias], 1), RIDGE))


def leaves(model: nn.Module, task: Task) -> tuple[dict[str, nn.Module], Flow]:
    """The modules without children by path, and what one run of the network did with them as single steps."""
    single = {path: m for path, m in own_modules(model) if path and not any(True for _ in m.children())}
    return single, follow(model, task.inputs(), {p: m for p, m in single.items() if not isinstance(m, nn.Identity)})


# --- streamline merging ----------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Stream:
    """A convolution and what stands behind it: local response norms, and a pooling or "" (`linear`: no ReLU before)."""

    conv: str
    norms: tuple[str, ...]
    pool: str
    linear: bool


def streams(model: nn.Module, task: Task) -> list[Stream]:
    """The convolutions that something that could be merged follows, in the order of their calls."""
    single, flow = leaves(model, task)
    readers: dict[int, list[Step]] = {}
    for step in flow.steps:
        for number in step.reads:
            readers.setdefault(number, []).append(step)
    calls = Counter(step.layer for step in flow.steps)
    found = []
    for step in flow.steps:
        layer = single.get(step.layer or "")
        if isinstance(layer, nn.Conv2d) and calls[step.layer] == 1 and not altered(layer) and layer.padding != "same":
            following = [s for s in only_readers(step, readers) if s.layer is None or calls[s.layer] == 1]
            stream = _stream(step.layer or "", [(s, single.get(s.layer or "")) for s in following])
            found += [stream] if stream.norms or stream.pool else []
    return found


def only_readers(step: Step, readers: Mapping[int, list[Step]]) -> Iterator[Step]:
    """What alone reads a step's output, what alone reads that, and so on."""
    while len(following := readers.get(step.makes[0], [])) == 1 and len(following[0].makes) == 1:
        step = following[0]
        yield step


def _stream(conv: str, following: Sequence[tuple[Step, nn.Module | None]]) -> Stream:
    """What of the steps behind a convolution belongs to it, up to the first pooling."""
    norms: list[str] = []
    linear = True
    for step, module in following:
        if isinstance(module, POOLS):
            return Stream(conv, tuple(norms), step.layer or "", linear and not norms)
        if isinstance(module, nn.LocalResponseNorm):
            norms.append(step.layer or "")
        elif step.name == "relu" or isinstance(module, nn.ReLU):
            linear = False
        elif not isinstance(module, nn.Dropout | nn.Dropout2d):
            break
    return Stream(conv, tuple(norms), "", linear)


def merge_stream(sides: Sides, stream: Stream, kernel: str) -> Kind:
    """Merges what follows a convolution into it, in place; says whether that is exact, must be learned, or failed."""
    conv = cast(nn.Conv2d, sides.model.get_submodule(stream.conv))
    pool = sides.original.get_submodule(stream.pool) if stream.pool else None
    target = stream.pool or stream.norms[-1]
    exact = stream.linear and averaged(conv, pool) is not None
    kinds = ["exact"] if exact else ["same"] if pool is None else [kernel, "field"]
    size = sides.puts_out(target, sides.batches[0]).shape[2:]
    seen = sides.reads(stream.conv, sides.batches[0])
    found = ((kind, taken_over(conv, pool, kind)) for kind in kinds)
    with torch.no_grad():
        kind, new = next(((kind, new) for kind, new in found if new(seen).shape[2:] == size), ("", None))
    if new is None:
        skip(stream.conv, f"it does not take over {stream.pool}: no stride and kernel give maps of {tuple(size)}")
        return "no"
    for path in (*stream.norms, stream.pool):
        if path:
            swap(sides.model, path, nn.Identity())
    swap(sides.model, stream.conv, new)
    if not exact:
        kept = new.weight.detach().flatten(1).cpu() != 0
        sides.regress(stream.conv, target, kept if stream.conv in sides.masked and kind == "same" else kept | True)
    return "exact" if exact else "learned"


def taken_over(conv: nn.Conv2d, pool: nn.Module | None, kind: str) -> nn.Conv2d:
    """A copy of a convolution with the stride of a pooling; "field": with a kernel that sees what both saw."""
    new = copy.deepcopy(conv)
    if pool is None:
        return new
    new.stride = tuple(a * b for a, b in zip(conv.stride, pair(pool.stride), strict=True))
    weight = averaged(conv, pool) if kind == "exact" else conv.weight.detach()
    assert weight is not None
    if kind == "field":
        reach = [(p - 1) * s for p, s in zip(pair(pool.kernel_size), conv.stride, strict=True)]
        down, right = (n // 2 for n in reach)
        weight = F.pad(weight, (right, reach[1] - right, down, reach[0] - down))
    new.weight = nn.Parameter(weight.to(conv.weight))
    new.kernel_size = tuple(weight.shape[2:])
    return new


def averaged(conv: nn.Conv2d, pool: nn.Module | None) -> Tensor | None:
    """The kernel of a convolution and an average pooling behind it, `k + (p - 1) s` wide; None where there is none."""
    if not isinstance(pool, nn.AvgPool2d) or pair(pool.padding) != (0, 0) or pool.ceil_mode or pool.divisor_override:
        return None
    if conv.dilation != (1, 1) or not isinstance(conv.padding, tuple):
        return None
    height, width = pair(pool.kernel_size)
    ones = torch.full((1, 1, height, width), 1 / (height * width), dtype=torch.float64, device=conv.weight.device)
    flat = conv.weight.detach().double().flatten(0, 1)[:, None]
    return F.conv_transpose2d(flat, ones, dilation=conv.stride)[:, 0].unflatten(0, conv.weight.shape[:2])


def pair(value: Any) -> tuple[int, int]:
    """A size in both directions."""
    return value if isinstance(value, tuple) else (value, value)


# --- branch merging --------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Block:
    """A module that concatenates branches, each a row of layers from its input, and may end with a ReLU."""

    path: str
    branches: tuple[tuple[nn.Module, ...], ...]
    relu: bool


def blocks(model: nn.Module, task: Task) -> list[Block]:
    """The blocks of parallel branches that can be merged, in the order of their calls; others are skipped aloud."""
    single, flow = leaves(model, task)
    calls = Counter(visit.path for visit in flow.visits)
    found: list[Block] = []
    seen = set()
    for visit in flow.visits:  # inner modules before those around them
        steps = flow.steps[visit.first : visit.last]
        joins = [step for step in steps if step.name == "cat" and step.constants in ((1,), (-3,))]
        if not visit.path or visit.path in single or calls[visit.path] > 1 or len(joins) != 1 or joins[0] in seen:
            continue
        seen.add(joins[0])
        rows = [_row(single, steps_behind(n, visit.reads, steps), visit.reads) for n in joins[0].reads]
        behind = steps[steps.index(joins[0]) + 1 :]
        ends = joins[0] if not behind else behind[0] if len(behind) == 1 and _is_relu(single, behind[0]) else None
        if any(row is None for row in rows) or ends is None or visit.makes not in ends.makes or len(rows) < 2:
            skip(visit.path, "its branches are not rows of layers that are put together along the channels")
        else:
            found.append(Block(visit.path, tuple(row for row in rows if row is not None), bool(behind)))
    return found


def _row(
    single: Mapping[str, nn.Module], steps: Sequence[Step] | None, start: int | None
) -> tuple[nn.Module, ...] | None:
    """The modules of a branch; None if it is no row of layers that a file can describe."""
    row: list[nn.Module] = []
    for step in steps or ():
        if step.reads != (start,) or len(step.makes) != 1 or not (step.layer or _is_relu(single, step)):
            return None
        row.append(copy.deepcopy(single[step.layer]) if step.layer else nn.ReLU())
        start = step.makes[0]
    try:
        layer_spec(nn.Sequential(*row))
    except FormatError:
        return None
    return tuple(row) if any(isinstance(module, nn.Conv2d) for module in row) else None


def _is_relu(single: Mapping[str, nn.Module], step: Step) -> bool:
    return step.name == "relu" or isinstance(single.get(step.layer or ""), nn.ReLU)


def merge_block(sides: Sides, block: Block) -> tuple[Kind, str]:
    """Merges the branches of a block into one, in place; whether that is exact, and the path of the new convolution."""
    seen = sides.reads(block.path, sides.batches[0])
    with torch.no_grad(), eval_mode(sides.model):
        wide = [nn.Sequential(*branch).eval()(seen).shape[1] for branch in block.branches]
    one = parallel(block.branches)
    row = list(one or max(block.branches, key=_depth))
    tail = [nn.ReLU()] if block.relu else []
    last = max(i for i, module in enumerate(row) if isinstance(module, nn.Conv2d))
    path = f"{block.path}.{last}"
    if one is not None:
        swap(sides.model, block.path, nn.Sequential(*row, *tail))
        return "exact", path
    conv = cast(nn.Conv2d, row[last])
    if conv.groups != 1 or not all(isinstance(module, nn.ReLU) for module in row[last + 1 :]):
        skip(block.path, "the last convolution of its longest branch cannot be widened")
        return "no", path
    kept = max(range(len(wide)), key=lambda i: _depth(block.branches[i]))
    own = torch.zeros(sum(wide), dtype=torch.bool)
    own[sum(wide[:kept]) : sum(wide[: kept + 1])] = True
    row[last] = widened(conv, own)
    swap(sides.model, block.path, nn.Sequential(*row, *tail))
    sides.regress(path, block.path, (~own)[:, None].expand(-1, conv.weight[0].numel()))
    return "learned", path


def _depth(branch: Sequence[nn.Module]) -> tuple[int, int]:
    """How many convolutions a branch has, and how many taps the largest."""
    taps = [m.kernel_size[0] * m.kernel_size[1] for m in branch if isinstance(m, nn.Conv2d)]
    return len(taps), max(taps)


def widened(conv: nn.Conv2d, own: Tensor) -> nn.Conv2d:
    """A convolution with as many outputs as `own` has entries: its own where that is True, zeros elsewhere."""
    new = copy.deepcopy(conv)
    weight = conv.weight.detach().new_zeros(len(own), *conv.weight.shape[1:])
    weight[own.to(weight.device)] = conv.weight.detach()
    bias = weight.new_zeros(len(own))
    if conv.bias is not None:
        bias[own.to(weight.device)] = conv.bias.detach()
    new.weight, new.bias, new.out_channels = nn.Parameter(weight), nn.Parameter(bias), len(own)
    return new


def parallel(branches: Sequence[Sequence[nn.Module]]) -> list[nn.Module] | None:
    """The one convolution that single convolutions on the same input are, with their ReLU if all have one; or None.

    The smaller kernels stand in the middle of the largest.
    """
    convs = [branch[0] for branch in branches]
    rest = [[type(module) for module in branch[1:]] for branch in branches]
    if any(kinds not in ([], [nn.ReLU]) or kinds != rest[0] for kinds in rest):
        return None
    if not all(isinstance(c, nn.Conv2d) and c.groups == 1 and c.dilation == (1, 1) and not altered(c) for c in convs):
        return None
    plain = [cast(nn.Conv2d, c) for c in convs]
    sizes = [max(c.kernel_size[d] for c in plain) for d in range(2)]
    grown = [[sizes[d] - c.kernel_size[d] for d in range(2)] for c in plain]
    padding = set()
    for c, g in zip(plain, grown, strict=True):
        around = c.padding if isinstance(c.padding, tuple) else (0, 0)
        padding.add(tuple(p + n // 2 for p, n in zip(around, g, strict=True)))
    odd = any(n % 2 for g in grown for n in g)
    modes = {(c.stride, c.padding_mode) for c in plain}
    if (
        odd
        or any(isinstance(c.padding, str) for c in plain)
        or len(padding) > 1
        or len(modes) > 1
        or plain[0].padding_mode != "zeros"
    ):
        return None
    weights = [
        F.pad(c.weight.detach(), (g[1] // 2, g[1] // 2, g[0] // 2, g[0] // 2))
        for c, g in zip(plain, grown, strict=True)
    ]
    zeros = [c.weight.new_zeros(c.out_channels) if c.bias is None else c.bias.detach() for c in plain]
    outputs, inputs = sum(c.out_channels for c in plain), plain[0].in_channels
    new = nn.Conv2d(inputs, outputs, tuple(sizes), plain[0].stride, next(iter(padding)))  # type: ignore[arg-type]
    new = new.to(plain[0].weight)
    with torch.no_grad():
        new.weight.copy_(torch.cat(weights))
        cast(Tensor, new.bias).copy_(torch.cat(zeros))
    return [new, *(nn.ReLU() for _ in rest[0])]
