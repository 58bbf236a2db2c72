"""Evolutionary particle filter: a population of masks of channels, resampled by their errors, crossed and mutated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.gates import Gates, gated, gates_of, remove_closed
from featherweight.core.ledger import note
from featherweight.core.noise import linear_sites
from featherweight.core.norms import RUNNING, settle_norms
from featherweight.core.surgery import WEIGHTED, WhereWeighted, targets
from featherweight.core.task import Task, eval_mode, run
from featherweight.errors import CompressionError


@recipe(
    paper="Anwar et al., ACM JETC 2017, arXiv:1512.08571",
    family="prune",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"particles": 6, "generations": 2, "finetune": 1, "batches": 1, "round_to": 1},
)
def evo_particle_filter(
    model: nn.Module,
    task: Task,
    *,
    prune_ratio: Fraction = 0.5,
    particles: Count = 50,
    generations: Count = 10,
    temperature: Positive = 0.05,
    crossover: Share = 0.5,
    mutation: Share = 0.1,
    elites: Count = 2,
    batches: Count = 8,
    finetune: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    round_to: Count = 16,
    where: WhereWeighted = None,
) -> nn.Module:
    """Searches, layer after layer, which channels to keep: masks are particles, weighted by their misclassification.

    Sajid Anwar, Kyuyeon Hwang, Wonyong Sung, "Structured Pruning of Deep Convolutional Neural Networks", ACM JETC
    13(3), 2017, arXiv:1512.08571. Of each layer (with what residual sums couple to it) a population of random masks,
    all with the same number of channels, goes through generations: weights `omega ~ exp(-error / temperature)`,
    systematic resampling, crossover of pairs, mutation that swaps kept for removed channels; the best masks pass
    unchanged. The best of all is removed, in the end the network is fine-tuned. Errors are those of one fixed part of
    the training data, batch norms taking the statistics of each batch: those of the whole network fit no masked one.

    Departs from the paper: its abstract says that particles are weighted by misclassification; how they are resampled
    and perturbed could not be verified, so that the exponential weights, resampling in every generation, the operators
    and their rates are our choice. Masks are of channels alone, not of kernels or strides. Where the metric is no rate,
    particles are weighted by their ranks.

    Args:
        prune_ratio: fraction of the channels of each layer that is removed.
        particles: masks in the population.
        generations: how often it is resampled.
        temperature: difference of errors at which weights differ by a factor of e.
        crossover: probability that a particle is crossed with another.
        mutation: probability of a swap, for each of a particle's kept (or removed, if these are fewer) channels.
        elites: how many of the best pass unchanged.
        batches: of the calibration or training data, on which errors are measured.
        finetune: passes after the removal.
        lr: learning rate of the fine-tuning.
        optimizer: "adam" (default), "adamw" or "sgd".
        round_to: wider layers keep a multiple of this many channels.
        where: layers whose outputs are pruned; all linear and convolution layers when left out.

    Raises:
        BadOption: no channel can be removed alone.
        CompressionError: prune_ratio removes no channel of any layer.
        TraceError: the network cannot be traced.
    """
    masked = masked_names(model)
    chosen = set(targets(model, where, WEIGHTED))
    layers = {path: site.module for path, site in linear_sites(model, task).items()}
    gates = gates_of(bake(model), task.inputs(), layers)
    mask_zeros(model, masked)
    closed = torch.zeros(gates.count, dtype=torch.bool)
    with measured(model, task, gates, batches) as error:
        for layer, members in populations(gates, chosen):
            keep = kept_of(len(members), prune_ratio, round_to)
            if keep == len(members):
                note(f"{layer}: of {keep} channels prune_ratio={prune_ratio:g} removes none")
                continue
            costs = partial(costs_of, error, closed, members)
            best, history = evolve(costs, len(members), keep, particles=particles, generations=generations,
                                   temperature=temperature, crossover=crossover, mutation=mutation,
                                   elites=elites)  # fmt: skip
            closed[members] = ~best
            path = f"from {history[0]:.4g} to {history[-1]:.4g}"
            note(f"{layer}: {keep} of {len(members)} channels kept, the best error went {path}")
    if not closed.any():
        raise CompressionError(
            f"prune_ratio={prune_ratio:g} removes no channel: raise it, or lower round_to={round_to}"
        )
    remove_closed(model, gates, torch.ones(gates.count), closed, torch.zeros(gates.count))
    settle_norms(model, task)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def populations(gates: Gates, chosen: set[str]) -> Iterator[tuple[str, Tensor]]:
    """The gates of the channels that go together, with the first of the chosen layers that put them out."""
    for group in gates.channels.groups:
        layers = [path for path in group.layers if path in chosen]
        members = torch.isin(gates.numbers, torch.tensor(group.channels)).nonzero().flatten()
        if layers and len(members):
            yield layers[0], members


def kept_of(width: int, ratio: float, multiple: int) -> int:
    """How many channels stay: one at least, a multiple where the layer is wider than that.

    >>> kept_of(40, 0.5, 16), kept_of(40, 0.5, 1), kept_of(10, 0.5, 16), kept_of(2, 0.9, 1)
    (32, 20, 5, 1)
    """
    kept = max(1, width - int(ratio * width + 1e-9))
    return min(width, -(-kept // multiple) * multiple) if width > multiple else kept


def costs_of(error: Callable[[Tensor], float], closed: Tensor, members: Tensor, masks: Tensor) -> Tensor:
    """The error of each mask of the members' gates (masks, members), the others being as they are."""
    found = []
    for mask in masks:
        trial = closed.clone()
        trial[members] = ~mask
        found.append(error(trial))
    return torch.tensor(found)


@contextmanager
def measured(model: nn.Module, task: Task, gates: Gates, batches: int) -> Iterator[Callable[[Tensor], float]]:
    """A function of closed gates: the error of the gated network, of one part of the data, batch norms by each batch.

    The error is the metric, or one minus it where more is better.
    """
    data, factors = list(islice(task.calibrating(), batches)), torch.ones(1, gates.count)
    norms = [m for m in model.modules() if isinstance(m, RUNNING) and m.track_running_stats]
    held = [(norm, norm.momentum, {k: v.clone() for k, v in norm._buffers.items() if v is not None}) for norm in norms]

    def error(closed: Tensor) -> float:
        factors.copy_(~closed)
        value = metric_of(task, (run(model, task, batch) for batch in data))
        return 1 - value if task.metric.higher_is_better else value

    try:
        with gated(model, gates, lambda samples, training: factors, {}), eval_mode(model):
            for norm in norms:
                norm.train()
                norm.momentum = 0.0  # this batch's statistics count, and nothing is kept of them
            yield error
    finally:
        for norm, momentum, buffers in held:
            norm.momentum = momentum
            for name, value in buffers.items():
                norm.get_buffer(name).copy_(value)


def metric_of(task: Task, outputs: Iterable[tuple[Any, Any]]) -> float:
    """The value of the metric, without an interval."""
    metric, pairs = task.metric, list(outputs)
    if metric.per_sample is None:
        return float(metric.aggregate([o for o, _ in pairs], [t for _, t in pairs]))  # type: ignore[misc]
    values = torch.cat([metric.per_sample(output, target).flatten().double().cpu() for output, target in pairs])
    return float(values.mean() if metric.aggregate is None else metric.aggregate(values))


# --- the population ---------------------------------------------------------------------------------------------------


def evolve(
    costs: Callable[[Tensor], Tensor],
    units: int,
    keep: int,
    *,
    particles: int,
    generations: int,
    temperature: float,
    crossover: float,
    mutation: float,
    elites: int,
) -> tuple[Tensor, list[float]]:
    """The best mask (units,) that was found, with `keep` units, and the best cost of every generation.

    Args:
        costs: of masks (masks, units), one each.
    """
    masks = torch.stack([torch.rand(units).argsort().argsort() < keep for _ in range(particles)])
    found = costs(masks)
    history = [float(found.min())]
    for _ in range(generations):
        best = masks[found.argsort(stable=True)[: min(elites, particles - 1)]]
        drawn = masks[systematic(likelihoods(found, temperature))]
        drawn = drawn[torch.randperm(particles)]
        partners = drawn.roll(1, 0)
        bred = [crossed(a, b) if torch.rand(()) < crossover else a for a, b in zip(drawn, partners, strict=True)]
        bred = [mutated(mask, mutation) for mask in bred]
        masks = torch.cat([best, torch.stack(bred)[: particles - len(best)]])
        found = costs(masks)
        history.append(float(found.min()))
    return masks[found.argmin()], history


def likelihoods(costs: Tensor, temperature: float) -> Tensor:
    """Normalised weights `exp(-cost / temperature)`; of costs that are no rates, of their ranks between 0 and 1."""
    if costs.min() < 0 or costs.max() > 1 or not costs.isfinite().all():
        costs = costs.nan_to_num(torch.inf).argsort(stable=True).argsort() / max(1, len(costs) - 1)
    return torch.softmax(-costs.double() / temperature, 0)


def systematic(weights: Tensor) -> Tensor:
    """Indices drawn by weights, as many as there are: each as often as its share says, up to one more or less."""
    edges = (torch.arange(len(weights), dtype=torch.float64) + torch.rand((), dtype=torch.float64)) / len(weights)
    return torch.searchsorted(weights.cumsum(0), edges).clamp_max(len(weights) - 1)


def crossed(a: Tensor, b: Tensor) -> Tensor:
    """A mask of as many units as both have: those that both keep, and of the others that one keeps a random choice."""
    child, open_ = a & b, (a ^ b).nonzero().flatten()
    child[open_[torch.randperm(len(open_))[: int(a.sum() - child.sum())]]] = True
    return child


def mutated(mask: Tensor, rate: float) -> Tensor:
    """The mask with kept units swapped for removed ones, each of the fewer with this probability."""
    kept, gone = mask.nonzero().flatten(), (~mask).nonzero().flatten()
    swaps = int((torch.rand(min(len(kept), len(gone))) < rate).sum())
    child = mask.clone()
    child[kept[torch.randperm(len(kept))[:swaps]]] = False
    child[gone[torch.randperm(len(gone))[:swaps]]] = True
    return child
