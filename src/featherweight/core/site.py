"""The places of a model that methods on weights work on, and options that may differ from layer to layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from featherweight.core.forms import Mask, attach, forms_of, has_forms, originals
from featherweight.core.ledger import recording, skip
from featherweight.core.structured import StructuredLayer
from featherweight.core.study import Study
from featherweight.core.surgery import WEIGHTED, Where, patterns, targets
from featherweight.errors import BadData, MissingNeed

V = TypeVar("V")
PerLayer: TypeAlias = V | Mapping[str, V]
"""One value for all chosen layers, or layer patterns with a value each; of two that match, the later counts."""


@final
@dataclass(frozen=True)
class Site:
    """One weight tensor of a model: the layer at `path` and the parameter's `name`; `grain` is what goes as one."""

    path: str
    module: nn.Module
    name: str = "weight"
    study: Study | None = field(default=None, repr=False, compare=False)
    grain: str = "weight"

    @property
    def data(self) -> Study:
        """What passes over data show of the model.

        Raises:
            MissingNeed: the site stands alone.
        """
        if self.study is None:
            raise MissingNeed(f"the score of {self.path or 'a weight'} needs data: score it by prune, with a task")
        return self.study

    @property
    def rows(self) -> Tensor:
        """The weight as a matrix (outputs, what each reads)."""
        weight = self.weight
        return (weight.transpose(0, 1) if isinstance(self.module, nn.ConvTranspose2d) else weight).flatten(1)

    def stays(self, why: str = "no forward pass shows what it puts out for each sample") -> Tensor:
        """Infinite scores, one for each output, with which it stays as it is; and that is said."""
        skip(self.path, why)
        return torch.full((len(self.rows),), torch.inf)

    @staticmethod
    def of(weight: Tensor, grain: str = "weight") -> Site:
        """A site of its own around a weight of any shape, for examples and tests."""
        module = nn.Module()
        module.register_parameter("weight", nn.Parameter(weight))
        return Site("", module, grain=grain)

    @property
    def weight(self) -> Tensor:
        """The weight as the layer sees it, through the forms that stand on it."""
        return getattr(self.module, self.name).detach()

    @property
    def held(self) -> nn.Parameter:
        """The parameter that the optimizer moves: the weight itself, or the first free one under its forms."""
        if has_forms(self.module, self.name):
            return originals(self.module, self.name)[0]
        parameter: nn.Parameter = getattr(self.module, self.name)
        return parameter

    @property
    def keep(self) -> Tensor:
        """True where no mask stands on the weight, of the weight's shape."""
        mask = self.mask
        return torch.ones(self.weight.shape, dtype=torch.bool) if mask is None else mask.keep.cpu()

    @property
    def mask(self) -> Mask | None:
        """The mask that stands on the weight."""
        return next((form for form in forms_of(self.module, self.name) if isinstance(form, Mask)), None)

    def set_mask(self, model: nn.Module, keep: Tensor) -> None:
        """Masks the weight where `keep`, of its shape, is False, for every layer of the model that owns it."""
        if self.mask is None:
            attach(self.module, Mask(keep.to(self.weight.device)), at=self.name, root=model)
        else:
            self.mask.keep.copy_(keep)


def sites(model: nn.Module, where: Where = None, types: tuple[type[nn.Module], ...] = WEIGHTED) -> dict[str, Site]:
    """The weights of the layers that `where` chooses, by the layer's path; a tied weight once, at its first layer.

    Raises:
        UnknownName: a pattern matches nothing.
        BadOption: the model has no layer of these types.
        BadData: weights are NaN or infinite.
    """
    found: dict[str, Site] = {}
    first: dict[int, str] = {}
    for path, module in targets(model, where, types).items():
        held = originals(module, "weight")[0] if has_forms(module) else module.weight
        if (owner := first.setdefault(id(held), path)) == path:
            found[path] = _sound(Site(path, module))
        else:
            skip(path, f"its weight is that of {owner}, and goes with it")
    for path, module in model.named_modules():
        matrices = any(p.dim() > 1 for p in module._parameters.values() if p is not None)
        matrices = matrices or isinstance(module, StructuredLayer)  # whose parameters may be a list of numbers
        if matrices and not isinstance(module, (*types, *WEIGHTED, ParametrizationList)):
            skip(path, f"{type(module).__name__}: this method works on linear and convolution layers")
    return found


def _sound(site: Site) -> Site:
    """The site; its held numbers are looked at, since a form may draw at random whenever the weight is asked for."""
    held = site.held.detach()
    if site.mask is not None and site.mask.keep.shape == held.shape:
        held = held[site.mask.keep]
    if not held.is_meta and not held.isfinite().all():
        raise BadData(f"the weights of {site.path} are not finite: train the network again, or choose layers by where=")
    return site


def channel_axis(site: Site) -> int:
    """The dimension of a weight that counts its output channels."""
    return 1 if isinstance(site.module, nn.ConvTranspose2d) and site.module.groups == 1 else 0


def per_layer(
    model: nn.Module,
    name: str,
    value: PerLayer[V],
    where: Where,
    *,
    types: tuple[type[nn.Module], ...] = WEIGHTED,
) -> tuple[dict[str, Site], dict[str, V]]:
    """The chosen sites and the option's value at each: one value for all, or a mapping from layer patterns to values.

    A mapping chooses the layers itself; of two patterns that match a layer, the later counts.

    Raises:
        BadOption: a mapping comes together with `where`.
        UnknownName: a pattern matches nothing.
    """
    chosen = sites(model, patterns(where, {name: value}), types)
    if not isinstance(value, Mapping):
        return chosen, dict.fromkeys(chosen, value)
    values: dict[str, V] = {}
    for pattern, one in value.items():
        with recording():  # what a single pattern does not match is no remark about the stage
            values |= dict.fromkeys(targets(model, pattern, types), one)
    return chosen, {path: values[path] for path in chosen}
