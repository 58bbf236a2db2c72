"""Filter-based deep compression: a pooled head in place of linear layers, filters by what they save for their loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, final

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive, Share
from featherweight.catalogue import Slot, fill, recipe
from featherweight.core.channels import Channels, channel_groups, remove_channels
from featherweight.core.cost import cost
from featherweight.core.fit import Optimizers
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.ledger import note
from featherweight.core.restart import Carried
from featherweight.core.site import sites
from featherweight.core.study import Study
from featherweight.core.surgery import WhereWeighted, swap
from featherweight.core.task import Task, eval_mode
from featherweight.core.widths import Prices, check_some, rounded, scores_of, smallest
from featherweight.errors import CompressionError
from featherweight.prune import Score, studied


@recipe(
    paper="Hsiao et al., Journal of Systems Architecture 95, 2019",
    family="prune",
    needs={"labels", "train"},
    shrinks={"channels"},
    aliases=("hsiao_filter_deep_compression",),
    small={"rounds": 2, "epochs": 1, "finetune": 1, "round_to": 1, "calibration_batches": 2},
)
def gap_filter_compression(
    model: nn.Module,
    task: Task,
    *,
    prune_ratio: Fraction = 0.5,
    step: Fraction = 0.125,
    score: Annotated[str, Slot("score")] | Score = "filter_norm",
    pool_head: bool = True,
    head_epochs: Amount = 5,
    energy: Share = 0.95,
    rounds: Count = 8,
    epochs: Amount = 8,
    finetune: Amount = 8,
    lr: Positive = 1e-3,
    optimizer: Optimizers = "sgd",
    round_to: Count = 16,
    calibration_batches: Count = 8,
    where: WhereWeighted = None,
) -> nn.Module:
    """Pools the features in place of a stack of linear layers, then removes filters where most is saved for the loss.

    Hsiao, Chang, Chou, Chiu, "Filter-based deep-compression with global average pooling for convolutional networks",
    Journal of Systems Architecture 95, 2019: the linear layers behind the convolutions, most of the weights of early
    networks, give way to global average pooling and one linear layer; filters are removed step by step, in an order
    of layers that a scheme decides; what linear layer is left is truncated by its singular values.

    In every round each group of coupled layers offers its lowest-scoring channels, as many as `step` says; the rise
    of the loss without them is measured with gates, and the offers are taken in the order of multiplications saved
    per rise until the round's share is gone. Then the network is trained.

    Departs from the paper: only its abstract was at hand, so the criterion within a layer (the l1 norm), the scheme
    that orders the layers and all defaults are ours; the quantization that ends it there is a method of its own here:
    chain `int8` or `kmeans_share` behind this one. The classifier keeps its single linear layer. Kept channels are
    rounded up to whole vectors.

    Args:
        prune_ratio: fraction of the channels removed, of all layers together.
        step: fraction of its channels that a group of coupled layers offers at a time, at least one or `round_to`.
        score: an ingredient that ranks the channels within a layer; the lowest are offered.
        pool_head: put global average pooling in the place of a stack of linear layers, or of one on a flattened map.
        head_epochs: training of the network behind that replacement.
        energy: share of the squared singular values of the last linear layer that is kept, where that saves weights; 1
            leaves it as it is.
        rounds: how often channels are removed.
        epochs: retraining in total, the same after every round.
        finetune: further epochs after the last round, the learning rate falling to zero.
        lr: learning rate of all trainings.
        optimizer: "sgd" (default), "adam" or "adamw".
        round_to: wider layers keep a multiple of this many channels; 1 removes exactly the fraction.
        calibration_batches: batches on which the rise of the loss is measured.
        where: which layers lose channels; all linear and convolution layers when left out.

    Raises:
        BadOption: no layer that was chosen has channels that can be removed.
        CompressionError: the head is computed by code that cannot be exchanged, or rounding left nothing to remove.
    """
    score = fill("score", score)
    if pool_head and head_to_gap(model, task):
        task.fit(model, task, epochs=head_epochs, lr=lr, optimizer=optimizer, label="train the pooled head")
    chosen = Cheapest(task, score, step, round_to, calibration_batches, where, Carried(optimizer))
    masked = masked_names(model)
    channels, gone = channel_groups(bake(model), task.inputs()), 0
    mask_zeros(model, masked)
    for turn in range(1, rounds + 1):
        goal = int(prune_ratio * channels.count * turn / rounds + 1e-9)
        while gone < goal and (now := chosen.remove(model, goal - gone)):
            gone += now
        if epochs:
            last = turn == rounds and not finetune
            task.fit(model, task, epochs=epochs / rounds, lr=lr, optimizer=chosen.carried,
                     decay="cosine" if last else "constant",
                     label=f"retrain {turn}/{rounds} {gone} of {channels.count} channels removed")  # fmt: skip
    check_some(gone, channels, round_to)
    truncate_last(model, task, energy)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


# --- the head --------------------------------------------------------------------------------------------------------


def head_to_gap(model: nn.Module, task: Task) -> bool:
    """Puts pooling and one linear layer in place of what stands behind the last convolution; whether there was a need.

    Raises:
        CompressionError: something that is no module of its own is done between the linear layers.
    """
    order = Study(model, task, [], 1).order()
    convolutions = [path for path in order if not isinstance(model.get_submodule(path), nn.Linear)]
    head = order[order.index(convolutions[-1]) + 1 :] if convolutions else []
    if not head:
        note("the head is no stack of linear layers behind convolutions: it stays")
        return False
    maps = _width(model.get_submodule(convolutions[-1]))
    first, last = (model.get_submodule(path) for path in (head[0], head[-1]))
    if len(head) == 1 and first.in_features == maps:
        note("the head pools already, and has a single linear layer: it stays")
        return False
    if int(first.in_features) % maps:  # type: ignore[arg-type]  # torch types attributes so
        raise CompressionError(f"{head[0]} reads {first.in_features} values of {maps} maps, no whole number each: pass "
                               "pool_head=False")  # fmt: skip
    pooled = nn.Sequential(
        nn.AvgPool1d(int(first.in_features) // maps),  # type: ignore[arg-type]  # of flattened maps: one window each
        nn.Linear(maps, _width(last)),
    ).to(next(model.parameters()).device)
    _exchange(model, task, head, pooled)
    note(f"{', '.join(head)} gave way to global average pooling and one linear layer")
    return True


def _width(layer: nn.Module) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def _exchange(model: nn.Module, task: Task, head: Sequence[str], pooled: nn.Module) -> None:
    """Swaps the first layer of the head, and lets what is called from there to its last do nothing."""
    between = _called_between(model, task, head[0], head[-1])
    twin, seen = copy.deepcopy(model), []
    for path in (head[0], *between):
        swap(twin, path, pooled if path == head[0] else nn.Identity())
    last = twin.get_submodule(head[-1])
    args, kwargs = task.inputs()
    with eval_mode(twin), ExitStack() as hooks:
        for module in (pooled, last):
            hooks.enter_context(module.register_forward_hook(lambda module, args, output: seen.append(output)))
        twin(*args, **kwargs)
    if len(seen) != 2 or not torch.equal(*seen):
        raise CompressionError(
            f"what stands between {head[0]} and {head[-1]} is partly written in code and not made of modules, so that "
            "it cannot be exchanged: pass pool_head=False"
        )
    for path in (head[0], *between):
        swap(model, path, pooled if path == head[0] else nn.Identity())


def _called_between(model: nn.Module, task: Task, first: str, last: str) -> list[str]:
    """Modules without children that are called behind the first, up to the last, and nowhere else."""
    leaves = {path: m for path, m in model.named_modules() if not list(m.children())}
    called: list[str] = []

    def told(path: str) -> Callable[..., None]:
        return lambda module, args, output: called.append(path)

    args, kwargs = task.inputs()
    with eval_mode(model), ExitStack() as hooks:
        for path, module in leaves.items():
            hooks.enter_context(module.register_forward_hook(told(path)))
        model(*args, **kwargs)
    start, end = called.index(first), called.index(last)
    return [path for path in called[start + 1 : end + 1] if called.count(path) == 1]


def truncate_last(model: nn.Module, task: Task, energy: float) -> None:
    """Factorizes the last layer, if it is linear, at the least rank that keeps `energy`, if that saves weights."""
    path = Study(model, task, [], 1).order()[-1]
    layer = model.get_submodule(path)
    if not isinstance(layer, nn.Linear) or energy == 1:
        return
    u, s, vt = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
    kept = s.square().cumsum(0) / s.square().sum()
    rank = min(int((kept < energy).sum()) + 1, len(s))
    inputs, outputs = layer.in_features, layer.out_features
    if rank * (inputs + outputs) >= inputs * outputs:
        note(f"{path}: {energy:.0%} of its energy takes rank {rank} of {len(s)}, which saves no weights: it stays")
        return
    down, up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=layer.bias is not None)
    with torch.no_grad():
        down.weight.copy_(s[:rank, None].sqrt() * vt[:rank])
        up.weight.copy_(u[:, :rank] * s[:rank].sqrt())
        if layer.bias is not None:
            up.bias.copy_(layer.bias)
    swap(model, path, nn.Sequential(down, up).to(layer.weight))
    note(f"{path}: rank {rank} of {len(s)} keeps {energy:.0%} of its energy")


# --- the filters -----------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Cheapest:
    """Removes what saves most for the loss."""

    task: Task
    score: Score
    step: float
    round_to: int
    batches: int
    where: WhereWeighted
    carried: Carried

    def remove(self, model: nn.Module, most: int) -> int:
        """Takes the offers of all groups in their order, `most` channels in total; returns how many went."""
        masked = masked_names(model)
        channels = channel_groups(bake(model), self.task.inputs())
        found = studied(model, self.task, sites(model, self.where), self.batches, grain="filter", channels=channels)
        scores = scores_of(channels, {path: self.score(site) for path, site in found.items()}, "sum", "none")
        doomed = torch.empty(0, dtype=torch.long)
        prices = Prices.of(model, channels, cost(model, self.task.inputs()))
        for offer in by_saving_per_rise(next(iter(found.values())).data, prices, self.offers(channels, scores)):
            doomed = torch.cat([doomed, offer[: max(0, most - len(doomed))]])
        doomed = rounded(channels, doomed, self.round_to)
        remove_channels(model, doomed, channels=channels, optimizer=self.carried.held)
        mask_zeros(model, masked)
        return len(doomed)

    def offers(self, channels: Channels, scores: Tensor) -> list[Tensor]:
        """The lowest-scoring channels of every group of coupled layers, a step of them, as can be removed."""
        groups = [torch.tensor(group.channels) for group in channels.groups]
        chosen = [members for members in groups if scores[members].isfinite().any()]
        lowest = [members[_lowest(scores[members], self.step, self.round_to)] for members in chosen]
        return [offer for offer in (rounded(channels, one, self.round_to) for one in lowest) if len(offer)]


def _lowest(scores: Tensor, step: float, round_to: int) -> Tensor:
    """Places of a group's lowest scores: a step of them, but as many as a removal must have at least."""
    least = round_to if len(scores) > round_to else 1
    return smallest(scores, min(max(step, least / len(scores) + 1e-9), 1 - 1e-9))


def by_saving_per_rise(study: Study, prices: Prices, offers: Sequence[Tensor]) -> list[Tensor]:
    """The offers in the order of multiplications saved per rise of the loss; the dearest that lower it first."""
    order, whole = set(study.order()), study.loss()
    none = prices.macs(torch.empty(0, dtype=torch.long))

    def worth(offer: Tensor) -> tuple[float, float]:
        outputs = {path: ids for path, ids in study.channels().outputs.items() if path in order}
        gates = {path: (~torch.isin(ids, offer)).float() for path, ids in outputs.items()}
        with study.gated({path: gate for path, gate in gates.items() if not gate.all()}):
            rise = study.loss() - whole
        saved = none - prices.macs(offer)
        return (saved / rise if rise > 0 else math.inf), saved

    return sorted(offers, key=worth, reverse=True)
