"""Which channels go, given a score for each and how much is to be saved; what widths and what cost that leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from featherweight.core.channels import Channels
from featherweight.core.cost import Cost
from featherweight.core.ledger import note, skip
from featherweight.core.select import lowest
from featherweight.core.site import Site
from featherweight.errors import BadData, BadOption, CompressionError

Coupled = Literal["sum", "mean", "max"]
"""How the scores that layers give to a channel that they share become one."""
Normalise = Literal["none", "l2", "mean", "max", "rank"]
"""What a layer's scores are divided by, so that layers can be ranked together; "rank" is the place in the layer."""

NO_CHANNELS = (
    "none of the linear and convolution layers that were chosen puts out channels that can be removed: choose a method "
    "that masks weights, such as magnitude_iterative"
)


def rounded(channels: Channels, doomed: Tensor, round_to: int) -> Tensor:
    """What of the doomed channels, the most expendable first, goes when layers keep whole multiples.

    Layers no wider than `round_to` are not rounded: they are less than one vector anyway, and only their inputs count.
    """
    while True:
        doomed = channels.legal(doomed)
        spared = [torch.empty(0, dtype=torch.long)]
        for ids in channels.outputs.values():
            width, going = len(ids), doomed[torch.isin(doomed, ids)]
            multiple = round_to if width > round_to else 1
            kept = width - int(torch.isin(ids, going).sum())
            more = min(-(-kept // multiple) * multiple, width) - kept
            spared.append(going[len(going) - more :])
        stay = torch.isin(doomed, torch.cat(spared))
        if not stay.any():
            return doomed
        doomed = doomed[~stay]


def fewer(width: int, ratio: float, round_to: int) -> int:
    """How many of a layer's channels stay when a fraction goes: at least one, rounded up as in `rounded`.

    >>> fewer(8, 0.5, 1), fewer(64, 0.6, 16), fewer(4, 0.99, 1)
    (4, 32, 1)
    """
    kept = max(1, width - int(ratio * width + 1e-9))
    return min(width, -(-kept // round_to) * round_to) if width > round_to else kept


def smallest(scores: Tensor, ratio: float) -> Tensor:
    """Numbers of the lowest finite scores, exactly `floor(ratio n)` of them, the lowest first.

    >>> smallest(torch.tensor([3.0, 1.0, torch.inf, 2.0, 1.0]), 0.5).tolist()
    [1, 4]
    """
    scored = scores.isfinite().nonzero().flatten()
    chosen = scored[lowest({"scale": scores[scored]}, ratio)["scale"]]
    return chosen[scores[chosen].argsort(stable=True)]


def normalised(scores: Tensor, how: Normalise) -> Tensor:
    """A layer's scores, of any shape, on a scale that layers share; scores that are all zero stay as they are.

    >>> normalised(torch.tensor([3.0, 4.0]), "l2").tolist()
    [0.6, 0.8]
    """
    scores = scores.detach().cpu().double()
    if how == "rank":
        places = torch.empty_like(scores).flatten()
        places[scores.flatten().argsort(stable=True)] = torch.arange(scores.numel(), dtype=torch.float64)
        return places.view_as(scores) / max(1, scores.numel() - 1)
    known = torch.where(scores.isfinite(), scores.abs(), 0.0)  # an infinite score stands for none: the unit stays
    sizes = {"none": torch.ones(()), "l2": known.norm(), "mean": known.mean(), "max": known.max()}
    return scores / (float(sizes[how]) or 1.0)


@dataclass(frozen=True)
class Shrinking:
    """A network's channels with a score each (count,), infinite for those that stay, and what rounding is asked."""

    channels: Channels
    scores: Tensor
    round_to: int = 16

    def doomed(self, ratio: float) -> Tensor:
        """Numbers of the channels that go when a fraction of all does, the most expendable first, rounded and legal."""
        return rounded(self.channels, smallest(self.scores, ratio), self.round_to)

    def by_layer(self, ratios: Mapping[str, float]) -> Tensor:
        """The same, with a fraction for each layer; of layers that share channels, the first says how many go."""
        marked, done = [torch.empty(0, dtype=torch.long)], torch.zeros(self.channels.count, dtype=torch.bool)
        for path, ratio in ratios.items():
            ids = self.channels.outputs[path]
            mine = ids[ids >= 0].unique()
            mine = mine[~done[mine]]
            done[mine] = True
            marked.append(mine[smallest(self.scores[mine], ratio)])
        chosen = torch.cat(marked)
        return rounded(self.channels, chosen[self.scores[chosen].argsort(stable=True)], self.round_to)

    def until(
        self,
        holds: Callable[[Tensor], bool],
        *,
        candidates: Callable[[float], Tensor] | None = None,
        steps: int = 12,
        told: str = "the budget",
    ) -> Tensor:
        """The fewest channels, found by bisection over the fraction, with which `holds(doomed)`.

        Args:
            candidates: fraction -> what goes; `doomed` when left out.

        Raises:
            CompressionError: it does not hold even when all but one channel of every layer may go.
        """
        find = candidates or self.doomed
        low, high = 0.0, 1.0 - 1e-9
        best = find(high)
        if not holds(best):
            raise CompressionError(
                f"{told} is not reached by removing channels, even with the fewest that are allowed: "
                f"lower round_to={self.round_to}, choose more layers, or ask for less"
            )
        known = {tuple(best.tolist()): True}  # rounding makes many fractions the same, and holds() may take long
        for _ in range(steps):
            middle = (low + high) / 2
            trial = find(middle)
            key = tuple(trial.tolist())
            if key not in known:
                known[key] = holds(trial)
            if known[key]:
                high, best = middle, trial
            else:
                low = middle
        return best


@dataclass(frozen=True)
class Prices:
    """What a network costs after a removal, told from the sizes of its weights, without making it.

    A layer's MACs are in proportion to its weight's entries; MACs outside of layers (attention's products) count as
    they were.
    """

    channels: Channels
    cost: Cost
    entries: Mapping[str, int]  # of every parameter by its first name

    @staticmethod
    def of(model: nn.Module, channels: Channels, cost: Cost) -> Prices:
        """The prices of a model whose channels and cost are known."""
        return Prices(channels, cost, {name: p.numel() for name, p in model.named_parameters()})

    def macs(self, doomed: Tensor) -> float:
        """MACs of one sample that are left."""
        gone = self._gone(doomed)
        return sum(row.macs * self._share(f"{path}.weight", gone) for path, row in self.cost.layers.items())

    def params(self, doomed: Tensor) -> float:
        """Parameters that are left."""
        gone = self._gone(doomed)
        return sum(entries * self._share(name, gone) for name, entries in self.entries.items())

    def _gone(self, doomed: Tensor) -> Tensor:
        gone = torch.zeros(self.channels.count + 1, dtype=torch.bool)  # the last entry is for -1
        gone[doomed] = True
        return gone

    def _share(self, name: str, gone: Tensor) -> float:
        """The part of a tensor's entries that is left."""
        vectors = [self.channels.axes.get((name, dim)) for dim in (0, 1)] + [self.channels.blocks.get(name)]
        return math.prod(float((~gone[ids]).double().mean()) for ids in vectors if ids is not None)


def removable(channels: Channels, path: str) -> bool:
    """Whether the layer puts out channels of which some can be removed."""
    return path in channels.outputs and bool((channels.outputs[path] >= 0).any())


def map_flops(cost: Cost, found: Mapping[str, Site], weight: float) -> dict[str, float]:
    """`weight` times the millions of operations of one feature map of every layer, `2 HW (C k^2 + 1) / 1e6`.

    Source: Molchanov et al., ICLR 2017.
    """
    told = {}
    for path, site in found.items():
        outputs, reads = site.rows.shape
        positions = cost.layers[path].macs / max(1, outputs * reads) if path in cost.layers else 0.0
        told[path] = weight * 2 * positions * (reads + 1) / 1e6
    return told


def scores_of(
    channels: Channels,
    scores: Mapping[str, Tensor],
    coupled: Coupled,
    normalise: Normalise,
    less: Mapping[str, float] | None = None,
) -> Tensor:
    """One score per channel (count,) from scores of layer outputs; infinite where no layer has one, so that it stays.

    Args:
        less: layer -> what is taken from its scores after they were normalised.

    Raises:
        BadData: a score is NaN.
    """
    for path, values in scores.items():
        if torch.isnan(values).any():
            raise BadData(f"the scores of {path} hold NaN: check its weights and the loss of the batches behind them")
    less = less or {}
    chosen = {
        path: normalised(values, normalise) - less.get(path, 0.0)
        for path, values in scores.items()
        if removable(channels, path)
    }
    for path in scores.keys() - chosen.keys():
        skip(path, channels.pinned.get(path, "its outputs cannot be removed"))
    if not chosen:
        raise BadOption(NO_CHANNELS)
    pooled = channels.pool(chosen, coupled)
    if not pooled.isfinite().any():
        raise BadOption(
            "no layer that was chosen has a score, as is said of each: choose another score or other layers"
        )
    return torch.where(torch.isnan(pooled), torch.inf, pooled)


def check_some(gone: int, channels: Channels, round_to: int) -> None:
    """Notes how many channels went, and refuses a removal of none.

    Raises:
        CompressionError: none went.
    """
    if not gone:
        raise CompressionError(
            f"none of {channels.count} channels was removed: raise prune_ratio or lower round_to={round_to}"
        )
    note(f"{gone} of {channels.count} channels removed")
