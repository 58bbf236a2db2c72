"""The density-diversity penalty: weights are drawn together until they are equal, the commonest value is zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.forms import Codebook, attach, bake, originals
from featherweight.core.ledger import note
from featherweight.core.select import lowest
from featherweight.core.site import Site, sites
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task
from featherweight.share import narrow


@recipe(
    paper="Wang et al., ICLR 2017",
    family="prune",
    needs={"labels", "train"},
    shrinks={"weights"},
    small={"rounds": 1, "epochs": 8, "tied_epochs": 4, "apply": 0.2, "penalty": 0.3},
)
def density_diversity(
    model: nn.Module,
    task: Task,
    *,
    penalty: Amount = 0.1,
    apply: Share = 0.02,
    decimals: Count = 6,
    start: Fraction = 0.1,
    rounds: Count = 4,
    epochs: Amount = 20,
    tied_epochs: Amount = 20,
    lr: Positive = 0.05,
    optimizer: Optimizers = "sgd",
    where: WhereWeighted = None,
) -> nn.Module:
    """Alternates training under a pull of all weights of a layer on each other with training of the values they share.

    Shengjie Wang, Haoran Cai, Jeff Bilmes, William Noble, "Training Compressed Fully-Connected Networks with a
    Density-Diversity Penalty", ICLR 2017: minimises `loss + sum_j lambda_j (sum_{p,q} |w_p - w_q| + ||W_j||_2)`
    (eq. 2), lambda_j in proportion to the size of the layer, applied after a small part of the steps; then weights are
    rounded to six decimals and those of the commonest value become zero. Training starts with a tenth of zeros. In
    between, equal weights are tied: they move by the mean of their gradients, zeros stay. The result holds few distinct
    values, ready for a table and an entropy coder.

    Departs from the paper: training starts at given weights, of which the smallest are the first zeros, and then these
    zeros matter little (measured: the penalty and the tying do); the penalty's pairs act by their proximal step (a
    gradient step, after which isotonic regression gives weights that would pass each other one value), where the paper
    adds the subgradient, which alone never makes values equal, to the loss's; it has the sign that Algorithm 1 and eq.
    3 print reversed, and counts both orders of a pair; penalised training ends with one such step; where more than
    half of a layer's values differ, only its zeros are tied; convolutions are penalised too (where="Linear" is the
    paper's choice); the learning rate falls to zero in the last tied training only.

    Args:
        penalty: lambda times the number of weights, of the largest layer.
        apply: probability that the penalty acts after a training step.
        decimals: to which weights are rounded.
        start: fraction of the weights that is zero at the start.
        rounds: how often penalised and tied training alternate.
        epochs: passes of penalised training, in all rounds together.
        tied_epochs: passes of tied training, in all rounds together.
        lr: learning rate of both.
        optimizer: "sgd" (default), "adam" or "adamw".
        where: which layers; all linear and convolution layers when left out.

    Raises:
        UnknownName: a pattern matches nothing.
    """
    found = sites(model, where)
    keep = {path: site.keep.to(site.weight.device) for path, site in found.items()}
    bake(model)  # earlier masks are kept in `keep`: weights come and go between the other zeros
    most = max(site.weight.numel() for site in found.values())
    strength = {path: lr * penalty / most * site.weight.numel() / most for path, site in found.items()}
    for path, marked in lowest({path: site.weight.abs() for path, site in found.items()}, start, "layer").items():
        _write(found[path], torch.where(marked.to(keep[path].device), 0.0, found[path].weight))

    def collapse(probability: float) -> None:
        if float(torch.rand(())) < probability:
            for path, site in found.items():
                drawn = drawn_together(site.weight, strength[path]).mul(10**decimals).round().div(10**decimals)
                _write(site, torch.where(keep[path], without_mode(drawn, site.weight), 0.0))

    for turn in range(1, rounds + 1):
        task.fit(model, task, epochs=epochs / rounds, lr=lr, optimizer=optimizer, decay="constant",
                 after_step=lambda progress: collapse(apply), label=f"draw together {turn}/{rounds}")  # fmt: skip
        collapse(1.0)
        counts = {path: tie(model, site) for path, site in found.items()}
        task.fit(model, task, epochs=tied_epochs / rounds, lr=lr, optimizer=optimizer,
                 decay="constant" if turn < rounds else "cosine",
                 after_backward=partial(share_mean, found, counts), label=f"tied {turn}/{rounds}")  # fmt: skip
        if turn < rounds:
            bake(model)
    for path, site in found.items():
        note(f"{path}: {told(site.weight)}")
    return model


def _write(site: Site, values: Tensor) -> None:
    with torch.no_grad():
        getattr(site.module, site.name).copy_(values)


def diversity_gradient(weight: Tensor) -> Tensor:
    """The gradient of `sum_{p,q} |w_p - w_q|`, of the weight's shape: twice the number of smaller less that of greater.

    >>> diversity_gradient(torch.tensor([3.0, 2.0, 1.0, 2.0]))
    tensor([ 6.,  0., -6.,  0.])
    """
    flat = weight.detach().flatten()
    ordered = flat.sort().values
    smaller = torch.searchsorted(ordered, flat)
    greater = len(flat) - torch.searchsorted(ordered, flat, right=True)
    return (2.0 * (smaller - greater)).to(weight.dtype).view_as(weight)


def drawn_together(weight: Tensor, strength: float) -> Tensor:
    """The minimum over x of `|x - w|^2 / 2 + strength (sum_{p,q} |x_p - x_q|)`, after a step on `||w||_2`.

    A gradient step keeps the order of far weights and would let near ones pass each other: these get their mean.
    """
    from sklearn.isotonic import isotonic_regression

    flat = weight.detach().flatten().double().cpu()
    flat = flat - strength * flat / flat.norm().clamp_min(1e-12)
    order = flat.argsort(stable=True)
    moved = flat - strength * diversity_gradient(flat)
    joined = torch.empty_like(flat)
    joined[order] = torch.from_numpy(isotonic_regression(moved[order].numpy()))
    return joined.view_as(weight).to(weight)


def without_mode(weight: Tensor, before: Tensor) -> Tensor:
    """The weight with its commonest value, if it occurs twice, set to zero; the largest of before stays if all are."""
    values, counts = weight.unique(return_counts=True)
    if int(counts.max()) > 1:
        weight = torch.where(weight == values[counts.argmax()], 0.0, weight)
    if not weight.any():
        weight.view(-1)[before.abs().argmax()] = before.view(-1)[before.abs().argmax()]
    return weight


def tie(model: nn.Module, site: Site) -> Tensor:
    """Holds the weight by its distinct values, zeros by a mask; returns how many weights have each value.

    Where more than half of the values differ, they stay free: a table costs more than it saves.
    """
    weight = site.weight
    alive = weight != 0
    values, counts = weight[alive].unique(return_counts=True)
    site.set_mask(model, alive.cpu())
    if 2 * len(values) > int(alive.sum()):
        return torch.ones((), device=weight.device)
    index = torch.searchsorted(values, weight).clamp_max(len(values) - 1)
    attach(site.module, Codebook(values, narrow(index)), at=site.name, root=model)
    return counts


def share_mean(found: Mapping[str, Site], counts: Mapping[str, Tensor], progress: float) -> None:
    """Makes the gradient of a value the mean over its weights, of which it is the sum."""
    for path, site in found.items():
        grad = originals(site.module, site.name)[0].grad
        if grad is not None:
            grad.div_(counts[path])


def told(weight: Tensor) -> str:
    """Density, diversity and what they save, in words."""
    kept, distinct = int(weight.count_nonzero()), len(weight.unique())
    dense, paper, whole = weight.numel() * 32, *stored_bits(weight)
    return (
        f"{kept / weight.numel():.1%} of the weights kept, {distinct} distinct values; {dense / paper:.1f} times "
        f"smaller by the paper's estimate, {dense / whole:.1f} with the pointers that decoding needs"
    )


def stored_bits(weight: Tensor) -> tuple[int, int]:
    """Bits of a weight as sparse rows of value and position: by the paper's estimate (eq. 4), and what can be decoded.

    The paper counts one bit for each row (or column, whichever are fewer); rows of positions within the shorter side
    need a pointer of `ceil(log2(nnz + 1))` bits for each entry of the longer side, and one more.
    """
    rows, columns = weight.shape[0], weight[0].numel()
    kept, distinct = int(weight.count_nonzero()), len(weight.unique())
    each = math.ceil(math.log2(max(2, distinct))) + math.ceil(math.log2(max(2, min(rows, columns))))
    values = kept * each + distinct * 32
    return values + min(rows, columns), values + (max(rows, columns) + 1) * math.ceil(math.log2(kept + 1))
