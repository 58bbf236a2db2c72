"""Random masks: of many random choices of what goes, the one that hurts least is taken, layer after layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive
from featherweight.catalogue import recipe
from featherweight.core.channels import channel_groups, remove_channels
from featherweight.core.fit import Optimizers
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.ledger import note, skip
from featherweight.core.progress import track
from featherweight.core.site import Site, sites
from featherweight.core.study import Study
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task, evaluate
from featherweight.core.widths import NO_CHANNELS, check_some, rounded
from featherweight.errors import BadOption

NO_KERNELS = (
    "no layer that was chosen is a convolution, which has kernels: choose others, or a method that masks weights"
)


@recipe(
    paper="Anwar and Sung, 2016, arXiv:1610.09639",
    family="prune",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"trials": 4, "finetune": 1, "round_to": 1, "calibration_batches": 2},
)
def random_masks(
    model: nn.Module,
    task: Task,
    *,
    grain: Literal["filter", "kernel", "both"] = "filter",
    prune_ratio: Fraction = 0.4,
    sparsity: Fraction = 0.4,
    trials: Count = 100,
    finetune: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = "sgd",
    round_to: Count = 16,
    calibration_batches: Count = 8,
    where: WhereWeighted = None,
) -> nn.Module:
    """Draws random masks of a layer's feature maps (or kernels), keeps the best one, goes on to the next layer.

    Sajid Anwar, Wonyong Sung, "Coarse Pruning of Convolutional Neural Networks with Random Masks", 2016: of the 2^M
    masks of M units, N random ones with the wanted number of zeros are evaluated without retraining; the best of them,
    the least adversarial, stays while the next layer is treated; at the end the network is retrained. Feature maps
    first, then kernels among what is left.

    Masks are drawn without replacement; where there are no more than `trials` of them, all are tried. They are compared
    by the task's metric on calibration batches, never on valid, since the best of many looks better than it is.

    Departs from the paper: feature maps are removed, not masked, with all layers that a residual sum couples, which are
    treated as one; what is evaluated is rounded as the removal is (kept maps up to whole vectors); one ratio for all
    layers; kernels are drawn among those that are not masked yet.

    Args:
        grain: "filter" (feature maps, removed), "kernel" (kernels, masked), or "both" in this order.
        prune_ratio: fraction of the feature maps of each layer that are removed.
        sparsity: fraction of the kernels of each convolution that are masked.
        trials: how many masks are tried in each layer.
        finetune: epochs of retraining at the end.
        lr: learning rate of the retraining.
        optimizer: "sgd" (default), "adam" or "adamw".
        round_to: wider layers keep a multiple of this many maps; 1 removes exactly the fraction.
        calibration_batches: batches on which masks are compared.
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: the layers that were chosen have nothing to choose among.
        CompressionError: rounding left nothing to remove.
    """
    chosen = sites(model, where)
    if grain != "kernel":
        _remove_maps(model, task, list(chosen), prune_ratio, trials, round_to, calibration_batches)
    if grain != "filter":
        _mask_kernels(model, task, sites(model, where), sparsity, trials, calibration_batches)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def _remove_maps(
    model: nn.Module, task: Task, paths: list[str], ratio: float, trials: int, round_to: int, batches: int
) -> None:
    masked = masked_names(model)
    channels = channel_groups(bake(model), task.inputs())
    study = Study(model, task, paths, batches, channels)
    groups = [group for group in channels.groups if not set(group.layers).isdisjoint(paths)]
    if not groups:
        raise BadOption(NO_CHANNELS)
    doomed = torch.empty(0, dtype=torch.long)
    for group in groups:
        members = torch.tensor(group.channels)
        masks = subsets(len(members), int(ratio * len(members) + 1e-9), trials)
        found = (rounded(channels, members[mask], round_to) for mask in masks)
        best = least_adversarial(found, partial(without, study, doomed), len(masks))
        doomed = torch.cat([doomed, best])
    remove_channels(model, rounded(channels, doomed, round_to), channels=channels)
    mask_zeros(model, masked)
    check_some(len(doomed), channels, round_to)


def _mask_kernels(
    model: nn.Module, task: Task, found: dict[str, Site], sparsity: float, trials: int, batches: int
) -> None:
    study = Study(model, task, list(found), batches)
    convolutions = {path: site for path, site in found.items() if site.weight.dim() > 2}
    for path in found.keys() - convolutions.keys():
        skip(path, "a linear layer has no kernels")
    if not convolutions:
        raise BadOption(NO_KERNELS)
    for site in convolutions.values():
        left = site.keep.flatten(2).any(2).flatten().nonzero().flatten()
        masks = subsets(len(left), min(int(sparsity * len(left) + 1e-9), len(left) - 1), trials)
        before = site.keep.clone()

        def tried(gone: Tensor, site: Site = site, before: Tensor = before) -> float:
            site.set_mask(model, before & kernels_kept(before.shape, gone))
            return quality(study)

        best = least_adversarial((left[mask] for mask in masks), tried, len(masks))
        site.set_mask(model, before & kernels_kept(before.shape, best))
        note(f"{site.path}: {len(best)} of {len(left)} kernels masked")


def kernels_kept(shape: torch.Size, gone: Tensor) -> Tensor:
    """A mask of this shape (out, in, ...) that is False in the kernels with these numbers."""
    keep = torch.ones(shape[0] * shape[1], dtype=torch.bool)
    keep[gone] = False
    return keep.view(shape[0], shape[1], *[1] * (len(shape) - 2)).expand(shape)


def subsets(n: int, k: int, trials: int) -> list[Tensor]:
    """Different random sets of `k` of `n` numbers; all of them where there are no more than `trials`.

    >>> [one.tolist() for one in subsets(3, 2, 10)]
    [[0, 1], [0, 2], [1, 2]]
    """
    if math.comb(n, k) <= trials:
        return [torch.tensor(one, dtype=torch.long) for one in combinations(range(n), k)]
    found: dict[tuple[int, ...], None] = {}
    while len(found) < trials:
        found[tuple(torch.randperm(n)[:k].sort().values.tolist())] = None
    return [torch.tensor(one) for one in found]


def least_adversarial(masks: Iterable[Tensor], tried: Callable[[Tensor], float], count: int) -> Tensor:
    """The mask with the highest quality, the first of several."""
    best, highest = torch.empty(0, dtype=torch.long), -math.inf
    for mask in track(masks, "random masks", count):
        if (value := tried(mask)) > highest:
            best, highest = mask, value
    return best


def without(study: Study, earlier: Tensor, further: Tensor) -> float:
    """The quality of the model without these channels."""
    gone = torch.cat([earlier, further])
    outputs = {path: ids for path, ids in study.channels().outputs.items() if path in set(study.order())}
    gates = {path: (~torch.isin(ids, gone)).float() for path, ids in outputs.items() if torch.isin(ids, gone).any()}
    with study.gated(gates):
        return quality(study)


def quality(study: Study) -> float:
    """The task's metric on the study's batches, the higher the better."""
    found = evaluate(study.model, replace(study.task, valid=study.batches()), label="random masks")
    return found.value if found.higher_is_better else -found.value
