"""Grids where an integer runtime wants them: whole chains of layers then run without going back to float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from featherweight.catalogue import ingredient
from featherweight.core.flow import Flow, Step, Visit, follow
from featherweight.core.grids import Place
from featherweight.core.ledger import note, skip
from featherweight.core.task import Task

# Operators whose output lies on the grid of their input.
MOVES = {
    *("view", "_unsafe_view", "reshape", "flatten", "permute", "transpose", "t", "squeeze", "unsqueeze", "slice"),
    *("select", "clone", "detach", "alias", "expand", "constant_pad_nd"),
    *("max_pool2d", "max_pool2d_with_indices", "max_pool1d", "max_pool3d"),
}
CLAMPS = {"relu", "hardtanh", "clamp", "clamp_min"}
JOINS = {"add", "cat"}
CHAINS = (nn.Sequential, nn.ModuleList)  # what is put into these becomes one of their layers
OPEN = (float("-inf"), float("inf"))


@ingredient("place")
def fused(model: nn.Module, task: Task, layers: Mapping[str, nn.Module]) -> list[Place]:
    """Inputs of layers, outputs of convolutions, and what additions, concatenations and pooling make of these.

    A grid stands on every tensor that an integer kernel reads or writes, so that the runtime can fuse quantize,
    dequantize and the float operator between them into one integer operator. A ReLU behind a convolution is the lower
    end of the grid; pooling and reshaping keep the grid of what they read. The model's outputs stay float.

    A tensor that no module takes in or hands out cannot carry a grid: the layer that reads it quantizes it for itself,
    and that is noted.
    """
    chains = {path for path, module in model.named_modules() if isinstance(module, CHAINS)}
    plan = _Plan(follow(model, task.inputs(), layers), layers, chains)
    for step in plan.flow.steps:
        plan.forward(step)
    for step in plan.flow.steps:
        if step.layer is not None:
            plan.grid_of.setdefault(step.reads[0], step.reads[0])
    plan.tell_float()
    for path in layers.keys() - {step.layer for step in plan.flow.steps}:
        skip(path, "its inputs are not quantized: the example inputs do not reach it, or its forward is not called")
    return plan.places()


@dataclass
class _Plan:
    """Which tensors lie on which grid; a grid is named by the tensor that it starts from."""

    flow: Flow
    layers: Mapping[str, nn.Module]
    chains: set[str]
    grid_of: dict[int, int] = field(default_factory=dict)
    clamp: dict[int, tuple[float, float]] = field(default_factory=dict)
    clamped: set[int] = field(default_factory=set)  # outputs of clamps that their grid has made idle

    def __post_init__(self) -> None:
        flow = self.flow
        self.made = {tensor for step in flow.steps for tensor in step.makes} | flow.inputs
        self.calls = Counter(visit.path for visit in flow.visits)
        self.readers: dict[int, list[int]] = {}  # positions of the steps that read a tensor
        for position, step in enumerate(flow.steps):
            for tensor in set(step.reads):
                self.readers.setdefault(tensor, []).append(position)
        able = [v for v in flow.visits if v.path and self.calls[v.path] == 1 and v.path not in self.chains]
        self.giving = {v.makes: v.path for v in reversed(able) if v.makes != v.reads}
        self.taking: dict[int | None, list[Visit]] = {}
        for visit in able:
            self.taking.setdefault(visit.reads, []).append(visit)

    def reading(self, tensor: int) -> list[Step]:
        """The steps that read a tensor."""
        return [self.flow.steps[i] for i in self.readers.get(tensor, [])]

    def forward(self, step: Step) -> None:
        """Carries the grids over one step."""
        made, reads = step.makes[0] if step.makes else -1, [t for t in step.reads if t in self.made]
        if made in self.flow.outputs:
            return
        if step.layer is not None:
            if isinstance(self.layers[step.layer], nn.Conv2d) and self.calls[step.layer] == 1:
                self.start(made)
        elif step.name in JOINS and len(reads) == len(step.reads) > 1 and all(t in self.grid_of for t in reads):
            self.start(made)
        elif step.name in MOVES | CLAMPS and reads and reads[0] in self.grid_of:
            self.grid_of[made] = self.grid_of[reads[0]]

    def start(self, tensor: int) -> None:
        """A new grid; a clamp that alone reads the tensor becomes the end of the grid."""
        self.grid_of[tensor] = tensor
        readers = self.reading(tensor)
        if len(readers) == 1 and readers[0].name in CLAMPS and tensor not in self.flow.outputs:
            self.clamp[tensor] = _limits(readers[0])
            self.clamped.add(readers[0].makes[0])

    def tell_float(self) -> None:
        """Notes the operators that no integer kernel can compute, between layers that are quantized."""
        reading = [s for s in self.flow.steps if s.layer is None and set(s.reads) & self.made]
        whole = {s.makes for s in reading if s.name in MOVES | CLAMPS | JOINS and set(s.makes) & self.grid_of.keys()}
        floats = Counter(s.name for s in reading if s.makes and s.makes not in whole and s.name not in MOVES)
        if floats:
            told = ", ".join(f"{name} ({count}x)" for name, count in sorted(floats.items()))
            note(f"operators that cannot be quantized stay float: {told}")

    def places(self) -> list[Place]:
        """The places of all grids, in the order of the network."""
        sites: dict[int, dict[tuple[str, str], None]] = {}
        for tensor, grid in self.grid_of.items():
            if tensor in self.clamped and grid in self.clamp and self.hosts(grid):
                continue  # the grid before the clamp has done it
            if tensor in self.clamp and not self.hosts(tensor):
                continue  # no module hands it out: the grid stands behind the clamp
            sites.setdefault(grid, {}).update(dict.fromkeys(self.hosts(tensor) or self.own(tensor)))
        readers: dict[int, dict[str, None]] = {}
        for step in self.flow.steps:
            if step.layer is not None:
                readers.setdefault(self.grid_of[step.reads[0]], {})[step.layer] = None
        return [
            Place(tuple(found), self.clamp.get(grid, OPEN), tuple(readers.get(grid, ())))
            for grid, found in sites.items()
            if found
        ]

    def hosts(self, tensor: int) -> list[tuple[str, str]]:
        """The one layer that reads the tensor, the module that hands it out, or one whose input covers all readers."""
        readers = self.reading(tensor)
        inside = tensor not in self.flow.outputs
        if len(readers) == 1 and readers[0].layer is not None and inside:
            return [(readers[0].layer, "input")]
        if tensor in self.giving:
            return [(self.giving[tensor], "output")]
        at = self.readers.get(tensor, [])
        covering = [v for v in self.taking.get(tensor, []) if inside and all(v.first <= i < v.last for i in at)]
        return [(max(covering, key=lambda v: v.last - v.first).path, "input")] if covering else []

    def own(self, tensor: int) -> list[tuple[str, str]]:
        """The inputs of the layers that read a tensor which no module hosts."""
        readers = self.reading(tensor)
        layers = [step.layer for step in readers if step.layer is not None]
        others = sorted({step.name for step in readers if step.name in JOINS})
        if others:
            note(f"a tensor between modules, read by {', '.join(others)}, cannot carry a grid: it stays float there")
        return [(path, "input") for path in layers]


def _limits(step: Step) -> tuple[float, float]:
    """What a clamp lets through."""
    if step.name == "relu":
        return 0.0, float("inf")
    numbers = [c for c in step.constants if c is None or isinstance(c, (int, float))]
    low, high = [*numbers, None, None][:2]
    low, high = (-1.0, 1.0) if step.name == "hardtanh" and not numbers else (low, high)
    return float("-inf") if low is None else float(low), float("inf") if high is None else float(high)
