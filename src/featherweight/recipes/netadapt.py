"""NetAdapt: step by step a little less of a resource, each time from the group of layers that bears it best.

Tien-Ju Yang, Andrew Howard, Bo Chen, Xiao Zhang, Alec Go, Mark Sandler, Vivienne Sze, Hartwig Adam, "NetAdapt:
platform-aware neural network adaptation for mobile applications", ECCV 2018, arXiv:1804.03230, algorithm 1. In step `j`
the resource is to fall to `Res_j = Res_{j-1} - dR_0 decay^(j-1)`. For every layer by itself: the largest number of
filters with which the whole network needs no more, those with the largest l2 norms, a short fine-tuning. The proposal
with the best accuracy is accepted, the others are dropped. A long fine-tuning comes last.

Departs from the paper: a whole network is timed (by ONNX Runtime, once for each set of widths) where the paper adds up
a look-up table of its layers, so that what fusing saves counts too; MACs and parameters are exact. Layers that share
channels, such as those of a residual sum, are one. Proposals are compared on the validation data, where the paper holds
training images out. A decrement counts from what the accepted network really needs, never falls below a fifth of its
first value, or a small budget would never be reached, and is halved where no layers can save it by themselves. The
fine-tuning of the proposals is given in epochs, where the authors' examples take 10 steps and the paper 10,000 to
40,000.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive, Share
from featherweight.budget import Limit, parse
from featherweight.catalogue import Slot, fill, recipe
from featherweight.core import measuring
from featherweight.core.channels import Channels, Group, channel_groups, remove_channels
from featherweight.core.cost import cost
from featherweight.core.fit import Optimizers
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.ledger import note
from featherweight.core.site import sites
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task, evaluate
from featherweight.core.widths import Prices, rounded, scores_of
from featherweight.errors import BadOption, CompressionError
from featherweight.prune import AT_ONCE, MARGIN, Score, studied

LEAST, SMALL = 0.2, 0.02  # of the first decrement: where it stops to fall, and what is given up at


def aims_at_one(options: Mapping[str, Any]) -> None:
    """Refuses a budget that is not one resource."""
    limits = parse(options["budget"])
    if len(limits) != 1 or limits[0].quantity not in AT_ONCE:
        raise BadOption(f"budget={options['budget']!r}: netadapt adapts to one of {', '.join(AT_ONCE)}, name one limit")


@recipe(
    paper="Yang et al., ECCV 2018, arXiv:1804.03230",
    family="prune",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"budget": "macs<=0.8x", "decrement": 0.3, "short_finetune": 0.34, "finetune": 1, "round_to": 1},
    rules=(aims_at_one,),
)
def netadapt(
    model: nn.Module,
    task: Task,
    *,
    budget: str = "latency<=0.5x",
    decrement: Fraction = 0.025,
    decay: Share = 0.96,
    score: Annotated[str, Slot("score")] | Score = "filter_norm_l2",
    short_finetune: Amount = 0.1,
    finetune: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = "sgd",
    round_to: Count = 16,
    calibration_batches: Count = 8,
    where: WhereWeighted = None,
) -> nn.Module:
    """Tries, at every step, each group of layers with fewer channels, and keeps the best; returns the adapted network.

    Args:
        budget: where to stop, such as "latency<=0.5x", "macs<=0.3x" or "params<=100k".
        decrement: what the first step saves, as a fraction of the untouched network's resource, dR_0.
        decay: each step's decrement is that of the step before times this.
        score: which channels of a layer stay, by a score of its outputs.
        short_finetune: epochs that every proposal is trained before they are compared.
        finetune: epochs at the end, the learning rate falling to zero.
        lr: learning rate of both.
        optimizer: "adam", "adamw" or "sgd" (default).
        round_to: wider layers keep a multiple of this many channels, without which fewer channels bring runtimes
            nothing; 1 tries every number.
        calibration_batches: batches that scores of activations and gradients look at.
        where: which layers may lose channels.

    Raises:
        BadOption: the budget is not one of latency, macs and params.
        MissingNeed: a latency, in a plain call in which nothing is timed (see `core.measuring`).
        CompressionError: the budget cannot be reached.
    """
    masked = masked_names(model)
    original = copy.deepcopy(bake(model))
    resource = Resource.of(original, task, parse(budget)[0])
    score = fill("score", score)

    def train(candidate: nn.Module) -> float:
        mask_zeros(candidate, masked)
        task.fit(candidate, task, epochs=short_finetune, lr=lr, optimizer=optimizer, decay="constant",
                 label="short fine-tune")  # fmt: skip
        value = evaluate(bake(candidate), task, label="evaluate a proposal").value
        return value if task.metric.higher_is_better else -value

    def ranks(current: nn.Module, channels: Channels) -> Tensor:
        found = studied(current, task, sites(current, where), calibration_batches, grain="filter", channels=channels)
        return scores_of(channels, {path: score(site) for path, site in found.items()}, "sum", "none")

    for step in adapted(model, task, resource, ranks, train, decrement=decrement, decay=decay, round_to=round_to):
        model = step.model
        note(f"{', '.join(step.layers[:3])}: {step.before} to {step.after} channels, {resource.limit.quantity} "
             f"{step.reached:.3f}x, at most {step.aim:.3f}x")  # fmt: skip
    mask_zeros(model, masked)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


@dataclass(frozen=True)
class Resource:
    """What a network needs of the limited quantity, as a fraction of what the original does."""

    limit: Limit
    original: nn.Module
    inputs: Any
    whole: float  # of the original, in the quantity's unit; 1 for a latency, which is measured beside it
    timed: dict[tuple[Any, ...], float] = field(default_factory=dict)

    @staticmethod
    def of(original: nn.Module, task: Task, limit: Limit) -> Resource:
        counted = cost(original, task.inputs())
        whole = {"macs": counted.macs, "params": counted.params}.get(limit.quantity, 1.0)
        return Resource(limit, original, task.inputs(), float(whole))

    @property
    def goal(self) -> float:
        """The limit as a fraction of the original; of a latency a little less, which would come out different again."""
        if self.limit.quantity != "latency":
            return self.limit.allowed({self.limit.quantity: self.whole}) / self.whole
        if self.limit.relative:
            return MARGIN * self.limit.value
        return MARGIN * self.limit.value / measuring.latency(self.original, self.original, self.inputs).before

    def without(self, model: nn.Module, channels: Channels) -> Callable[[Tensor], float]:
        """`(doomed channels) -> fraction` for a model as it is now."""
        if self.limit.quantity != "latency":
            prices = Prices.of(model, channels, cost(model, self.inputs))
            return lambda doomed: float(getattr(prices, self.limit.quantity)(doomed)) / self.whole
        return lambda doomed: self._latency(model, channels, doomed)

    def _latency(self, model: nn.Module, channels: Channels, doomed: Tensor) -> float:
        smaller = copy.deepcopy(model)
        remove_channels(smaller, doomed, channels=channels)
        key = tuple(tuple(p.shape) for p in smaller.parameters())
        if key not in self.timed:
            self.timed[key] = measuring.latency(self.original, smaller, self.inputs).ratio
        return self.timed[key]


@dataclass(frozen=True)
class Step:
    """An accepted proposal."""

    model: nn.Module
    layers: tuple[str, ...]
    before: int  # channels of the group
    after: int
    aim: float  # fractions of the original's resource
    reached: float
    value: float  # of the metric, higher is better


def adapted(
    model: nn.Module,
    task: Task,
    resource: Resource,
    ranks: Callable[[nn.Module, Channels], Tensor],
    train: Callable[[nn.Module], float],
    *,
    decrement: float,
    decay: float,
    round_to: int,
) -> Iterator[Step]:
    """Algorithm 1 up to the long fine-tuning: one accepted proposal after the other, until the budget holds."""
    now, goal, less = 1.0, resource.goal, decrement
    while now > goal:
        aim = max(goal, now - less)
        channels = channel_groups(model, task.inputs())
        needs = resource.without(model, channels)
        scores = ranks(model, channels) if channels.count or now == 1 else torch.empty(0)
        proposals = []
        for group in channels.groups:
            doomed = _fewest(channels, group, scores, round_to, needs, aim)
            if doomed is not None:
                smaller = remove_channels(copy.deepcopy(model), doomed, channels=channels)
                width, reached = len(group.channels), needs(doomed)
                proposals.append(Step(smaller, group.layers, width, width - len(doomed), aim, reached, train(smaller)))
        if not proposals and less < SMALL * decrement:
            raise CompressionError(
                f"{resource.limit.text} is not reached: at {now:.3f}x no layers can save more by themselves; "
                f"lower round_to={round_to}, choose more layers, or ask for less"
            )
        if not proposals:
            less = less / 2
            continue
        best = max(proposals, key=lambda step: step.value)
        yield best
        model, now, less = best.model, best.reached, max(less * decay, LEAST * decrement)


def _fewest(
    channels: Channels, group: Group, scores: Tensor, round_to: int, needs: Callable[[Tensor], float], aim: float
) -> Tensor | None:
    """The fewest channels of a group, the lowest scores first, without which the network needs no more than `aim`."""
    ids = torch.tensor(group.channels)
    ids = ids[scores[ids].isfinite()]
    order = ids[scores[ids].argsort(stable=True)]

    def without(count: int) -> Tensor:
        return rounded(channels, order[:count], round_to)

    counts = range(1, len(order))  # one stays
    place = bisect_left(counts, True, key=lambda count: needs(without(count)) <= aim)
    return without(counts[place]) if place < len(counts) else None
