"""What passes over data show of a model's layers: activations, per-sample gate gradients, gradients of weights.

A score of one layer asks for what it needs; one pass answers for all layers, and is made once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from featherweight.core.channels import Channels, channel_groups
from featherweight.core.flow import Step, follow
from featherweight.core.surgery import WEIGHTED
from featherweight.core.task import Batch, Task, eval_mode, loss_of, run
from featherweight.errors import BadData, CompressionError, MissingNeed

T = TypeVar("T")
See = Callable[[Tensor], Tensor]
"""A batch of activations (n, channels, ...) -> rows (n or 1, ...) that are kept for every batch."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Operators of one tensor that count as a layer's activation: they are applied to what the layer (or its norm) puts out.
ACTS: dict[str, Callable[..., Tensor]] = {
    "relu": lambda x, *_: x.relu(),
    "hardtanh": lambda x, low=-1.0, high=1.0, *_: x.clamp(low, high),
    "leaky_relu": lambda x, slope=0.01, *_: nn.functional.leaky_relu(x, slope),
    "gelu": lambda x, approximate="none", *_: nn.functional.gelu(x, approximate=approximate),
    "silu": lambda x, *_: nn.functional.silu(x),
    "sigmoid": lambda x, *_: x.sigmoid(),
    "tanh": lambda x, *_: x.tanh(),
    "hardswish": lambda x, *_: nn.functional.hardswish(x),
}


@final
class Study:
    """One model, its task, and the batches that are looked at; what was found is kept until the study is dropped.

    Args:
        paths: the layers that are looked at.
        batches: how many calibration batches are gone through, at most; they are drawn once, and kept.
        channels: the model's channels, where they are known.
    """

    def __init__(
        self, model: nn.Module, task: Task, paths: Sequence[str], batches: int, channels: Channels | None = None
    ) -> None:
        self.model, self.task, self.paths, self.count = model, task, tuple(paths), batches
        self._known: dict[Any, Any] = {} if channels is None else {_channels: channels}

    def once(self, find: Callable[[Study], T]) -> T:
        """What `find` says of this study; asked once, whatever number of layers want to know."""
        if find not in self._known:
            self._known[find] = find(self)
        return self._known[find]

    def batches(self) -> list[Batch]:
        """The batches, the same and in the same order at every call, also where the data are shuffled.

        Raises:
            BadData: there are none.
        """
        return self.once(_batches)

    def sizes(self) -> list[int]:
        """How many samples each batch holds."""
        inputs = [self.task.split(batch)[:2] for batch in self.batches()]
        return [len(next(t for t in pytree.tree_leaves(one) if isinstance(t, Tensor))) for one in inputs]

    def labels(self) -> Tensor:
        """The targets of all samples, in order.

        Raises:
            MissingNeed: the batches have none.
        """
        found = [self.task.split(batch)[2] for batch in self.batches()]
        if not all(isinstance(target, Tensor) for target in found):
            raise MissingNeed("this score needs labels, which the batches do not have: yield (inputs, labels)")
        return torch.cat([target.cpu() for target in found])

    def channels(self) -> Channels:
        """Which channels live and die together."""
        return self.once(_channels)

    def loss(self) -> float:
        """Mean of the task's loss over the batches, in evaluation mode.

        Raises:
            BadData: it is not finite.
        """
        with eval_mode(self.model):
            losses = [float(_loss(self, batch)) for batch in self.batches()]
        mean = sum(losses) / len(losses)
        if not math.isfinite(mean):
            raise BadData(f"the loss of the calibration batches is {mean}: check the data and the weights")
        return mean

    def order(self) -> list[str]:
        """The weighted layers in the order in which they are called first."""
        return list(self.once(_ends))

    @contextmanager
    def seen(self, see: Callable[[str, Tensor], Tensor], paths: Sequence[str] | None = None) -> Iterator[None]:
        """A block in which the outputs of layers, behind their batch norms, are what `see(path, output)` makes of them.

        Args:
            paths: whichever weighted layers; those of the study when left out.
        """
        ends = self.once(_ends)
        with _hooked(self.model, {path: ends[path] for path in paths or self.paths}, see):
            yield

    @contextmanager
    def gated(self, gates: Mapping[str, Tensor]) -> Iterator[None]:
        """A block in which outputs of layers, behind their batch norms, are multiplied by (channels,): 0 removes one.

        Where the nonlinearity that follows is 0 at 0, that is what a removal of the channel brings.
        """

        def gate(path: str, value: Tensor) -> Tensor:
            channel = _channel_dim(self.model.get_submodule(path), value)
            return value * gates[path].to(value).view([-1 if d == channel else 1 for d in range(value.dim())])

        with self.seen(gate, list(gates)) if gates else nullcontext():
            yield

    def activated(self, path: str, value: Tensor) -> Tensor:
        """What the nonlinearity behind a layer makes of its output as `seen` shows it; itself, if there is none."""
        return self.once(_ends)[path].activated(value)

    def activations(self, see: See) -> dict[str, Tensor]:
        """What `see` keeps of every layer's activation (behind its batch norm and nonlinearity), row by row.

        A row is a sample, all that belongs to it among its positions (`sample_dim`), or what the layer's first
        dimension holds where that is no sample. A layer that is called several times has the rows of every call, one
        that is not called none at all.
        """
        if ("activations", see) not in self._known:
            rows: dict[str, list[Tensor]] = {path: [] for path in self.paths}
            ends = self.once(_ends)

            def keep(path: str, value: Tensor) -> Tensor:
                channel = _channel_dim(self.model.get_submodule(path), value)
                rows[path].append(see(_by_sample(ends[path].activated(value), channel, samples)).detach().cpu())
                return value

            with eval_mode(self.model), self.seen(keep):
                for number, batch in enumerate(self.batches()):
                    samples = self.sizes()[number]
                    run(self.model, self.task, batch)
            self._known["activations", see] = {path: torch.cat(found) for path, found in rows.items() if found}
        return self._known["activations", see]

    def gates(self) -> dict[str, Tensor]:
        """Gradient of every sample's own loss by a gate of one on each channel, (samples, channels), by layer.

        It is the sum over positions of activation times gradient (Molchanov et al., CVPR 2019, sec. 3.2). The gate
        stands behind the layer's batch norm; a nonlinearity that is 0 at 0 and linear on either side changes nothing.
        A layer that is not called, or no dimension of whose outputs holds the samples (`sample_dim`), has none.

        Raises:
            CompressionError: the task's loss does not depend on a layer's outputs.
        """
        return self.once(_gates)

    def gradients(self) -> dict[str, Tensor]:
        """Mean over the batches of the loss's gradient by every layer's weight, as the layer sees it, of its shape."""
        return self.once(_gradients)


@final
class _End:
    """Where a layer's channels are what the next layer sees: the module whose output that is, and what follows it."""

    def __init__(self, path: str, act: Step | None) -> None:
        self.path, self.act = path, act

    def activated(self, value: Tensor) -> Tensor:
        return value if self.act is None else ACTS[self.act.name](value.clone(), *self.act.constants)


def sample_dim(shape: Sequence[int], channel: int, samples: int) -> int | None:
    """Which dimension of a layer's output holds the samples; None if none does.

    The first, or the second where a sequence comes first; or the first where each sample has several entries, one after
    the other (windows, patches).

    >>> [sample_dim(shape, 2, 8) for shape in ((8, 5, 3), (5, 8, 3), (24, 5, 3), (1, 5, 3))]
    [0, 1, 0, None]
    """
    for dim in range(min(channel, 2)):
        if shape[dim] == samples:
            return dim
    return 0 if channel > 0 and shape[0] % samples == 0 else None


def _channel_dim(layer: nn.Module, value: Tensor) -> int:
    return value.dim() - 1 if isinstance(layer, nn.Linear) else 1


def _by_sample(value: Tensor, channel: int, samples: int) -> Tensor:
    """(samples, channels, positions), or (samples, channels) as it is."""
    held = sample_dim(value.shape, channel, samples)
    if held == 0 and len(value) > samples:
        value, channel = value.unflatten(0, (samples, -1)), channel + 1
    return value.movedim((held or 0, channel), (0, 1))


def _batches(study: Study) -> list[Batch]:
    found = list(islice(study.task.calibrating(), study.count))
    if not found:
        raise BadData("the calibration data are empty: at least one batch is needed")
    return found


def _loss(study: Study, batch: Batch) -> Tensor:
    output, target = run(study.model, study.task, batch)
    return loss_of(study.task, output, target)


def _channels(study: Study) -> Channels:
    return channel_groups(study.model, study.task.inputs())


def _ends(study: Study) -> dict[str, _End]:
    """Follows each layer to its batch norm, if it feeds nothing else, and on to its nonlinearity; in order of calls."""
    modules = dict(study.model.named_modules())
    layers = {p for p, m in modules.items() if p in study.paths or isinstance(m, WEIGHTED)}
    chosen = {p: m for p, m in modules.items() if p in layers or isinstance(m, NORMS)}
    flow = follow(study.model, study.task.inputs(), chosen)
    readers: dict[int, list[Step]] = {}
    for step in flow.steps:
        for tensor in step.reads:
            readers.setdefault(tensor, []).append(step)
    called = [step.layer for step in flow.steps if step.layer in layers]
    ends = {path: _End(path, None) for path in dict.fromkeys([*called, *sorted(layers)]) if path is not None}
    for step in flow.steps:
        if step.layer is not None and step.layer in ends:
            following = readers.get(step.makes[0], [])
            end = step.layer
            if len(following) == 1 and following[0].layer and isinstance(modules[following[0].layer], NORMS):
                end = following[0].layer
                following = readers.get(following[0].makes[0], [])
            act = following[0] if len(following) == 1 and following[0].name in ACTS else None
            ends[step.layer] = _End(end, act)
    return ends


@contextmanager
def _hooked(model: nn.Module, ends: Mapping[str, _End], see: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Hands the outputs of the layers' ends to `see(path, output)`; what it returns takes their place."""

    def hook(path: str) -> Callable[..., Tensor]:
        return lambda module, args, output: see(path, output)

    handles = [model.get_submodule(end.path).register_forward_hook(hook(path)) for path, end in ends.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gates(study: Study) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {path: [] for path in study.paths}
    gates: dict[str, Tensor] = {}

    def gated(path: str, value: Tensor) -> Tensor:
        channel = _channel_dim(study.model.get_submodule(path), value)
        held = sample_dim(value.shape, channel, samples)
        if held is None:
            return value
        if path not in gates:  # a layer that is called twice has one gate
            gates[path] = torch.ones(samples, value.shape[channel], device=value.device, requires_grad=True)
        each = gates[path].repeat_interleave(value.shape[held] // samples, 0)
        return value * each.view([n if d in (held, channel) else 1 for d, n in enumerate(value.shape)])

    with eval_mode(study.model), study.seen(gated):
        for samples, batch in zip(study.sizes(), study.batches(), strict=True):
            gates.clear()
            with torch.enable_grad():
                loss = _loss(study, batch) * samples  # a mean: undo its 1/B
            found = torch.autograd.grad(loss, list(gates.values()), allow_unused=True) if gates else ()
            for path, grad in zip(gates, found, strict=True):
                if grad is None:
                    raise CompressionError(f"the loss does not depend on {path}: leave it out by where=")
                rows[path].append(grad.cpu())
    return {path: torch.cat(parts) for path, parts in rows.items() if parts}


def _gradients(study: Study) -> dict[str, Tensor]:
    layers = {path: study.model.get_submodule(path) for path in study.paths}
    total: dict[str, Tensor] = {}
    batches = study.batches()
    with eval_mode(study.model):
        for batch in batches:
            with torch.enable_grad(), parametrize.cached():  # a weight under forms is computed once, and shared
                weights: list[Tensor] = [getattr(layer, "weight") for layer in layers.values()]  # noqa: B009 - typed
                found = torch.autograd.grad(_loss(study, batch), weights)
            for path, grad in zip(layers, found, strict=True):
                total[path] = total.get(path, torch.zeros_like(grad)) + grad / len(batches)
    return {path: grad.cpu() for path, grad in total.items()}
