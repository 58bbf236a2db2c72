"""Strided sparsity inside kernels: of the kernels of an input map each m-th tap stays, the same in all filters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.columns import live_columns
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note, skip
from featherweight.core.site import PerLayer, Site, per_layer
from featherweight.core.study import Study
from featherweight.core.surgery import Layers, Where
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@recipe(
    paper="Anwar et al., ACM JETC 2017, arXiv:1512.08571",
    family="prune",
    needs={"labels", "train"},
    shrinks={"weights"},
    small={"epochs": 2, "finetune": 1, "calibration_batches": 2},
)
def intra_kernel_strided(
    model: nn.Module,
    task: Task,
    *,
    stride: PerLayer[Count] = 2,
    saliency: Literal["energy", "error"] = "energy",
    epochs: Amount = 10,
    finetune: Amount = 5,
    lr: Positive = 1e-3,
    optimizer: Optimizers = "sgd",
    calibration_batches: Count = 8,
    where: Annotated[Where, Layers(CONVOLUTIONS)] = None,
) -> nn.Module:
    """Keeps of every kernel the taps t with `t = n (mod m)`; `n` is chosen for every input map, layer after layer.

    Sajid Anwar, Kyuyeon Hwang, Wonyong Sung, "Structured Pruning of Deep Convolutional Neural Networks", ACM Journal on
    Emerging Technologies in Computing Systems 13(3), 2017. All filters that read an input map share its stride `m` and
    offset `n`, so that whole rows of the matrix of patches are not needed: of `K^2` taps `ceil((K^2 - n) / m)` stay. In
    a layer of several groups, the filters of a group share them. The offset of a map is the one that keeps the most
    energy (the sum of squared weights), or with which the network errs least; maps are decided one after the other,
    layers from the input on, with retraining after each.

    Departs from the paper: the offsets are chosen greedily, its search by particle filters is another method
    (evo_particle_filter); where errors are equal, energy decides; the strides are given, not searched; quantization to
    fixed point, its last step, is a method of its own. No runtime here leaves the rows out: what is saved is bytes, and
    the number of rows is told.

    Args:
        stride: m, of whose taps one stays; or layer patterns with one each.
        saliency: "energy", or "error": the task's metric on the calibration batches, one pass over them for each map
            and offset.
        epochs: retraining in total, the same after every layer.
        finetune: further epochs after the last layer, the learning rate falling to zero.
        lr: learning rate of both.
        optimizer: as in `fit`.
        calibration_batches: batches on which errors are counted.
        where: which convolutions; all when left out.

    Raises:
        BadOption: there is no convolution with a kernel of more than one tap, or no stride above 1.
        UnknownName: a pattern matches nothing.
    """
    found, strides = per_layer(model, "stride", stride, where, types=CONVOLUTIONS)
    study = Study(model, task, list(found), calibration_batches)
    chosen = strided(found, strides, study.order())
    for path, site in chosen.items():
        m, groups = min(strides[path], taps(site)), int(site.module.groups)  # type: ignore[arg-type]
        offsets = by_energy(site, m) if saliency == "energy" else by_error(model, study, site, m)
        site.set_mask(model, site.keep & strided_keep(tuple(site.weight.shape), groups, m, offsets))
        rows = int(live_columns(site.weight).sum())
        note(f"{path}: {rows} of {site.weight[0].numel()} rows of the matrix of patches are left")
        task.fit(model, task, epochs=epochs / len(chosen), lr=lr, optimizer=optimizer, decay="constant",
                 label=f"retrain behind {path}")  # fmt: skip
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def strided(found: Mapping[str, Site], strides: Mapping[str, int], order: list[str]) -> dict[str, Site]:
    """The sites in the order of the network that have something to stride over.

    Raises:
        BadOption: none has.
    """
    chosen = {}
    for path in (p for p in order if p in found):
        if taps(found[path]) == 1 or strides[path] == 1:
            skip(path, "a kernel of one tap has nothing to stride over" if strides[path] > 1 else "stride=1 keeps all")
        else:
            chosen[path] = found[path]
    if not chosen:
        raise BadOption(
            "no convolution has a kernel of several taps and a stride above 1: choose another method, such as pfec_l1"
        )
    return chosen


def taps(site: Site) -> int:
    """How many taps a kernel has."""
    return site.weight[0, 0].numel()


def strided_keep(shape: tuple[int, ...], groups: int, stride: int, offsets: Tensor) -> Tensor:
    """The mask of a weight (out, in / groups, ...): of the kernels of each input map the taps `offset (mod stride)`.

    Args:
        offsets: one for every input map (in,); or for every kernel (out, in / groups), the same in all filters that
            read a map.

    Raises:
        BadOption: filters that read the same map have different offsets, or one is outside of 0..stride - 1.

    >>> strided_keep((2, 1, 1, 4), 1, 2, torch.tensor([1]))[0].tolist()
    [[[False, True, False, True]]]
    """
    out, each = shape[:2]
    if offsets.dim() == 2:
        rows = offsets.view(groups, out // groups, each)
        if (rows != rows[:, :1]).any():
            raise BadOption(
                "filters that read the same input map have different offsets: all must leave out the same taps, or no "
                "row of the matrix of patches can go; pass one offset for each input map"
            )
        offsets = rows[:, 0].flatten()
    if len(offsets) != groups * each or bool((offsets < 0).any()) or bool((offsets >= stride).any()):
        raise BadOption(f"{len(offsets)} offsets for {groups * each} input maps: give one of 0..{stride - 1} for each")
    tap = torch.arange(torch.Size(shape[2:]).numel())
    keep = (tap % stride == offsets[:, None]).view(groups, 1, each, -1)
    return keep.expand(groups, out // groups, each, -1).reshape(shape)


def by_energy(site: Site, stride: int) -> Tensor:
    """For every input map the offset that keeps the largest sum of squared weights (in,), in all filters together."""
    return energies(site, stride).argmax(1)


def energies(site: Site, stride: int) -> Tensor:
    """Sum of the squared weights that every offset keeps, for every input map (in, stride)."""
    groups = int(site.module.groups)  # type: ignore[arg-type]
    squares = site.weight.double().cpu().square().flatten(2).unflatten(0, (groups, -1)).sum(1).flatten(0, 1)  # in, taps
    return torch.stack([squares[:, offset::stride].sum(1) for offset in range(stride)], 1)


def by_error(model: nn.Module, study: Study, site: Site, stride: int) -> Tensor:
    """For every input map, one after the other, the offset with which the network errs least; then energy decides."""
    kept, ties, groups = site.keep.clone(), energies(site, stride), int(site.module.groups)  # type: ignore[arg-type]
    seen = replace(study.task, valid=study.batches())
    decided = torch.zeros(len(ties), dtype=torch.long)
    done = torch.zeros(len(ties), dtype=torch.bool)
    for i in range(len(ties)):
        done[i] = True
        results = []
        for offset in range(stride):
            decided[i] = offset
            keep = strided_keep(tuple(site.weight.shape), groups, stride, decided)
            rest = (~done).view(groups, 1, -1).expand(groups, len(keep) // groups, -1).reshape(keep.shape[:2])
            site.set_mask(model, kept & (keep | rest.view(*rest.shape, *[1] * (keep.dim() - 2))))
            score = evaluate(model, seen, label="offsets")
            results.append((score.value if score.higher_is_better else -score.value, float(ties[i, offset])))
        decided[i] = max(range(stride), key=results.__getitem__)
    site.set_mask(model, kept)
    return decided
