"""Groups of weights that are to vanish together, over several tensors: their norms, and what shrinks them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, nn

from featherweight.core.channels import Channels
from featherweight.core.forms import has_forms, originals
from featherweight.core.site import Site
from featherweight.core.surgery import WEIGHTED
from featherweight.core.trace import weight_tensors


@final
@dataclass(frozen=True)
class Part:
    """The entries of one parameter by group: `index` broadcasts to its shape; -1 is no group."""

    path: str
    name: str
    index: Tensor

    def values(self, model: nn.Module) -> nn.Parameter:
        """The parameter itself, under the forms that stand on it."""
        module = model.get_submodule(self.path)
        return originals(module, self.name)[0] if has_forms(module, self.name) else module.get_parameter(self.name)


@final
@dataclass(frozen=True)
class Groups:
    """Groups of entries of a model's parameters, numbered from 0. Valid until shapes change.

    Of every family, the groups of one layer, one group stays whatever shrinks them.
    """

    parts: tuple[Part, ...]
    count: int
    families: tuple[Tensor, ...] = ()

    def norms(self, model: nn.Module) -> Tensor:
        """The Euclidean norm of every group (count,)."""
        total = torch.zeros(self.count + 1)  # the last is for -1
        for part in self.parts:
            w = part.values(model).detach()
            alike = [d for d in range(w.dim()) if part.index.size(d) == 1]
            squares = w.square().sum(alike, keepdim=True) if alike else w.square()
            index = part.index.remainder(self.count + 1).flatten()
            total.index_add_(0, index, squares.expand(part.index.shape).flatten().float().cpu())
        return total[:-1].sqrt()

    def entries(self, model: nn.Module) -> Tensor:
        """How many weights every group has (count,)."""
        total = torch.zeros(self.count + 1)
        for part in self.parts:
            index = part.index.remainder(self.count + 1).flatten()
            each = part.values(model).numel() / part.index.numel()
            total.index_add_(0, index, torch.full(index.shape, each))
        return total[:-1]

    def zero(self, model: nn.Module) -> Tensor:
        """Which groups have weights, all of them zero (count,)."""
        return (self.entries(model) > 0) & (self.norms(model) == 0)

    @torch.no_grad()
    def scale(self, model: nn.Module, factors: Tensor) -> None:
        """Multiplies every group by its factor (count,), in place."""
        for part in self.parts:
            w = part.values(model)
            w.mul_(self._spread(part, factors, 1.0).to(w))

    @torch.no_grad()
    def add_to_gradients(self, model: nn.Module, factors: Tensor) -> None:
        """Adds every group's weights, times its factor (count,), to their gradients."""
        for part in self.parts:
            w = part.values(model)
            pull = self._spread(part, factors, 0.0).to(w) * w
            w.grad = pull if w.grad is None else w.grad.add_(pull)

    def shrink(self, model: nn.Module, by: float) -> None:
        """The proximal step of `by * sum ||w_g||`: every group shorter by `by`, exactly zero if it is no longer.

        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        >>> Groups((Part("", "weight", torch.tensor([[0], [1]])),), 2).shrink(layer, 0.5)
        >>> (10 * layer.weight).round().tolist()
        [[27.0, 36.0], [0.0, 0.0]]
        """
        norms = self.norms(model)
        self.scale(model, self.spared(torch.where(norms > by, 1 - by / norms, 0.0), norms))

    def spared(self, factors: Tensor, norms: Tensor) -> Tensor:
        """The factors, but 1 for the longest group of a family of which none would be left."""
        dead = factors == 0
        for family in self.families if dead.any() else ():
            if dead[family].all():
                factors[family[norms[family].argmax()]] = 1.0
        return factors

    def _spread(self, part: Part, factors: Tensor, otherwise: float) -> Tensor:
        return torch.cat([factors.float().cpu(), torch.tensor([otherwise])])[part.index]


def makers(model: nn.Module, channels: Channels) -> Groups:
    """For every channel the weights of the filters that make it, in all layers that share it.

    A channel that anything but linear and convolution layers makes or reads is no group.
    """
    parts, own = [], _own(model, channels)
    for path, module in _weighted(model, channels.outputs):
        if (ids := channels.axes.get((_weight(path), int(_transposed(module))))) is not None:
            parts.append(Part(path, "weight", _along(module, own[ids], _transposed(module))))
    return Groups(tuple(parts), channels.count, _families(model, channels, own))


def readers(model: nn.Module, channels: Channels) -> Groups:
    """For every channel the weights of all layers that read it; see `makers`."""
    parts, own = [], _own(model, channels)
    for path, module in _weighted(model, channels.inputs):
        name, weight = _weight(path), cast(Tensor, module.weight)
        if (table := channels.blocks.get(name)) is not None:
            rows = own[table].repeat_interleave(len(weight) // len(table), 0)
            parts.append(Part(path, "weight", rows.view(*rows.shape, *[1] * (weight.dim() - 2))))
        elif (ids := channels.axes.get((name, int(not _transposed(module))))) is not None:
            parts.append(Part(path, "weight", _along(module, own[ids], not _transposed(module))))
    return Groups(tuple(parts), channels.count, _families(model, channels, own))


def _weighted(model: nn.Module, paths: Iterable[str]) -> list[tuple[str, nn.Module]]:
    found = ((path, model.get_submodule(path)) for path in paths)
    return [(path, module) for path, module in found if isinstance(module, WEIGHTED)]


def _own(model: nn.Module, channels: Channels) -> Tensor:
    """The number of every channel, or -1 where a weight of another kind of layer has a part in it; the last is -1."""
    own, tensors = torch.arange(channels.count + 1), weight_tensors(model)
    for (name, _), ids in channels.axes.items():
        if tensors[name].dim() > 1 and not isinstance(model.get_submodule(name.rpartition(".")[0]), WEIGHTED):
            own[ids] = -1
    own[-1] = -1
    return own


def _families(model: nn.Module, channels: Channels, own: Tensor) -> tuple[Tensor, ...]:
    held = (own[channels.outputs[path]] for path, _ in _weighted(model, channels.outputs))
    return tuple(ids.unique() for ids in held if len(ids) and bool((ids >= 0).all()))


def shapes(found: Mapping[str, Site]) -> Groups:
    """The same place in every filter of a layer, `W[:, i, y, x]`: a column of the matrix that a convolution is."""
    parts, families, count = [], [], 0
    for path, site in found.items():
        if isinstance(site.module, nn.ConvTranspose2d):
            continue
        places = site.weight[:1].numel()
        parts.append(Part(path, site.name, count + torch.arange(places).view(1, *site.weight.shape[1:])))
        families.append(torch.arange(count, count + places))
        count += places
    return Groups(tuple(parts), count, tuple(families))


def wholes(model: nn.Module, members: Iterable[Iterable[str]]) -> Groups:
    """One group of all parameters of each set of modules, given by their paths."""
    parts, count = [], 0
    for count, paths in enumerate(members, 1):
        for path in paths:
            for name, value in _parameters(model.get_submodule(path)):
                parts.append(Part(path, name, torch.full((1,) * value.dim(), count - 1)))
    return Groups(tuple(parts), count)


def _parameters(module: nn.Module) -> list[tuple[str, Tensor]]:
    named = list(module.named_parameters(recurse=False))
    held: Iterable[str] = getattr(module, "parametrizations", {})
    return named + [(name, getattr(module, name)) for name in held]


def _weight(path: str) -> str:
    return f"{path}.weight" if path else "weight"


def _transposed(module: nn.Module) -> bool:
    return isinstance(module, nn.ConvTranspose2d)


def _along(module: nn.Module, ids: Tensor, second: bool) -> Tensor:
    dims = module.weight.dim()  # type: ignore[operator]
    return ids.view([-1 if d == int(second) else 1 for d in range(dims)])
