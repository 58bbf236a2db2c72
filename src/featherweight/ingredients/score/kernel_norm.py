"""Norms of kernels, filters and feature maps, the saliency that needs weights only.

A kernel joins one input of a layer to one output; a filter is all that an output reads; a feature map can be judged by
its filter or by the kernels that read it. Hao Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, is the
published use for filters (see `pfec_l1`), Sajid Anwar and Wonyong Sung, "Coarse Pruning of Convolutional Neural
Networks with Random Masks", 2016, the one for kernels and maps.

Departs from the paper: there is no single one; batch norms are not folded, so that the scale between a filter and its
norm is arbitrary. Masked kernels save bytes, and time only where something executes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from featherweight.allowed import checked
from featherweight.catalogue import ingredient
from featherweight.core.site import Site
from featherweight.core.study import Study
from featherweight.core.surgery import WEIGHTED

NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": lambda rows: rows.abs().sum(-1),
    "l2": lambda rows: rows.norm(dim=-1),
    "mean": lambda rows: rows.abs().mean(-1),
}


@ingredient(
    "score", paper="Li et al., ICLR 2017, arXiv:1608.08710; Anwar and Sung, 2016, arXiv:1610.09639", family="prune"
)
@checked()
def kernel_norm(
    site: Site, *, norm: Literal["l1", "l2", "mean"] = "l1", of: Literal["itself", "consumers"] = "itself"
) -> Tensor:
    """The norm of every kernel, of the weight's shape; with the grain "filter" that of every filter, (outputs,).

    Args:
        norm: "l1" or "l2" of the weights, or "mean": the mean of their absolute values, which does not know sizes.
        of: "itself", or "consumers": the weights that read the output in the linear and convolution layers behind it.

    >>> from torch import tensor
    >>> kernel_norm(Site.of(tensor([[[3.0, -4.0]], [[1.0, 0.0]]])), norm="l2").tolist()
    [[[5.0, 5.0]], [[1.0, 1.0]]]
    >>> kernel_norm(Site.of(tensor([[[3.0, -4.0]], [[1.0, 0.0]]]), "filter")).tolist()
    [7.0, 1.0]
    """
    if of == "consumers":
        return _read(site, norm)
    if site.grain == "filter":
        return NORMS[norm](site.rows)
    weight = site.weight
    kernels = NORMS[norm](weight.flatten(2) if weight.dim() > 2 else weight[..., None])
    return kernels.view(*weight.shape[:2], *[1] * (weight.dim() - 2)).expand(weight.shape)


@ingredient("score", grain="filter")
def consumer_norm(site: Site) -> Tensor:
    """The l1 norm of the weights that read each output, (outputs,)."""
    return kernel_norm(site, of="consumers")


def _read(site: Site, norm: str) -> Tensor:
    ids = site.data.channels().outputs.get(site.path, torch.full((len(site.rows),), -1))
    size, square, count = (torch.where(ids >= 0, row[ids], 0.0) for row in site.data.once(_consumed))
    return {"l1": size, "l2": square.sqrt(), "mean": size / count.clamp(min=1)}[norm]


def _consumed(study: Study) -> Tensor:
    """Of every channel the sum of the sizes of the weights that read it, of their squares, and their number."""
    channels = study.channels()
    table = torch.zeros(3, channels.count, dtype=torch.float64)
    for path, ids in channels.inputs.items():
        layer = study.model.get_submodule(path)
        if isinstance(layer, WEIGHTED):
            rows = by_input(layer).double().cpu()
            parts = (rows.abs().sum(1), rows.square().sum(1), torch.full((len(rows),), float(rows.shape[1])).double())
            for kept, part in zip(table, parts, strict=True):
                kept.index_add_(0, ids[ids >= 0], part[ids >= 0])
    return table


def by_input(layer: nn.Module) -> Tensor:
    """The weights that read each input, (inputs, entries); of a grouped convolution those of its group."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.flatten(1)
    groups = int(getattr(layer, "groups", 1))
    grouped = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return grouped.transpose(1, 2).reshape(groups * weight.shape[1], -1)
