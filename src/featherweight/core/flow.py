"""What one run of a model did: operators and layers in order, and which tensors crossed the border of which module.

Seen from outside, by hooks and a dispatch mode, so that it needs no traceable model; it knows the path that the example
inputs took.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from featherweight.core.task import as_call, device_of, eval_mode, to_device


@dataclass(frozen=True)
class Step:
    """One operator (`layer` is None) or one call of a layer; tensors are numbered in the order of their appearance."""

    name: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    constants: tuple[Any, ...] = ()
    layer: str | None = None


@dataclass
class Visit:
    """One call of a module: the first of its arguments, its output, and its steps (from `first` to before `last`)."""

    path: str
    reads: int | None
    first: int
    makes: int | None = None
    last: int = 0


@dataclass
class Flow:
    """Steps and visits in the order in which they ended, and the model's inputs and outputs."""

    steps: list[Step] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)
    inputs: set[int] = field(default_factory=set)
    outputs: set[int] = field(default_factory=set)


def follow(model: nn.Module, example_inputs: Any, layers: Mapping[str, nn.Module]) -> Flow:
    """Runs the model once in evaluation mode; the modules in `layers` count as one step each."""
    args, kwargs = to_device(as_call(example_inputs), device_of(model))
    watch = _Watch()
    paths = {id(module): path for path, module in layers.items()}
    hooks = []
    for path, module in model.named_modules():
        before, after = watch.around(path, paths.get(id(module)))
        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    watch.flow.inputs = {watch.number(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    try:
        with eval_mode(model), watch:
            output = model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    watch.flow.outputs = {watch.number(t) for t in pytree.tree_leaves(output) if isinstance(t, Tensor)}
    return watch.flow


class _Watch(TorchDispatchMode):
    """Records operators outside of layers. Tensors are kept alive, so that their identities stay unique."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = Flow()
        self.inside = 0
        self.alive: list[Tensor] = []
        self.numbers: dict[tuple[int, int], int] = {}
        self.changes: dict[int, int] = {}  # torch's own counters are behind while an operator runs

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor in its present state: one that was changed in place is another tensor."""
        self.alive.append(tensor)
        return self.numbers.setdefault((id(tensor), self.changes.get(id(tensor), 0)), len(self.numbers))

    def numbered(self, values: Any) -> tuple[int, ...]:
        return tuple(self.number(t) for t in pytree.tree_leaves(values) if isinstance(t, Tensor))

    def written(self, schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The arguments that an operator changes in place."""
        given = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
        names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        return [t for name in names for t in pytree.tree_leaves(given.get(name)) if isinstance(t, Tensor)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside:
            return func(*args, **(kwargs or {}))
        reads = self.numbered((args, kwargs))
        output = func(*args, **(kwargs or {}))
        constants = tuple(a for a in pytree.tree_leaves((args, kwargs)) if not isinstance(a, Tensor))
        name = func.overloadpacket.__name__
        name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        if func._schema.is_mutable:
            for tensor in self.written(func._schema, args, kwargs or {}):
                self.changes[id(tensor)] = self.changes.get(id(tensor), 0) + 1
        self.flow.steps.append(Step(name, reads, self.numbered(output), constants))
        return output

    def around(self, path: str, layer: str | None) -> tuple[Callable[..., None], Callable[..., None]]:
        """The hooks of one module."""
        open_visits: list[Visit] = []

        def before(module: nn.Module, args: Any) -> None:
            reads = self.number(args[0]) if args and isinstance(args[0], Tensor) else None
            open_visits.append(Visit(path, reads, len(self.flow.steps)))
            self.inside += layer is not None

        def after(module: nn.Module, args: Any, output: Any) -> None:
            visit = open_visits.pop()
            visit.makes = self.number(output) if isinstance(output, Tensor) else None
            if layer is not None:
                self.inside -= 1
                if not self.inside and visit.reads is not None and visit.makes is not None:
                    self.flow.steps.append(Step("layer", (visit.reads,), (visit.makes,), (), layer))
            visit.last = len(self.flow.steps)
            self.flow.visits.append(visit)

        return before, after
