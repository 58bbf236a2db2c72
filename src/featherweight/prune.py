"""The verb `prune`: score, remove the lowest, retrain what is left, repeat.

Two effects share the loop. Grains inside a weight are masked: zeros that stay zeros. The grain "filter" removes output
channels and everything that goes with them, so that what is left is an ordinary, smaller network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive, checked
from featherweight.budget import Limit, parse
from featherweight.catalogue import Slot, fill
from featherweight.core import measuring
from featherweight.core.channels import Channels, channel_groups, remove_channels
from featherweight.core.cost import Cost, cost
from featherweight.core.fit import Optimizers
from featherweight.core.forms import Mask, attach, bake, has_forms, mask_zeros, masked_names, originals
from featherweight.core.grains import Grain, all_but, pattern_of, pooled, units
from featherweight.core.ledger import note, show, skip
from featherweight.core.restart import Carried, reinitialise
from featherweight.core.select import hold_nan, lowest
from featherweight.core.sensitivity import RATIOS, Allocate, Left, Sensitivity, mask_bytes, scan
from featherweight.core.site import PerLayer, Site, per_layer, sites
from featherweight.core.study import Study
from featherweight.core.surgery import WEIGHTED, WhereWeighted
from featherweight.core.task import Task
from featherweight.core.trace import weight_tensors
from featherweight.core.widths import (
    NO_CHANNELS,
    Coupled,
    Normalise,
    Prices,
    Shrinking,
    check_some,
    map_flops,
    normalised,
    removable,
    scores_of,
)
from featherweight.errors import BadData, BadOption

Score = Callable[[Site], Tensor]
Schedule = Callable[[float], float]

Scope = Literal["layer", "global", "std"]
CONFIRMED = 3  # times: of many candidates near a limit, one is bound to be timed too low once
MARGIN = 0.97  # of a latency: what is timed again comes out a little different
AT_ONCE = ("macs", "params", "latency")
"""What a removal of channels can be asked to save."""


def starts_below(options: Mapping[str, Any]) -> None:
    """Refuses a start above the goal, of which masks could only shrink."""
    goal = options["sparsity"] if options.get("grain", "weight") != "filter" else options["prune_ratio"]
    start = options.get("start", 0)
    least = min(goal.values(), default=1.0) if isinstance(goal, Mapping) else goal
    if start > least:
        raise BadOption(f"start={start:g} is above sparsity={least:g}: masks only grow, start below it")


def ranks_apart(options: Mapping[str, Any]) -> None:
    """Refuses to rank layers together that have a fraction each."""
    named = "sparsity" if isinstance(options["sparsity"], Mapping) else "prune_ratio"
    if isinstance(options.get(named), Mapping) and options["scope"] == "global":
        raise BadOption(f'scope="global" ranks layers together, but {named} names a fraction for each: leave scope out')


def fits_the_grain(options: Mapping[str, Any]) -> None:
    """Refuses what only masks, or only removed channels, can do."""
    filters = options["grain"] == "filter"
    if options["budget"] is not None and not filters:
        raise BadOption(f'budget={options["budget"]!r} is met by removing channels: pass grain="filter", or sparsity')
    if options["budget"] is not None:
        limits = parse(options["budget"])
        for limit in (one for one in limits if one.quantity not in AT_ONCE):
            raise BadOption(f"budget={limit.text!r}: removing channels is asked for one of {', '.join(AT_ONCE)}")
    if options["flops"] and not filters:
        raise BadOption(f'flops={options["flops"]:g} is the price of a channel: pass grain="filter"')
    if options["order"] != "all" and not filters:
        raise BadOption(f'order={options["order"]!r} goes through channels layer by layer: pass grain="filter"')


def spreads_a_total(options: Mapping[str, Any]) -> None:
    """Refuses an allocation where every layer's fraction is given."""
    if options.get("allocation") is None:
        return
    named = "prune_ratio" if options["grain"] == "filter" else "sparsity"
    if isinstance(options[named], Mapping):
        raise BadOption(f"allocation spreads a total over the layers, but {named} names a fraction for each: pass one")
    if pattern_of(options["grain"]) is not None:
        raise BadOption(f'grain="{options["grain"]}" removes the same of every layer: leave allocation out')


@checked(starts_below, ranks_apart, fits_the_grain, spreads_a_total)
def prune(
    model: nn.Module,
    task: Task,
    *,
    score: Annotated[str, Slot("score")] | Score = "magnitude",
    grain: Grain = "weight",
    sparsity: PerLayer[Fraction] = 0.9,
    prune_ratio: PerLayer[Fraction] = 0.5,
    budget: str | None = None,
    allocation: Annotated[str, Slot("allocation")] | Allocate | None = None,
    scope: Scope = "std",
    normalise: Normalise = "none",
    coupled: Coupled = "sum",
    flops: Amount = 0.0,
    schedule: Annotated[str, Slot("schedule")] | Schedule = "cubic",
    rounds: Count = 4,
    start: Fraction = 0.0,
    order: Literal["all", "forward", "backward"] = "all",
    permanence: Literal["hard", "soft"] = "hard",
    epochs: Amount = 8,
    finetune: Amount = 4,
    recovery: Literal["finetune", "scratch"] = "finetune",
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    round_to: Count = 16,
    calibration_batches: Count = 8,
    where: WhereWeighted = None,
) -> nn.Module:
    """Removes the weights or channels that score lowest, in rounds with retraining between them; returns the model.

    In round `t` of `n` the fraction removed is `start + (goal - start) * schedule(t / n)`. The counts are exact before
    rounding, ties are broken by index, what is masked stays masked (also what an earlier method masked), every layer
    keeps a weight and a channel.

    Args:
        score: an ingredient `(site) -> tensor` of the weight's shape, or of one entry for each output; the lowest go.
        grain: what goes as one: "weight"; inside weights "kernel", "shape" (the same place in every filter), "N:M" (of
            M neighbouring inputs N stay, such as "2:4"), "RxC" (blocks, such as "16x16"); or "filter" (output channels
            with everything that reads them, physically).
        sparsity: fraction of the weights masked, of all chosen layers together; or layer patterns with a fraction
            each, such as {"fc1": 0.92, "conv*": 0.6}. The grain "N:M" says it itself.
        prune_ratio: with the grain "filter": fraction of the channels removed; or layer patterns with a fraction each.
        budget: with the grain "filter", in place of prune_ratio: the fewest channels with which it holds, such as
            "macs<=0.5x" (or "params<=100k", or "latency<=0.5x", which is timed).
        allocation: how that total is spread over the layers, by pruning each of them alone and evaluating it on the
            validation data: "layer_sensitivity" (as much of every layer as one tolerated drop allows) or
            "budget_knapsack" (the least sum of drops, by integer programming); left out, by scope.
        scope: "layer" removes the same fraction of every layer, "global" ranks all scores together, "std" ranks them
            after division by the deviation of the surviving weights of their layer: one threshold of `q` deviations.
            If the goal is a mapping, every layer is ranked by itself: "std" has no say, "global" is refused.
        normalise: what a layer's scores are divided by first, so that layers compare: "l2" (their norm), "mean",
            "max", "rank" (their place in the layer) or "none".
        coupled: how the scores of a channel that several layers share (a residual sum) become one: "sum", "mean",
            "max".
        flops: with the grain "filter": what a channel's score loses, after it was normalised, for every million
            operations that computing its map takes; so that of equals the dearer goes.
        schedule: "constant" (all at once), "cubic", "linear" or `progress -> 0..1`.
        rounds: how often something is removed; 1 is one-shot.
        start: the fraction at which the schedule starts, no more than the least that is asked for.
        order: with the grain "filter": "all" layers in each round; or "forward" or "backward", one group of coupled
            layers after the other, a round each, in the order of the network (with a budget, each loses the same
            fraction, the least with which it holds).
        permanence: "hard" (what went stays away) or "soft" (between rounds it is zero but learns on, and is chosen
            anew; the last round is hard).
        epochs: retraining in total, the same after every round.
        finetune: further epochs after the last round, the learning rate falling to zero.
        recovery: "finetune" goes on from the weights that are left, "scratch" draws them anew before the last training.
        lr: learning rate of the retraining.
        optimizer: "adam" (default), "adamw" or "sgd".
        round_to: with the grain "filter": wider layers keep a multiple of this many channels, without which fewer
            channels bring runtimes nothing; 1 removes exactly what the scores say.
        calibration_batches: batches that scores of activations and gradients look at.
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: an option outside its range, or a start above the goal.
        UnknownName: no such ingredient or layer.
        MissingNeed: retraining without training data, a score that needs what the task does not have.
        CompressionError: no channel can be removed, or the budget is not reached.
    """
    score, schedule = fill("score", score), fill("schedule", schedule)
    allocate = None if allocation is None else fill("allocation", allocation)
    training = _Training(task, epochs, finetune, lr, optimizer, recovery)
    if grain == "filter":
        goal = _Goal(score, prune_ratio, budget, scope, normalise, coupled, flops, start, round_to, calibration_batches,
                     where, allocate)  # fmt: skip
        ways = [schedule(turn / rounds) for turn in range(1, rounds + 1)]
        return _prune_channels(model, training, goal, ways, order, soft=permanence == "soft")
    found, goals = per_layer(model, "sparsity", sparsity, where)
    found = studied(model, task, found, calibration_batches, grain=grain)
    if isinstance(sparsity, Mapping) and scope == "std":  # the default: it cannot be told whether it was asked for
        note("every layer is ranked by itself, since sparsity names a fraction for each: scope has no say")
    within = "layer" if isinstance(sparsity, Mapping) or allocate else scope
    if allocate:
        goals = _spread(model, task, found, score, grain, allocate, next(iter(goals.values())))
    for turn in range(1, rounds + 1):
        way, last = schedule(turn / rounds), turn == rounds
        now = {path: min(start, goal) + (goal - min(start, goal)) * way for path, goal in goals.items()}
        mask_lowest(
            model, found, score, now, within, grain=grain, normalise=normalise, soft=permanence == "soft" and not last
        )
        training.after_round(model, turn, rounds, f"at {_sparsity(found):.1%}")
        found = studied(model, task, found, calibration_batches, grain=grain)
    training.at_last(model)
    for site in found.values():
        _note_dead_units(site)
    return model


@dataclass(frozen=True)
class _Training:
    """How what is left is trained, between the rounds and at last."""

    task: Task
    epochs: float
    finetune: float
    lr: float
    optimizer: Optimizers
    recovery: str

    def after_round(self, model: nn.Module, turn: int, rounds: int, told: str) -> None:
        if self.epochs:
            label = f"retrain {turn}/{rounds} {told}"
            decay = "constant" if turn < rounds or self.finetune else "cosine"
            self.task.fit(model, self.task, epochs=self.epochs / rounds, lr=self.lr, optimizer=self.optimizer,
                          decay=decay, label=label)  # fmt: skip

    def at_last(self, model: nn.Module) -> None:
        if self.recovery == "scratch":
            reinitialise(model)
        if self.finetune:
            fresh = self.recovery == "scratch" or not isinstance(self.optimizer, Carried)
            optimizer = self.optimizer.make if fresh and isinstance(self.optimizer, Carried) else self.optimizer
            label = "train from scratch" if self.recovery == "scratch" else "fine-tune"
            self.task.fit(model, self.task, epochs=self.finetune, lr=self.lr, optimizer=optimizer, label=label)


def studied(
    model: nn.Module,
    task: Task,
    found: Mapping[str, Site],
    batches: int,
    *,
    grain: str = "weight",
    channels: Channels | None = None,
) -> dict[str, Site]:
    """The sites with a study of the model as it is now, for scores that need data, and what goes as one in them."""
    study = Study(model, task, list(found), batches, channels)
    return {path: replace(site, study=study, grain=grain) for path, site in found.items()}


# --- grains inside a weight ------------------------------------------------------------------------------------------


def mask_lowest(
    model: nn.Module,
    found: Mapping[str, Site],
    score: Score,
    sparsity: Mapping[str, float],
    scope: str,
    *,
    grain: str = "weight",
    normalise: Normalise = "none",
    soft: bool = False,
) -> None:
    """Masks, in place, the lowest-scoring units of the sites up to a fraction: masked ones first, the rest ranked.

    Args:
        soft: zero them once in place of masking them, so that they learn on.
    """
    numbers = {
        path: by_outputs(site, units(tuple(by_outputs(site, site.keep).shape), grain)) for path, site in found.items()
    }
    pattern = pattern_of(grain)
    scores = {path: normalised(_of_weights(site, score(site)), normalise) for path, site in found.items()}
    if pattern is not None:
        alive = {path: torch.where(found[path].keep, values, -torch.inf) for path, values in scores.items()}
        marked = {
            path: by_outputs(found[path], all_but(by_outputs(found[path], values), *pattern))
            for path, values in alive.items()
        }
    else:
        ranked = {path: _ranked(found[path], values, numbers[path], scope) for path, values in scores.items()}
        if scope == "layer":
            low = {path: lowest({path: values}, sparsity[path])[path] for path, values in ranked.items()}
        else:
            low = lowest(ranked, next(iter(sparsity.values())))
        marked = {path: low[path][numbers[path]] for path in found}
    for path, site in found.items():
        keep = site.keep & ~marked[path]
        if soft:
            zero(site, keep)
        else:
            site.set_mask(model, keep)


def zero(site: Site, keep: Tensor) -> None:
    """Sets the weight to zero where `keep` is False, and lets it learn on."""
    with torch.no_grad():
        held = (
            originals(site.module, site.name)[0]
            if has_forms(site.module, site.name)
            else getattr(site.module, site.name)
        )
        held.mul_(keep.to(held))


def by_outputs(site: Site, values: Tensor) -> Tensor:
    """What is of the weight's shape as (outputs, inputs, ...), or that as what is of the weight's shape."""
    return values.transpose(0, 1) if isinstance(site.module, nn.ConvTranspose2d) else values


def _of_weights(site: Site, values: Tensor) -> Tensor:
    """Scores of the weight's shape; one for each output stands for all that the output reads.

    Raises:
        BadOption: scores of another shape.
        BadData: a score is NaN, where no mask stands.
    """
    shape = site.weight.shape
    if values.shape == shape:
        if torch.isnan(values.detach().cpu()[site.keep]).any():
            raise BadData(hold_nan(site.path))
        return values
    along = 1 if isinstance(site.module, nn.ConvTranspose2d) else 0
    if values.dim() == 1 and len(values) == shape[along]:
        return _of_weights(site, values.view([-1 if d == along else 1 for d in range(len(shape))]).expand(shape))
    raise BadOption(
        f"the score of {site.path} has the shape {tuple(values.shape)}: give one of {tuple(shape)} or of its outputs"
    )


def _ranked(site: Site, values: Tensor, numbers: Tensor, scope: str) -> Tensor:
    """Scores of units for ranking: masked units' last of all, the layer's highest first, so that no layer empties."""
    keep = pooled(site.keep.double(), numbers) > 0
    values = pooled(torch.where(site.keep, values.detach().double().cpu(), 0.0), numbers)
    if scope == "std":
        values = values / _deviation(site)
    values = torch.where(keep, values, -torch.inf)
    values[values.argmax()] = torch.inf
    return values


def _deviation(site: Site) -> float:
    """Of the surviving weights; 1 where there is none."""
    alive = site.weight.cpu()[site.keep].double()
    return (float(alive.std(unbiased=False)) if alive.numel() > 1 else 0.0) or 1.0


# --- how much of each layer -----------------------------------------------------------------------------------------


def sensitivity(
    model: nn.Module,
    task: Task,
    *,
    score: str | Score = "magnitude",
    grain: Grain = "weight",
    ratios: Sequence[float] = RATIOS,
    round_to: int = 16,
    calibration_batches: int = 8,
    where: WhereWeighted = None,
) -> Sensitivity:
    """What every layer alone bears: the metric on `task.valid`, MACs and bytes at each ratio. The model is not changed.

    Measured once for the same weights, data and scores in a process, also where `prune(allocation=)` asks for it.

    Args:
        score: an ingredient, as in `prune`.
        grain: "filter" removes channels, anything else masks.
        ratios: fractions of the layer, rising.
        round_to: with the grain "filter": wider layers keep a multiple of this many channels.
        calibration_batches: batches that scores of activations and gradients look at.
        where: which layers.

    Raises:
        UnknownName: no such ingredient or layer.
        TraceError: channels of a network that cannot be traced.
    """
    score = fill("score", score)
    if grain == "filter":
        plain = bake(copy.deepcopy(model))
        goal = _Goal(score, 0.5, None, "layer", "none", "sum", 0.0, 0.0, round_to, calibration_batches, where)
        shrinking, layers = _scored(plain, task, goal)
        return scan_channels(plain, task, shrinking, list(layers), ratios)
    found = studied(model, task, sites(model, where), calibration_batches, grain=grain)
    return scan_weights(model, task, found, score, grain, ratios)


def _spread(
    model: nn.Module,
    task: Task,
    found: Mapping[str, Site],
    score: Score,
    grain: str,
    allocate: Allocate,
    sparsity: float,
) -> dict[str, float]:
    """The fraction of every layer with which all of them together have this sparsity, by what each costs alone."""
    ratios = RATIOS if sparsity <= RATIOS[-1] else (*RATIOS, (1 + sparsity) / 2)
    measured = scan_weights(model, task, found, score, grain, ratios)
    chosen = allocate(measured.curves(), sparsity)
    sizes = {path: site.weight.numel() for path, site in found.items()}
    more = sparsity * sum(sizes.values()) / max(1e-12, sum(chosen[path] * size for path, size in sizes.items()))
    chosen = {path: min(1.0, more) * ratio for path, ratio in chosen.items()}  # what was tried is a grid
    show("sensitivity", measured.told(chosen))
    return chosen


def scan_weights(
    model: nn.Module,
    task: Task,
    found: Mapping[str, Site],
    score: Score,
    grain: str = "weight",
    ratios: Sequence[float] = RATIOS,
) -> Sensitivity:
    """What masking each layer alone costs the metric and saves."""
    scores = {path: _of_weights(site, score(site)).detach() for path, site in found.items()}
    plain = cost(bake(copy.deepcopy(model)), task.inputs())
    sizes = {path: site.weight.numel() for path, site in found.items()}
    kept = {path: int(site.keep.sum()) for path, site in found.items()}

    def left(path: str, staying: int) -> Left:
        nonzeros = plain.nonzeros - kept[path] + staying
        where = sum(mask_bytes(size, staying if p == path else kept[p]) for p, size in sizes.items())
        return Left(sum(sizes.values()) - sizes[path] + staying, nonzeros, plain.macs, 4 * nonzeros + where)

    def trial(path: str, ratio: float) -> tuple[nn.Module, Left]:
        smaller = copy.deepcopy(model)
        site = Site(path, smaller.get_submodule(path), grain=grain)
        mask_lowest(smaller, {path: site}, lambda one: scores[one.path], {path: ratio}, "layer", grain=grain)
        return smaller, left(path, int(site.keep.sum()))

    dense = sum(mask_bytes(size, kept[path]) for path, size in sizes.items())
    whole = Left(sum(sizes.values()), plain.nonzeros, plain.macs, 4 * plain.nonzeros + dense)
    return scan(model, task, whole, list(found), trial, scores=scores, told=f"weights {grain}", ratios=ratios)


def scan_channels(
    model: nn.Module, task: Task, shrinking: Shrinking, layers: Sequence[str], ratios: Sequence[float] = RATIOS
) -> Sensitivity:
    """What removing channels of each layer alone costs the metric and saves; coupled layers count as the first."""
    channels = shrinking.channels
    prices = Prices.of(model, channels, cost(model, task.inputs()))
    count = count_of(channels, layers)

    def left(doomed: Tensor) -> Left:
        params = prices.params(doomed)
        return Left(count - len(doomed), params, prices.macs(doomed), 4 * params)

    def trial(path: str, ratio: float) -> tuple[nn.Module, Left]:
        doomed = shrinking.by_layer({path: ratio})
        smaller = copy.deepcopy(model)
        remove_channels(smaller, doomed, channels=channels)
        return smaller, left(doomed)

    whole = left(torch.empty(0, dtype=torch.long))
    told = f"channels, multiples of {shrinking.round_to}"
    leading, seen = [], torch.zeros(channels.count, dtype=torch.bool)
    for path in layers:
        ids = channels.outputs[path]
        if not seen[ids[ids >= 0]].all():
            leading.append(path)
        seen[ids[ids >= 0]] = True
    return scan(model, task, whole, leading, trial, scores={"": shrinking.scores}, told=told, ratios=ratios)


# --- channels --------------------------------------------------------------------------------------------------------


def _prune_channels(
    model: nn.Module, training: _Training, goal: _Goal, ways: Sequence[float], order: str, *, soft: bool
) -> nn.Module:
    """The loop for channels. Masks of earlier methods are made plain for a removal, and are back for every training."""
    masked = masked_names(model)
    start = _Start.of(bake(model), training.task)
    if goal.allocate is not None or (order != "all" and goal.budget is not None):
        goal = replace(goal, plan=_plan(model, training.task, start, goal), budget=None)
    carried = Carried(training.optimizer)
    training = replace(training, optimizer=carried)
    chosen = per_layer(model, "prune_ratio", goal.prune_ratio, goal.where)[0]
    events = [(way, group) for group in start.groups(order, chosen) for way in ways]
    if not events:
        raise BadOption(NO_CHANNELS)
    gone = 0
    for turn, (way, group) in enumerate(events, 1):
        shrinking, doomed = _doomed(bake(model), training.task, start, goal, way, group)
        zeros = {(path, name): getattr(model.get_submodule(path), name) == 0 for path, name in masked}
        if soft and turn < len(events):
            zero_channels(model, shrinking.channels, doomed)
            for (path, name), zero_before in zeros.items():
                attach(model.get_submodule(path), Mask(~zero_before), at=name, root=model)
        else:
            remove_channels(model, doomed, channels=shrinking.channels, optimizer=carried.held)
            mask_zeros(model, masked)
            gone += len(doomed)
        training.after_round(model, turn, len(events), f"{gone} of {start.channels.count} channels removed")
    check_some(gone, start.channels, goal.round_to)
    training.at_last(model)
    return model


@dataclass(frozen=True)
class _Goal:
    """How channels are ranked, and how many are to go."""

    score: Score
    prune_ratio: PerLayer[float]
    budget: str | None
    scope: str
    normalise: Normalise
    coupled: Coupled
    flops: float
    start: float
    round_to: int
    batches: int
    where: Any
    allocate: Allocate | None = None
    plan: Mapping[str, float] | None = None  # the fraction of every layer, once it was allocated


@dataclass(frozen=True)
class _Start:
    """The network before the first round: what fractions and budgets refer to."""

    model: nn.Module
    channels: Channels
    cost: Cost

    @staticmethod
    def of(model: nn.Module, task: Task) -> _Start:
        return _Start(copy.deepcopy(model), channel_groups(model, task.inputs()), cost(model, task.inputs()))

    def groups(self, order: str, chosen: Iterable[str]) -> list[tuple[str, ...] | None]:
        """The groups of coupled layers in the order in which they take turns; None stands for all at once."""
        if order == "all":
            return [None]
        layers: list[tuple[str, ...] | None] = [
            group.layers for group in self.channels.groups if not set(chosen).isdisjoint(group.layers)
        ]
        return layers if order == "forward" else layers[::-1]

    def count(self, layers: Sequence[str]) -> int:
        """How many different channels these layers put out."""
        return count_of(self.channels, layers)


def count_of(channels: Channels, layers: Sequence[str]) -> int:
    ids = torch.cat([channels.outputs[path] for path in layers])
    return len(ids[ids >= 0].unique())


def _doomed(
    model: nn.Module, task: Task, start: _Start, goal: _Goal, way: float, group: tuple[str, ...] | None
) -> tuple[Shrinking, Tensor]:
    """What goes in one round: what is missing of the fraction, or of the budget, that it is to have reached."""
    shrinking, ratios = _scored(model, task, goal, group)
    channels, layers = shrinking.channels, list(ratios)
    if goal.budget is not None:
        uniform = partial(_uniform, shrinking, layers) if goal.scope == "layer" else None
        holds = _holds(model, task, start, goal.budget, way, shrinking)
        return shrinking, shrinking.until(holds, candidates=uniform, told=goal.budget)

    def missing(chosen: Sequence[str], ratio: float) -> float:
        first = min(goal.start, ratio)
        asked = first + (ratio - first) * way
        return max(0.0, 1 - (1 - asked) * start.count(chosen) / max(1, count_of(channels, chosen)))

    if goal.plan is not None:
        return shrinking, shrinking.by_layer({p: missing([p], r) for p, r in goal.plan.items() if p in ratios})
    if goal.scope == "layer" or isinstance(goal.prune_ratio, Mapping):
        return shrinking, shrinking.by_layer({path: missing([path], ratio) for path, ratio in ratios.items()})
    return shrinking, shrinking.doomed(missing(layers, next(iter(ratios.values()))))


def _scored(
    model: nn.Module, task: Task, goal: _Goal, group: tuple[str, ...] | None = None
) -> tuple[Shrinking, dict[str, float]]:
    """The channels with their scores as the model is now, and of the chosen layers those that can lose some."""
    channels = channel_groups(model, task.inputs())
    found, ratios = per_layer(model, "prune_ratio", goal.prune_ratio, goal.where)
    found = {path: site for path, site in found.items() if group is None or path in group}
    found = studied(model, task, found, goal.batches, grain="filter", channels=channels)
    scores = {path: _of_outputs(site, goal) for path, site in found.items() if removable(channels, path)}
    for path in found.keys() - scores.keys():
        skip(path, channels.pinned.get(path, "its outputs cannot be removed"))
    less = map_flops(cost(model, task.inputs()), found, goal.flops) if goal.flops else {}
    pooled_scores = scores_of(channels, scores, goal.coupled, goal.normalise, less)
    shrinking = Shrinking(channels, pooled_scores, goal.round_to)
    return shrinking, {path: ratios[path] for path in scores}


def _plan(model: nn.Module, task: Task, start: _Start, goal: _Goal) -> dict[str, float]:
    """The fraction of every layer with which the whole reaches the goal: by what each costs alone, or all the same."""
    shrinking, ratios = _scored(model, task, goal)
    channels, layers = shrinking.channels, list(ratios)
    ratio = next(iter(ratios.values()))
    wanted = int(ratio * count_of(channels, layers) + 1e-9)
    holds = _holds(model, task, start, goal.budget, 1.0, shrinking) if goal.budget else lambda gone: len(gone) >= wanted
    told, allocate = goal.budget or f"prune_ratio={ratio:g}", goal.allocate
    if allocate is None:
        return _shares(channels, shrinking.until(holds, candidates=partial(_uniform, shrinking, layers), told=told))
    quantities: list[Any] = ["units"] if goal.budget is None else [one.quantity for one in parse(goal.budget)]
    measured = scan_channels(model, task, shrinking, layers)
    curves = measured.curves(quantities[0] if quantities[0] in ("units", "params") else "macs")
    gone = shrinking.until(holds, candidates=lambda share: shrinking.by_layer(allocate(curves, share)), told=told)
    chosen = {path: share for path, share in _shares(channels, gone).items() if path in curves}
    show("sensitivity", measured.told(chosen))
    return chosen


def _shares(channels: Channels, gone: Tensor) -> dict[str, float]:
    """The part of every layer's outputs that goes."""
    return {path: float(torch.isin(ids, gone).double().mean()) for path, ids in channels.outputs.items()}


def _uniform(shrinking: Shrinking, layers: Sequence[str], ratio: float) -> Tensor:
    return shrinking.by_layer(dict.fromkeys(layers, ratio))


def _holds(
    model: nn.Module, task: Task, start: _Start, budget: str, way: float, shrinking: Shrinking
) -> Callable[[Tensor], bool]:
    """Whether the budget, or the part of it that this round is to reach, holds without the channels."""
    prices = Prices.of(model, shrinking.channels, cost(model, task.inputs()))
    had = {"macs": float(start.cost.macs), "params": float(start.cost.params)}

    def in_time(limit: Limit, smaller: nn.Module) -> bool:
        timed = measuring.latency(start.model, smaller, task.inputs())
        share = limit.value if limit.relative else limit.value / timed.before
        return timed.ratio <= 1 - (1 - MARGIN * share) * way

    def reached(limit: Limit, doomed: Tensor) -> bool:
        if limit.quantity == "latency":
            smaller = copy.deepcopy(model)
            remove_channels(smaller, doomed, channels=shrinking.channels)
            return all(in_time(limit, smaller) for _ in range(CONFIRMED))
        now = getattr(prices, limit.quantity)(doomed)
        whole = had[limit.quantity]
        return bool(now <= whole - (whole - limit.allowed(had)) * way)

    return lambda doomed: all(reached(limit, doomed) for limit in parse(budget))


def _of_outputs(site: Site, goal: _Goal) -> Tensor:
    """One score for each output: what the score says, or the sum over all that the output reads."""
    values = goal.score(site)
    outputs = len(site.rows)
    if values.shape == site.weight.shape:
        values = by_outputs(site, values).flatten(1).sum(1)
    if values.shape != (outputs,):
        raise BadOption(
            f"the score of {site.path} has the shape {tuple(values.shape)}: give one for each of {outputs} outputs"
        )
    return values.detach().double().cpu() / (_deviation(site) if goal.scope == "std" else 1.0)


def zero_channels(model: nn.Module, channels: Channels, doomed: Tensor) -> None:
    """Zeroes the weights and biases that make these channels, in place; they learn on (norms are left alone)."""
    gone = torch.zeros(channels.count + 1, dtype=torch.bool)
    gone[doomed] = True
    tensors = weight_tensors(model)
    with torch.no_grad():
        for path in channels.outputs:
            module = model.get_submodule(path)
            if isinstance(module, WEIGHTED):
                dim = 1 if isinstance(module, nn.ConvTranspose2d) else 0
                for name, along in ((f"{path}.weight", dim), (f"{path}.bias", 0)):
                    if (rows := channels.axes.get((name, along))) is not None:
                        tensors[name].index_fill_(along, gone[rows].nonzero().flatten(), 0.0)


def _sparsity(found: Mapping[str, Site]) -> float:
    kept = sum(int(site.keep.sum()) for site in found.values())
    return 1 - kept / max(1, sum(site.keep.numel() for site in found.values()))


def _note_dead_units(site: Site) -> None:
    """Notes units without inputs (they put out a constant) and inputs that no unit reads."""
    keep = site.keep
    if keep.dim() < 2:
        return
    grid = keep.flatten(2).any(2) if keep.dim() > 2 else keep
    grid = by_outputs(site, grid)
    deaf, unread = int((~grid.any(1)).sum()), int((~grid.any(0)).sum())
    if deaf or unread:
        note(f"{site.path}: {deaf} of {grid.shape[0]} units have no inputs left, {unread} of {grid.shape[1]} inputs "
             "are read by no unit")  # fmt: skip
