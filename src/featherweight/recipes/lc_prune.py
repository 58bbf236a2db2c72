"""Learning-compression for pruning: training and an exact projection in turns, tied by an augmented Lagrangian."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.masks import distance, largest, masks, occupied, settle, told, write
from featherweight.core.pulled import pulled
from featherweight.core.site import sites
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task
from featherweight.errors import BadOption

Kind = Literal["l0", "l1", "l0_penalty", "l1_penalty"]
Tensors = dict[str, Tensor]


def has_its_number(options: Mapping[str, Any]) -> None:
    """Refuses a kind without the number that says how much goes."""
    wants = {"l1": "kappa", "l0_penalty": "alpha", "l1_penalty": "alpha"}.get(options["kind"])
    if wants is not None and options[wants] is None:
        raise BadOption(f"kind={options['kind']!r} needs {wants}: pass {wants}=...")


@recipe(
    paper="Carreira-Perpinan and Idelbayev, CVPR 2018",
    family="prune",
    needs={"labels", "train"},
    shrinks={"weights"},
    rules=(has_its_number,),
    small={"steps": 3, "epochs": 3, "finetune": 0},
)
def lc_prune(
    model: nn.Module,
    task: Task,
    *,
    kind: Kind = "l0",
    sparsity: Fraction = 0.95,
    kappa: Positive | None = None,
    alpha: Positive | None = None,
    mu: Positive = 9e-5,
    growth: Positive = 1.1,
    steps: Count = 40,
    epochs: Amount = 40,
    finetune: Amount = 4,
    lr: Positive = 0.05,
    lr_decay: Positive = 0.98,
    optimizer: Optimizers = "sgd",
    where: WhereWeighted = None,
) -> nn.Module:
    """Alternates training near sparse weights (L step) and the nearest sparse weights (C step); how near, grows.

    Miguel A. Carreira-Perpinan, Yerlan Idelbayev, "Learning-Compression Algorithms for Neural Net Pruning", CVPR 2018.
    With `theta` sparse, `lambda` the multipliers and `mu` growing geometrically,

        L: w <- argmin loss(w) + mu/2 ||w - theta - lambda/mu||^2    by training,
        C: theta <- the sparse weights nearest to w - lambda/mu, of all layers together,
           lambda <- lambda - mu (w - theta).

    How much of a layer goes is not given: the projection is over the weights of all layers as one vector.

    Departs from the paper: at the end the weights are theta and there are `finetune` epochs with its mask (none in the
    paper, whose mu grows until w = theta); one epoch of training in an L step by default. The learning rate of an L
    step is `lr lr_decay^k`, and no more than `1 / mu`, as in the authors' code. What an earlier method masked stays
    masked.

    Args:
        kind: "l0" (at most as many weights as `sparsity` leaves), "l1" (sum of |w| at most `kappa`), "l0_penalty"
            (`alpha` for each weight that is not zero) or "l1_penalty" (`alpha` |w|).
        sparsity: with "l0": fraction of the weights of all chosen layers together that is removed.
        kappa: with "l1": the bound.
        alpha: with a penalty: its strength.
        mu: strength of the pull at the start.
        growth: factor of mu from step to step.
        steps: how many L and C steps.
        epochs: training in all L steps together.
        finetune: epochs with the mask of theta, the learning rate falling to zero.
        lr: learning rate at the start, and of the fine-tuning.
        lr_decay: factor of the learning rate from step to step.
        optimizer: "sgd" (default), "adam" or "adamw".
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: an option outside its range, or a kind without its number.
        UnknownName: a pattern matches nothing.
    """
    found = sites(model, where)
    allowed = masks(found)

    def nearest(values: Tensors, mu: float) -> Tensors:
        return projected(values, kind, allowed, mu, sparsity=sparsity, kappa=kappa, alpha=alpha)

    w = {path: site.weight.cpu().clone() for path, site in found.items()}
    theta, multipliers = nearest(w, mu), {path: torch.zeros_like(one) for path, one in w.items()}
    gaps = []
    for turn in range(steps):
        targets = {path: theta[path] + multipliers[path] / mu for path in found}
        step, rate = pulled(task, found, targets, mu), min(lr * lr_decay**turn, 1 / mu)
        task.fit(model, task, epochs=epochs / steps, lr=rate, optimizer=optimizer, decay="constant", step=step,
                 label=f"L step {turn + 1}/{steps}")  # fmt: skip
        w = {path: site.weight.cpu().clone() for path, site in found.items()}
        theta = nearest({path: w[path] - multipliers[path] / mu for path in found}, mu)
        multipliers = {path: multipliers[path] - mu * (w[path] - theta[path]) for path in found}
        gaps.append(distance(w, theta))
        mu *= growth
    note("||w - theta|| after every step: " + " ".join(f"{one:.3g}" for one in gaps))

    for path, site in found.items():
        keep = occupied(path, theta[path] != 0, w[path].abs(), allowed[path])
        write(site, torch.where(theta[path] != 0, theta[path], w[path]))
        site.set_mask(model, keep)
    settle(model, found)
    note(told(found))
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def projected(
    values: Mapping[str, Tensor],
    kind: Kind,
    allowed: Mapping[str, Tensor],
    mu: float,
    *,
    sparsity: float = 0.0,
    kappa: float | None = None,
    alpha: float | None = None,
) -> Tensors:
    """The C step: the weights nearest to `values` under a constraint; under a penalty, with `mu/2` of the distance.

    For "l0_penalty" it keeps |u| > sqrt(2 alpha / mu), for "l1_penalty" it shrinks by alpha / mu, for "l1" by the
    amount that brings the sum of |u| to kappa (Duchi et al., ICML 2008).
    """
    size = {path: one.abs() * allowed[path] for path, one in values.items()}
    if kind == "l0":
        keep = largest(size, dict.fromkeys(size, sparsity), within=allowed, together=True)
        return {path: values[path] * keep[path] for path in values}
    if kind == "l0_penalty":
        least = (2 * (alpha or 0.0) / mu) ** 0.5
        return {path: values[path] * (size[path] > least) for path in values}
    by = (alpha or 0.0) / mu if kind == "l1_penalty" else ball(torch.cat([s.flatten() for s in size.values()]), kappa)
    return {path: values[path].sign() * (size[path] - by).clamp_min(0) for path in values}


def ball(size: Tensor, kappa: float | None) -> float:
    """By how much to shrink non-negative numbers such that their sum is at most kappa.

    >>> ball(torch.tensor([1.0, 1.0, 1.0, 1.0]), 2.0)
    0.5
    """
    ordered = size.double().sort(descending=True).values
    if kappa is None or float(ordered.sum()) <= kappa:
        return 0.0
    shrinks = (ordered.cumsum(0) - kappa) / torch.arange(1, len(ordered) + 1, dtype=torch.float64)
    last = int((ordered > shrinks).nonzero().max())
    return float(shrinks[last])
