"""The verb `prune`: score, mask the lowest, retrain the survivors, repeat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive, checked
from featherweight.catalogue import Slot, fill
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.select import lowest
from featherweight.core.site import PerLayer, Site, per_layer
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task
from featherweight.errors import BadOption

Score = Callable[[Site], Tensor]
Schedule = Callable[[float], float]

Scope = Literal["layer", "global", "std"]


def starts_below(options: Mapping[str, Any]) -> None:
    """Refuses a start above the goal, of which masks could only shrink."""
    sparsity, start = options["sparsity"], options.get("start", 0)
    least = min(sparsity.values(), default=1.0) if isinstance(sparsity, Mapping) else sparsity
    if start > least:
        raise BadOption(f"start={start:g} is above sparsity={least:g}: masks only grow, start below it")


def ranks_apart(options: Mapping[str, Any]) -> None:
    """Refuses to rank layers together that have a fraction each."""
    if isinstance(options["sparsity"], Mapping) and options["scope"] == "global":
        raise BadOption('scope="global" ranks layers together, but sparsity names a fraction for each: leave scope out')


@checked(starts_below, ranks_apart)
def prune(
    model: nn.Module,
    task: Task,
    *,
    score: Annotated[str, Slot("score")] | Score = "magnitude",
    sparsity: PerLayer[Fraction] = 0.9,
    scope: Scope = "std",
    schedule: Annotated[str, Slot("schedule")] | Schedule = "cubic",
    rounds: Count = 4,
    start: Fraction = 0.0,
    epochs: Amount = 8,
    finetune: Amount = 4,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    where: WhereWeighted = None,
) -> nn.Module:
    """Masks the weights that score lowest, in rounds with retraining between them, and returns the model.

    In round `t` of `n` the sparsity is `start + (sparsity - start) * schedule(t / n)`. The counts are exact, ties are
    broken by index, what is masked stays masked (also what an earlier method masked), every layer keeps a weight.

    Args:
        score: an ingredient `(site) -> tensor of the weight's shape`; the lowest go.
        sparsity: fraction of the weights removed, of all chosen layers together; or layer patterns with a fraction
            each, such as {"fc1": 0.92, "conv*": 0.6}.
        scope: "layer" removes the same fraction of every layer, "global" ranks all scores together, "std" ranks them
            after division by the deviation of the surviving weights of their layer: one threshold of `q` deviations.
            If `sparsity` is a mapping, every layer is ranked by itself: "std" has no say, "global" is refused.
        schedule: "constant" (all at once), "cubic", "linear" or `progress -> 0..1`.
        rounds: how often weights are removed; 1 is one-shot.
        start: the sparsity at which the schedule starts, no more than the least that is asked for.
        epochs: retraining in total, the same after every round.
        finetune: further epochs after the last round, the learning rate falling to zero.
        lr: learning rate of the retraining.
        optimizer: "adam" (default), "adamw" or "sgd".
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: an option outside its range, or a start above the goal.
        UnknownName: no such ingredient or layer.
        MissingNeed: retraining without training data.
    """
    score, schedule = fill("score", score), fill("schedule", schedule)
    found, goals = per_layer(model, "sparsity", sparsity, where)
    if isinstance(sparsity, Mapping) and scope == "std":  # the default: it cannot be told whether it was asked for
        note("every layer is ranked by itself, since sparsity names a fraction for each: scope has no say")
    for turn in range(1, rounds + 1):
        way = schedule(turn / rounds)
        now = {path: start + (goal - start) * way for path, goal in goals.items()}
        mask_lowest(model, found, score, now, "layer" if isinstance(sparsity, Mapping) else scope)
        if epochs:
            label = f"retrain {turn}/{rounds} at {_sparsity(found):.1%}"
            decay = "constant" if turn < rounds or finetune else "cosine"
            task.fit(model, task, epochs=epochs / rounds, lr=lr, optimizer=optimizer, decay=decay, label=label)
    if finetune:
        task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")
    for site in found.values():
        _note_dead_units(site)
    return model


def mask_lowest(
    model: nn.Module, found: Mapping[str, Site], score: Score, sparsity: Mapping[str, float], scope: str
) -> None:
    """Masks, in place, the lowest-scoring weights of the sites up to a fraction: masked ones first, the rest ranked."""
    scores = {path: _ranked(site, score(site), scope) for path, site in found.items()}
    if scope == "layer":
        marked = {path: lowest({path: values}, sparsity[path])[path] for path, values in scores.items()}
    else:
        marked = lowest(scores, next(iter(sparsity.values())))
    for path, site in found.items():
        site.set_mask(model, site.keep & ~marked[path])


def _ranked(site: Site, values: Tensor, scope: str) -> Tensor:
    """Scores for ranking: those of masked weights last of all, the layer's highest first, so that no layer empties."""
    keep, values = site.keep, values.detach().double().cpu()
    if scope == "std":
        alive = site.weight.cpu()[keep].double()
        deviation = float(alive.std(unbiased=False)) if alive.numel() > 1 else 0.0
        values = values / (deviation or 1.0)
    values = torch.where(keep, values, -torch.inf)
    values.view(-1)[values.argmax()] = torch.inf
    return values


def _sparsity(found: Mapping[str, Site]) -> float:
    kept = sum(int(site.keep.sum()) for site in found.values())
    return 1 - kept / max(1, sum(site.keep.numel() for site in found.values()))


def _note_dead_units(site: Site) -> None:
    """Notes units without inputs (they put out a constant) and inputs that no unit reads."""
    keep = site.keep
    if keep.dim() < 2:
        return
    grid = keep.flatten(2).any(2) if keep.dim() > 2 else keep
    grid = grid.T if isinstance(site.module, nn.ConvTranspose2d) else grid  # (in, out, ...)
    deaf, unread = int((~grid.any(1)).sum()), int((~grid.any(0)).sum())
    if deaf or unread:
        note(f"{site.path}: {deaf} of {grid.shape[0]} units have no inputs left, {unread} of {grid.shape[1]} inputs "
             "are read by no unit")  # fmt: skip
