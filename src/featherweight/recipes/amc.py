"""AMC: an agent goes through the layers, says how much of each stays, and learns from what the network is then worth.

Yihui He, Ji Lin, Zhijian Liu, Hanrui Wang, Li-Jia Li, Song Han, "AMC: AutoML for model compression and acceleration on
mobile devices", ECCV 2018, arXiv:1802.03494. An episode goes once through all layers. Layer `t` shows the state
`(t, n, c, h, w, stride, k, FLOPs_t, reduced, rest, a_{t-1})`, each number scaled to 0..1 over the layers; the action
`a_t` is the fraction of its channels that stays. To end within the budget `B` whatever comes, it is bounded:
`a_t <= (B - other_min) / this_comp`, the layers to come taken at their lower bound. Channels with the smallest sum of
`|W|` over what reads them go, the layers that read them are refitted by least squares to their original outputs, and
the network is evaluated without training. The reward is the accuracy or, to trade it against the cost,
`R = -error log(MACs)`. The agent is DDPG with noise that shrinks (`core/ddpg.py`).

Departs from the paper: the fraction is of the channels that a layer puts out, and layers that share channels (those of
a residual sum) have one action; the bound is computed from the exact cost of the whole network, which is bilinear in
neighbouring widths, and rounds down where it binds; all linear and convolution layers are refitted, where the paper
says it of 1x1 convolutions, from 10 positions a sample; a training batch that augments stays as it was drawn once; the
search is on `search_batches` training batches, where the paper holds 5,000 training images out of later training. What
an agent finds differs from seed to seed, as in the paper: run several.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive, Share
from featherweight.budget import parse
from featherweight.catalogue import recipe
from featherweight.core.capture import observe
from featherweight.core.channels import Channels, Group, channel_groups, remove_channels
from featherweight.core.cost import Cost, cost
from featherweight.core.ddpg import Ddpg
from featherweight.core.fit import Optimizers
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.ledger import note, skip
from featherweight.core.progress import track
from featherweight.core.reconstruct import MEMORY, Moments, augmented, layer_rows, put, refusal
from featherweight.core.site import sites
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Batch, Task, evaluate, first
from featherweight.core.widths import NO_CHANNELS, Prices, rounded
from featherweight.errors import BadOption, CompressionError

Reward = Literal["metric", "log_macs", "log_params"]


def bounds_one(options: Mapping[str, Any]) -> None:
    """Refuses a budget that cannot be told of widths alone."""
    limits = parse(options["budget"])
    if len(limits) != 1 or limits[0].quantity not in ("macs", "params"):
        raise BadOption(
            f"budget={options['budget']!r}: amc keeps every episode within macs or params, name one limit; for a "
            "latency choose netadapt"
        )


@recipe(
    paper="He et al., ECCV 2018, arXiv:1802.03494",
    family="prune",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={
        "budget": "macs<=0.7x",
        "episodes": 4,
        "warmup": 2,
        "hidden": 8,
        "search_batches": 1,
        "calibration_batches": 1,
        "finetune": 1,
        "round_to": 1,
    },
    rules=(bounds_one,),
)
def amc(
    model: nn.Module,
    task: Task,
    *,
    budget: str = "macs<=0.5x",
    reward: Reward = "metric",
    episodes: Count = 800,
    warmup: Count = 100,
    least: Fraction = 0.2,
    noise: Positive = 0.5,
    noise_decay: Share = 0.95,
    hidden: Count = 300,
    search_batches: Count = 40,
    calibration_batches: Count = 60,
    ridge: Amount = 1e-4,
    finetune: Amount = 10,
    lr: Positive = 0.01,
    optimizer: Optimizers = "sgd",
    round_to: Count = 16,
    where: WhereWeighted = None,
) -> nn.Module:
    """Searches widths within a budget by reinforcement learning, without training, and fine-tunes the best.

    Args:
        budget: what every episode holds, such as "macs<=0.5x" or "params<=100k".
        reward: "metric" on the search data; or "log_macs" or "log_params": minus the error times the logarithm of what
            is left, which goes on saving below the budget where that costs little.
        episodes: networks that are tried.
        warmup: of these, the first so many draw their actions evenly.
        least: the smallest fraction of its channels that any layer keeps.
        noise: deviation of the noise on the actions after the warm-up, truncated to the allowed range.
        noise_decay: what it is multiplied by after every episode.
        hidden: units of the hidden layers of actor and critic.
        search_batches: training batches on which every network is evaluated.
        calibration_batches: batches from which layers are refitted; more than there are takes all.
        ridge: strength of the pull towards the old weights in the refit, relative to the inputs' energy.
        finetune: epochs of training what was found.
        lr: its learning rate, falling to zero.
        optimizer: "adam", "adamw" or "sgd" (default).
        round_to: wider layers keep a multiple of this many channels; 1 for any number.
        where: which layers may lose channels.

    Raises:
        BadOption: a budget that is not one of macs and params.
        CompressionError: the budget is below what the smallest widths cost.
    """
    masked = masked_names(model)
    limit = parse(budget)[0]
    original = copy.deepcopy(bake(model))
    counted = cost(original, task.inputs())
    layout = Layout.of(original, task, counted, where, least=least, round_to=round_to)
    before = {"macs": float(counted.macs), "params": float(counted.params)}
    refits = Refits.of(original, task, layout.channels, calibration_batches, ridge, {path for path, _ in masked})
    searching = Task(valid=_kept(task, search_batches), split=task.split, metric=task.metric, evaluate=task.evaluate)

    def network(choice: Sequence[int]) -> nn.Module:
        return refits.without(layout.doomed(choice))

    def worth(choice: Sequence[int]) -> float:
        value = evaluate(network(choice), searching, label="evaluate an episode").value
        return rewarded(reward, value, layout.left(choice), higher_is_better=task.metric.higher_is_better)

    env = Environment(
        layout.features, layout.keeps, lambda choice: layout.left(choice)[limit.quantity], worth, limit.allowed(before)
    )
    agent = Ddpg(len(env.state(0, [])), hidden=hidden, memory=100 * len(layout.keeps))
    found = list(
        search(env, agent, episodes=episodes, warmup=warmup, least=least, noise=noise, noise_decay=noise_decay)
    )
    best = max(found, key=lambda episode: episode.reward)
    kept = ", ".join(
        f"{p[0]} {keeps[i]:.2f}" for p, keeps, i in zip(layout.names, layout.keeps, best.choice, strict=True)
    )
    note(f"best of {episodes} episodes: reward {best.reward:.4f}, {limit.quantity} "
         f"{best.cost / before[limit.quantity]:.3f}x; kept: {kept}")  # fmt: skip
    model = network(best.choice)
    mask_zeros(model, masked)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def _kept(task: Task, count: int) -> list[Batch]:
    """The first training batches, as they come this once."""
    return list(islice(task.train or (), count))


def rewarded(reward: Reward, value: float, left: Mapping[str, float], *, higher_is_better: bool = True) -> float:
    """The reward of a network, from its metric and what is left of it.

    >>> rewarded("log_macs", 0.9, {"macs": math.e**2, "params": 1.0})
    -0.19999999999999996
    """
    if reward == "metric":
        return value if higher_is_better else -value
    error = 1 - value if higher_is_better else value
    return -error * math.log(left[reward.removeprefix("log_")])


# --- the search -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """Layers one after the other, each with the fractions that may stay, from all to the least; a cost and a worth.

    Args:
        features: what is known of each layer beforehand, (layers, features).
        keeps: of every layer, the fractions of its channels that may stay, falling from 1.
        cost: (place in `keeps` of every layer) -> what it costs; the more is removed the less.
        worth: the same -> the reward.
        budget: what every episode may cost.
    """

    features: Tensor
    keeps: Sequence[Sequence[float]]
    cost: Callable[[Sequence[int]], float]
    worth: Callable[[Sequence[int]], float]
    budget: float

    def smallest(self, chosen: Sequence[int]) -> list[int]:
        """The choices so far, and the least of every layer to come."""
        return [*chosen, *(len(keeps) - 1 for keeps in self.keeps[len(chosen) :])]

    def widest(self, chosen: Sequence[int]) -> list[int]:
        """The choices so far, and all of every layer to come."""
        return [*chosen, *(0 for _ in self.keeps[len(chosen) :])]

    def wall(self, chosen: Sequence[int]) -> int:
        """The first place of the next layer with which the budget can still be held."""
        places = range(len(self.keeps[len(chosen)]))
        return bisect_left(places, True, key=lambda i: self.cost(self.smallest([*chosen, i])) <= self.budget)

    def place(self, chosen: Sequence[int], action: float) -> int:
        """What an action means in the next layer: its fraction rounded up, or the wall."""
        keeps = self.keeps[len(chosen)]
        wanted = bisect_left(range(len(keeps)), True, key=lambda i: keeps[i] < action - 1e-9) - 1
        return max(wanted, self.wall(chosen))

    def state(self, layer: int, chosen: Sequence[int]) -> Tensor:
        """The layer's features, what was saved before it, what is to come (both of the whole), and the last action."""
        whole, rest = self.cost(self.widest([])), self.widest(chosen)
        saved = 1 - self.cost(rest) / whole
        coming = 1 - self.cost(self.smallest(chosen)) / self.cost(rest)
        last = self.keeps[layer - 1][chosen[-1]] if chosen else 1.0
        return torch.cat([self.features[layer].float(), torch.tensor([saved, coming, last])])


@dataclass(frozen=True)
class Episode:
    """One way through all layers."""

    choice: tuple[int, ...]
    cost: float
    reward: float


def search(
    env: Environment,
    agent: Ddpg,
    *,
    episodes: int,
    warmup: int,
    least: float,
    noise: float = 0.5,
    noise_decay: float = 0.95,
) -> Iterator[Episode]:
    """The episodes, each within the budget; the agent learns after the warm-up, one update a transition.

    Raises:
        CompressionError: no episode could hold the budget.
    """
    floor = env.cost(env.smallest([]))
    if floor > env.budget:
        raise CompressionError(
            f"the budget of {env.budget:.4g} is below {floor:.4g}, what the smallest widths cost: lower "
            f"least={least:g} or round_to, choose more layers, or ask for less"
        )
    known: dict[tuple[int, ...], float] = {}
    for number in track(range(episodes), "search", episodes):
        chosen: list[int] = []
        path: list[tuple[Tensor, float]] = []
        for layer in range(len(env.keeps)):
            state = env.state(layer, chosen)
            if number < warmup:
                action = least + (1 - least) * float(torch.rand(()))
            else:
                action = agent.act(state, noise * noise_decay ** (number - warmup), least)
            chosen.append(env.place(chosen, action))
            path.append((state, action))
        choice = tuple(chosen)
        if choice not in known:
            known[choice] = env.worth(choice)
        agent.remember(path, known[choice])
        for _ in path if number >= warmup else ():
            agent.learn()
        yield Episode(choice, env.cost(choice), known[choice])


# --- the network ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The groups of layers that lose channels together, what each may lose, and what is left without it."""

    channels: Channels
    prices: Prices
    names: list[tuple[str, ...]]
    keeps: list[list[float]]
    removals: list[list[Tensor]]  # of every group, channels for each of its fractions
    features: Tensor

    @staticmethod
    def of(model: nn.Module, task: Task, counted: Cost, where: Any, *, least: float, round_to: int) -> Layout:
        """Read off a network as it is.

        Raises:
            BadOption: no channel can be removed.
        """
        channels = channel_groups(model, task.inputs())
        scores, chosen = read_norms(model, channels), sites(model, where)
        for path in chosen.keys() - {p for p, ids in channels.outputs.items() if (ids >= 0).any()}:
            skip(path, channels.pinned.get(path, "its outputs cannot be removed"))
        groups = [group for group in channels.groups if any(path in chosen for path in group.layers)]
        if not groups:
            raise BadOption(NO_CHANNELS)
        names, keeps, removals = [], [], []
        for group in groups:
            menu = _menu(channels, group, scores, least, round_to)
            names.append(tuple(path for path in group.layers if path in chosen))
            removals.append(menu)
            keeps.append([1 - len(doomed) / len(group.channels) for doomed in menu])
        features = _features(model, task, counted, [name[0] for name in names])
        return Layout(channels, Prices.of(model, channels, counted), names, keeps, removals, features)

    def doomed(self, choice: Sequence[int]) -> Tensor:
        """The channels that go."""
        gone = torch.cat([menu[place] for menu, place in zip(self.removals, choice, strict=True)])
        return self.channels.legal(gone) if self.channels.equal else gone

    def left(self, choice: Sequence[int]) -> dict[str, float]:
        """MACs and parameters without them."""
        doomed = self.doomed(choice)
        return {"macs": self.prices.macs(doomed), "params": self.prices.params(doomed)}


def read_norms(model: nn.Module, channels: Channels) -> Tensor:
    """For every channel the sum of `|W|` over all entries that read it, (count,)."""
    total = torch.zeros(channels.count + 1, dtype=torch.float64)
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        ids = channels.inputs.get(path)
        if ids is None or not isinstance(weight, Tensor) or weight.dim() < 2:
            continue
        along = 0 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 1
        sums = weight.detach().abs().double().transpose(0, along).flatten(1).sum(1).cpu()
        if len(sums) == len(ids):  # grouped convolutions read by blocks: their outputs' other readers decide
            total.index_add_(0, torch.where(ids < 0, channels.count, ids), sums)
    return total[:-1]


def _menu(channels: Channels, group: Group, scores: Tensor, least: float, round_to: int) -> list[Tensor]:
    """What the group may lose: nothing, and ever more of the channels that are read least, to the least that stays."""
    ids = torch.tensor(group.channels)
    order = ids[scores[ids].argsort(stable=True)]
    most = min(len(order) - 1, int((1 - least) * len(order) + 1e-9))
    found = [torch.empty(0, dtype=torch.long)]
    for count in range(1, most + 1):
        doomed = rounded(channels, order[:count], round_to)
        if len(doomed) > len(found[-1]):
            found.append(doomed)
    return found


def _features(model: nn.Module, task: Task, counted: Cost, paths: Sequence[str]) -> Tensor:
    """(t, n, c, h, w, stride, k, FLOPs) of every layer, each scaled to 0..1 over the layers."""
    shapes: dict[str, tuple[int, ...]] = {}

    def see(path: str, value: Tensor) -> None:
        shapes[path] = tuple(value.shape[2:]) if isinstance(model.get_submodule(path), nn.Conv2d) else (1, 1)

    observe(model, list(paths), task, [first(task.valid, "valid")], see)
    rows = []
    for t, path in enumerate(paths):
        module: Any = model.get_submodule(path)
        stride, kernel = (getattr(module, key, (1,))[0] for key in ("stride", "kernel_size"))
        weight = module.weight
        h, w = (*shapes.get(path, ()), 1, 1)[:2]
        flops = counted.layers[path].macs if path in counted.layers else 0
        rows.append([t, weight.shape[0], weight.shape[1], h, w, stride, kernel, flops])
    table = torch.tensor(rows, dtype=torch.float64)
    low, high = table.amin(0), table.amax(0)
    return torch.where(high > low, (table - low) / (high - low).clamp_min(1e-12), 0.0)


@dataclass(frozen=True)
class Refits:
    """A network with the sums from which the layers that read removed channels are refitted."""

    model: nn.Module
    channels: Channels
    moments: Mapping[str, Moments]
    ridge: float
    masked: Set[str] = frozenset()  # layers whose zeros stay

    @staticmethod
    def of(
        model: nn.Module, task: Task, channels: Channels, batches: int, ridge: float, masked: Set[str] = frozenset()
    ) -> Refits:
        """Goes through the calibration data once a layer."""
        held, found = 0, {}
        kept = list(islice(task.calibrating(), batches))
        readers = [path for path, ids in channels.inputs.items() if (ids >= 0).any()]
        for path in track(readers, "calibrate", len(readers)):
            layer = model.get_submodule(path)
            size = 8 * (layer.weight[0].numel() + 1) ** 2  # type: ignore[index]
            reason = refusal(layer) or ("" if held + size <= MEMORY else "the sums of all layers would take over 1 GiB")
            if reason:
                note(f"{path} is not refitted: {reason}")
                continue
            held += size
            found[path] = Moments.of(layer_rows(model, path, task, kept))
        return Refits(model, channels, found, ridge, masked)

    def without(self, doomed: Tensor) -> nn.Module:
        """A copy without the channels, its readers refitted to their original outputs."""
        smaller = copy.deepcopy(self.model)
        for path, moments in self.moments.items():
            layer = smaller.get_submodule(path)
            ids = self.channels.inputs[path]
            gone = torch.isin(ids, doomed).repeat_interleave((len(moments.xx) - 1) // len(ids))
            if gone.any():
                biased = torch.tensor([isinstance(layer.bias, Tensor)])
                weight = augmented(layer)
                weight[:, :-1][:, gone] = 0
                moving = torch.cat([~gone, biased])
                put(layer, moments.refit(weight, moving & (weight != 0) if path in self.masked else moving, self.ridge))
        return remove_channels(smaller, doomed, channels=self.channels)
