"""Masks that come and go: weights that learn on behind a mask, exact choices of what stays, and what a method leaves.

While a method runs, a pruned weight may have a hidden value that still learns (`Mask(grad="dense")`). When it ends,
masks are plain and what they hide is zero: `settle`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from featherweight.core.forms import Mask, attach, forms_of, has_forms, originals
from featherweight.core.ledger import note
from featherweight.core.select import lowest
from featherweight.core.site import Site
from featherweight.errors import BadData


def learn_behind(model: nn.Module, found: Mapping[str, Site]) -> None:
    """Masks the sites such that hidden weights get the gradient at the masked point; what was masked stays so."""
    for site in found.values():
        attach(site.module, Mask(site.keep.to(site.weight.device), grad="dense"), at=site.name, root=model)


def hidden(site: Site) -> Tensor:
    """The weight as it is behind its mask, of the weight's shape: what the mask hides included."""
    if not has_forms(site.module, site.name):
        return site.weight
    value: tuple[Tensor, ...] = tuple(originals(site.module, site.name))
    for form in forms_of(site.module, site.name):
        if not isinstance(form, Mask):
            value = (form(*value, keep=site.keep.to(value[0].device)),)
    return value[0].detach()


def free(site: Site) -> nn.Parameter | None:
    """The parameter behind the mask, of the weight's shape; None if another form holds the weight.

    Of a codebook or a grid it is not the weights that are free.
    """
    if any(not isinstance(form, Mask) for form in forms_of(site.module, site.name)):
        return None
    held = has_forms(site.module, site.name)
    return originals(site.module, site.name)[0] if held else getattr(site.module, site.name)


def write(site: Site, values: Tensor) -> bool:
    """Puts values, of the weight's shape, behind the mask; False, and nothing done, if another form holds it."""
    if (held := free(site)) is None:
        return False
    with torch.no_grad():
        held.copy_(values)
    return True


def settle(model: nn.Module, found: Mapping[str, Site]) -> None:
    """Leaves plain masks on the sites, with zeros behind them: pruned weights are gone, and learn no more."""
    for site in found.values():
        keep = site.keep.to(site.weight.device)
        attach(site.module, Mask(keep), at=site.name, root=model)
        write(site, torch.where(keep, hidden(site), 0.0))


def set_masks(model: nn.Module, found: Mapping[str, Site], keep: Mapping[str, Tensor]) -> None:
    """Masks every site where its `keep`, of the weight's shape, is False."""
    for path, site in found.items():
        site.set_mask(model, keep[path])


def masks(found: Mapping[str, Site]) -> dict[str, Tensor]:
    """A copy of what every site keeps."""
    return {path: site.keep.clone() for path, site in found.items()}


def largest(
    values: Mapping[str, Tensor], sparsity: Mapping[str, float], *, within: Mapping[str, Tensor], together: bool = False
) -> dict[str, Tensor]:
    """Which entries stay if the lowest `floor(sparsity n)` go: exact counts, ties broken by index, the earlier goes.

    Args:
        values: one tensor per site, ranked as they are (take absolute values first).
        sparsity: the fraction that goes, of each site's entries; of all of them where sites are ranked together, and
            then the same for all.
        within: what may stay at all; anything else goes first, and counts.
        together: rank the entries of all sites against each other.

    Every site keeps its highest entry; that is noted where the fraction would have taken it.

    Raises:
        BadData: a value is NaN.

    >>> some = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 0.5])}
    >>> kept = largest(some, {"a": 0.5, "b": 0.5}, within={k: torch.ones(2).bool() for k in some}, together=True)
    >>> kept["a"].tolist(), kept["b"].tolist()
    ([True, False], [True, False])
    """
    ranked = {path: _ranked(path, one, within[path]) for path, one in values.items()}
    if together:
        gone = lowest(ranked, next(iter(sparsity.values()), 0.0))
    else:
        gone = {path: lowest({path: one}, sparsity[path])[path] for path, one in ranked.items()}
    highest = {path: torch.isposinf(one) for path, one in ranked.items()}
    keep = {path: (~marked | highest[path]) & within[path] for path, marked in gone.items()}
    for path, kept in keep.items():
        if int(kept.sum()) == 1 and kept.numel() > 1:
            note(f"{path}: one weight of {kept.numel()} kept, so that the layer is not empty")
    return keep


def _ranked(path: str, values: Tensor, within: Tensor) -> Tensor:
    if torch.isnan(values).any():
        raise BadData(f"the scores of {path} hold NaN: check the weights and the loss of the batches behind them")
    ranked = torch.where(within, values.detach().double().cpu(), -torch.inf)
    ranked.view(-1)[ranked.argmax()] = torch.inf
    return ranked


def occupied(path: str, keep: Tensor, size: Tensor, within: Tensor) -> Tensor:
    """The mask, or one with the entry of the largest size alone if it would empty the layer; that is noted."""
    if keep.any() or not within.any():
        return keep
    note(f"{path}: no weight is large enough to stay, the largest of {keep.numel()} is kept")
    return (
        torch.zeros_like(keep).view(-1).scatter(0, torch.where(within, size, -torch.inf).argmax(), True).view_as(keep)
    )


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The Euclidean distance of two sets of tensors, each set taken as one vector."""
    return math.sqrt(sum(float((one - b[path]).double().square().sum()) for path, one in a.items()))


def sparsity_of(found: Mapping[str, Site]) -> float:
    """The fraction of the sites' weights that is masked."""
    total = sum(site.keep.numel() for site in found.values())
    return 1 - sum(int(site.keep.sum()) for site in found.values()) / max(1, total)


def told(found: Mapping[str, Site]) -> str:
    """The fraction kept, in all and layer by layer, in percent."""
    layers = ", ".join(f"{path} {float(site.keep.float().mean()):.1%}" for path, site in found.items())
    return f"{1 - sparsity_of(found):.2%} of the weights kept ({layers})"
