"""Random gates on channels: factors on what layers read, learned while the network trains; closed ones are removed.

A channel has one gate, which multiplies it wherever a linear or convolution layer reads it. What couples channels
(residual sums, concatenation), norms of single channels and activations then need no thought: a closed gate stands
behind all of them, and gates fold into the columns of the weights that read. A linear layer gates each of its inputs
besides, where these are not one channel each: behind a flattened image, or on the network's own inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from featherweight.core.channels import Channels, channel_groups, remove_channels
from featherweight.core.forms import bake, mask_zeros, masked_names, owners
from featherweight.core.ledger import note, skip
from featherweight.core.surgery import WEIGHTED
from featherweight.core.task import as_call, device_of, to_device
from featherweight.errors import BadOption, CompressionError

Draw = Callable[[int, bool], Tensor]
"""`(samples, training) -> (samples or 1, gates)` factors."""
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.PReLU)


@dataclass(frozen=True)
class Held:
    """Weights that gates decide about: entries of a layer's weight along `dim`, by the number of their gate or -1."""

    path: str
    dim: int
    ids: Tensor


@dataclass(frozen=True)
class Gates:
    """Where gates stand; the first `len(numbers)` are those of channels. Valid until channels are removed."""

    count: int
    reads: dict[str, tuple[Tensor, ...]]  # layer path -> gates of each of its inputs, -1: none; all of them multiply
    held: tuple[Held, ...]  # no weight twice
    numbers: Tensor  # the channel of each gate that is a channel's
    channels: Channels

    def total(self, values: Mapping[str, Tensor]) -> Tensor:
        """For every gate the sum of the values of the weights that it decides about, (count,), with gradients.

        Args:
            values: tensors of the weights' shapes by the layer's path.
        """
        found = torch.zeros(self.count + 1, device=next(iter(values.values())).device)  # the last entry is for -1
        for h in self.held:
            sums = values[h.path].movedim(h.dim, 0).flatten(1).sum(1)
            found = found.index_add(0, torch.where(h.ids < 0, self.count, h.ids).to(found.device), sums.to(found.dtype))
        return found[:-1]

    def factors(self, path: str, values: Tensor) -> Tensor:
        """What multiplies each input of a layer, (samples, inputs), of values (samples, gates)."""
        return _product(self.reads[path], values)


def _product(vectors: tuple[Tensor, ...], values: Tensor) -> Tensor:
    padded = torch.cat([values, values.new_ones(len(values), 1)], 1)  # the last entry is for -1
    return torch.stack([padded[:, ids.to(values.device)] for ids in vectors]).prod(0)


# --- where they stand -------------------------------------------------------------------------------------------------


def gates_of(model: nn.Module, inputs: Any, layers: Mapping[str, nn.Module]) -> Gates:
    """The gates of a model without forms.

    A channel has a gate if nothing but these layers and what works channel by channel reads it. That is tried: with its
    gate closed, noise on the channel must not reach the output. Outputs that cannot be gated are skipped aloud.

    Args:
        inputs: example inputs of the model.
        layers: torch's own linear and convolution layers by path, without shared weights.

    Raises:
        BadOption: no channel can have a gate.
        TraceError: the model cannot be traced.
    """
    channels = channel_groups(model, inputs)
    readers: dict[str, Any] = {
        p: m for p, m in layers.items() if not _depthwise(m) and len(owners(model, m, "weight")) == 1
    }
    for path in layers.keys() - readers.keys():
        if not _depthwise(layers[path]):
            skip(path, "its weight is also another layer's, whose inputs have other gates: neither has")
    able = _cut(model, channels, readers, _able(model, channels, readers))
    numbers = able.nonzero().flatten()
    gate = torch.full((channels.count + 1,), -1)  # the last entry is for -1
    gate[numbers] = torch.arange(len(numbers))
    count, reads, held = len(numbers), {}, []
    for path, layer in readers.items():
        width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        ids = gate[channels.inputs[path]] if path in channels.inputs else torch.full((width,), -1)
        vectors = [ids] if (ids >= 0).any() else []
        if isinstance(layer, nn.Linear):
            own = _alone(ids)
            place = torch.full_like(ids, -1)
            place[own] = torch.arange(count, count + int(own.sum()))
            count += int(own.sum())
            vectors += [place] if own.any() else []
            held.append(Held(path, 1, torch.where(own, place, ids)))
        if vectors:
            reads[path] = tuple(vectors)
    if not len(numbers):
        raise BadOption(
            "no channel can be removed by a gate: each is the output, or something other than the chosen layers reads "
            "it; choose a method that masks weights, such as magnitude_iterative"
        )
    modules = dict(model.named_modules())
    for path, ids in channels.outputs.items():
        if isinstance(modules.get(path), WEIGHTED) and (missing := int(((gate[ids] < 0) & (ids >= 0)).sum())):
            reason = "something other than the chosen layers reads them"
            skip(path, f"{missing} of {len(ids)} outputs have no gate: {reason}")
    held += _filters(model, channels, gate, held, readers)
    return Gates(count, reads, tuple(held), numbers, channels)


def _depthwise(layer: Any) -> bool:
    """Whether a convolution works channel by channel."""
    return not isinstance(layer, nn.Linear) and bool(1 < layer.groups == layer.in_channels)


def _alone(ids: Tensor) -> Tensor:
    """Which inputs of a linear layer need a gate of their own: without one, or several that share a channel's."""
    seen = torch.bincount(ids[ids >= 0], minlength=1)
    return (ids < 0) | (seen[ids.clamp_min(0)] > 1)


def _filters(
    model: nn.Module, channels: Channels, gate: Tensor, held: list[Held], readers: Mapping[str, Any]
) -> list[Held]:
    """The filters that channels' gates decide about; the kernels that read, of channels that no filter puts out."""
    modules: dict[str, Any] = dict(model.named_modules())
    found: list[Held] = []
    left = torch.ones(int(gate.max()) + 2, dtype=torch.bool)  # the last entry is for -1
    for h in held:  # columns of linear layers, which may have gates of their own, numbered behind those of channels
        left[h.ids[h.ids < len(left) - 1]] = False
    left[-1] = False
    for path, ids in channels.outputs.items():
        layer = modules.get(path)
        if isinstance(layer, WEIGHTED) and not isinstance(layer, nn.Linear) and not _depthwise(layer):
            out = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
            if layer.get_parameter("weight").shape[out] == len(ids):
                found.append(Held(path, out, gate[ids]))
                left[gate[ids]] = False
    for path, layer in readers.items():
        if not isinstance(layer, nn.Linear) and path in channels.inputs and layer.groups == 1:
            ids = gate[channels.inputs[path]]
            ids = torch.where(left[ids], ids, -1)
            taken = any(f.path == path and (f.ids >= 0).any() for f in found)
            if (ids >= 0).any() and not taken:
                found.append(Held(path, 0 if isinstance(layer, nn.ConvTranspose2d) else 1, ids))
    return found


def _able(model: nn.Module, channels: Channels, readers: Mapping[str, Any]) -> Tensor:
    """Which channels only these layers read and only linear maps and norms of single channels hold, (count,)."""
    modules, able = dict(model.named_modules()), torch.zeros(channels.count + 1, dtype=torch.bool)
    for path in readers:
        able[channels.inputs.get(path, torch.tensor([-1]))] = True
    for (name, dim), ids in channels.axes.items():
        path, _, key = name.rpartition(".")
        module = modules.get(path)
        into = 0 if isinstance(module, nn.ConvTranspose2d) else 1
        if not isinstance(module, (*WEIGHTED, *NORMS)):
            able[ids] = False
        elif key == "weight" and dim == into and isinstance(module, WEIGHTED) and not _depthwise(module):
            able[ids] &= path in readers
    for name, table in channels.blocks.items():
        able[table] &= name.rpartition(".")[0] in readers
    return able[:-1]


def _cut(model: nn.Module, channels: Channels, readers: Mapping[str, Any], able: Tensor) -> Tensor:
    """Which of these channels a closed gate cuts off: nothing of what is put out as them reaches the output."""
    model = copy.deepcopy(model).eval()
    modules = dict(model.named_modules())
    args, kwargs = as_call(to_device(channels.example_inputs, device_of(model)))
    able = able.clone()
    for group in channels.groups:
        members = torch.tensor(group.channels)
        members = members[able[members]]
        if not len(members):
            continue
        with ExitStack() as hooks:
            for path in readers.keys() & channels.inputs.keys():
                closed = torch.isin(channels.inputs[path], members)
                handle = model.get_submodule(path).register_forward_pre_hook(_Scaling(~closed), with_kwargs=True)
                hooks.callback(handle.remove)
            quiet = _leaves(model(*args, **kwargs))
            for layer, ids in ((modules.get(path), channels.outputs[path]) for path in group.layers):
                if isinstance(layer, WEIGHTED):
                    hooks.callback(layer.register_forward_hook(_Shaking(torch.isin(ids, members))).remove)
            loud = _leaves(model(*args, **kwargs))
        same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(quiet, loud, strict=True))
        able[members] = same
    return able


def _leaves(output: Any) -> list[Tensor]:
    return [leaf.detach().float() for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


# --- while training ---------------------------------------------------------------------------------------------------


@final
class _Scaling:
    """Multiplies what a layer reads."""

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _scaled(module, args, kwargs, lambda samples: self.keep.float()[None])


@final
class _Shaking:
    """Adds noise to some of what a layer puts out."""

    def __init__(self, members: Tensor) -> None:
        self.members = members

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        noise = torch.linspace(1.0, 3.0, output.numel(), device=output.device).view(output.shape)
        return output + _laid(module, output, self.members[None].to(output)) * noise.to(output.dtype)


def _laid(module: nn.Module, x: Tensor, factors: Tensor) -> Tensor:
    """Factors (samples or 1, channels) shaped to multiply what a layer reads or puts out."""
    behind = 0 if isinstance(module, nn.Linear) else len(module.kernel_size)  # type: ignore[arg-type]
    if x.dim() == behind + 1:  # one sample, without a dimension for it
        return factors[0].view(-1, *[1] * behind)
    between = x.dim() - behind - 2
    return factors.view(len(factors), *[1] * between, -1, *[1] * behind)


def _scaled(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], factors: Callable[[int], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = args[0] if args else kwargs["input"]
    behind = 0 if isinstance(module, nn.Linear) else len(module.kernel_size)  # type: ignore[arg-type]
    samples = 1 if x.dim() == behind + 1 else len(x)
    x = x * _laid(module, x, factors(samples).to(x))
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})


@final
class _Drawing:
    """The gates of one pass through the model, drawn once for all layers that read as many samples."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.drawn: dict[tuple[int, bool], Tensor] = {}

    def begin(self, *_: Any) -> None:
        self.drawn.clear()

    def end(self, *_: Any) -> None:
        self.drawn.clear()

    def now(self, samples: int, training: bool) -> Tensor:
        if (samples, training) not in self.drawn:
            self.drawn[samples, training] = self.draw(samples, training)
        return self.drawn[samples, training]


@final
class _Reading:
    """Multiplies what a layer reads by the gates of the moment."""

    def __init__(self, vectors: tuple[Tensor, ...], drawing: _Drawing) -> None:
        self.vectors, self.drawing = vectors, drawing

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        training = module.training
        return _scaled(module, args, kwargs, lambda n: _product(self.vectors, self.drawing.now(n, training)))


@contextmanager
def gated(model: nn.Module, gates: Gates, draw: Draw, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Multiplies, inside the block, what layers read by gates, drawn anew in each pass through the model.

    The parameters of their distribution are the model's own for that time, so that they are trained.
    """
    drawing = _Drawing(draw)
    for name, parameter in parameters.items():
        model.register_parameter(f"fw_gate_{name}", parameter)
    handles = [model.register_forward_pre_hook(drawing.begin), model.register_forward_hook(drawing.end)]
    for path, vectors in gates.reads.items():
        reading = _Reading(vectors, drawing)
        handles.append(model.get_submodule(path).register_forward_pre_hook(reading, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name in parameters:
            model._parameters.pop(f"fw_gate_{name}", None)


# --- in the end -------------------------------------------------------------------------------------------------------


def remove_closed(
    model: nn.Module,
    gates: Gates,
    values: Tensor,
    closed: Tensor,
    score: Tensor,
    *,
    choose: Callable[[Channels, Tensor], Tensor] = Channels.legal,
) -> nn.Module:
    """Multiplies the gates into the weights that read, and removes the channels that are closed, in place.

    The highest-scoring input of a layer stays open where all are closed; channels that must stay (in groups that lose
    equally many, for round widths) open again. Inputs that are closed and cannot be removed are masked.

    Args:
        values: the factor of every gate when it is open, (count,).
        closed: which gates are closed.
        score: which stay open rather than others.
        choose: what of the channels that could go, the most expendable first, does.

    Raises:
        CompressionError: no gate is closed.
    """
    values, score = values.detach().cpu().float(), score.detach().cpu()
    closed = _one_open(gates, closed.detach().cpu(), score)
    if not closed.any():
        raise CompressionError("no gate was closed: raise epochs, the penalty or the learning rate of the gates")
    open_channels = torch.zeros(gates.channels.count + 1, dtype=torch.bool)
    for path in gates.reads.keys() & gates.channels.inputs.keys():
        open_channels[gates.channels.inputs[path][gates.factors(path, (~closed).float()[None])[0] > 0]] = True
    order = score[: len(gates.numbers)].argsort(stable=True)
    expendable = gates.numbers[order][~open_channels[gates.numbers[order]]]
    doomed = choose(gates.channels, expendable)
    closed[: len(gates.numbers)] &= torch.isin(gates.numbers, doomed) | open_channels[gates.numbers]

    masked = masked_names(model)
    bake(model)
    for path in gates.reads:
        found = gates.factors(path, torch.where(closed, 0.0, values)[None])[0]
        _fold(model.get_submodule(path), found)
        staying = ~torch.isin(gates.channels.inputs.get(path, torch.full_like(found, -1)), doomed)
        if dark := int(((found == 0) & staying).sum()):
            note(f"{path}: {dark} of the {int(staying.sum())} inputs that it keeps are masked")
            masked += [(path, "weight")] if (path, "weight") not in masked else []
    note(f"{len(doomed)} of {gates.channels.count} channels removed")
    remove_channels(model, doomed, channels=gates.channels)
    mask_zeros(model, masked)
    return model


def _one_open(gates: Gates, closed: Tensor, score: Tensor) -> Tensor:
    """The same with the best input of every layer open that would read nothing."""
    closed = closed.clone()
    for path, vectors in gates.reads.items():
        if (gates.factors(path, (~closed).float()[None]) > 0).any():
            continue
        padded = torch.cat([score, score.new_tensor([torch.inf])])
        best = int(torch.stack([padded[ids] for ids in vectors]).amin(0).argmax())
        closed[[int(ids[best]) for ids in vectors if ids[best] >= 0]] = False
        note(f"{path}: all inputs were closed, one of {len(vectors[0])} is kept")
    return closed


def _fold(layer: nn.Module, factors: Tensor) -> None:
    """Multiplies what a layer reads into its weight."""
    weight = layer.get_parameter("weight")
    with torch.no_grad():
        weight.mul_(along_inputs(layer, factors).to(weight))


def along_inputs(layer: nn.Module, factors: Tensor) -> Tensor:
    """One value for each input of a layer, shaped to meet its weight."""
    if isinstance(layer, nn.Linear):
        return factors[None]
    if isinstance(layer, nn.ConvTranspose2d):
        return factors.view(-1, 1, 1, 1)
    groups, out = int(layer.groups), int(layer.out_channels)  # type: ignore[arg-type]
    rows = factors.view(groups, -1).repeat_interleave(out // groups, 0)
    return rows.view(*rows.shape, *[1] * len(layer.kernel_size))  # type: ignore[arg-type]
