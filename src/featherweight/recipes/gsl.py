"""Guided sparsity learning: a model of speed says which layers to prune, how far, and which to leave dense."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, final

from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.cost import cost
from featherweight.core.fit import Optimizers
from featherweight.core.forms import bake
from featherweight.core.ledger import note, skip
from featherweight.core.masks import free, hidden, settle, told, write
from featherweight.core.site import Site, sites
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task, eval_mode
from featherweight.errors import BadOption, CompressionError

BYTES = 4  # of a number


@final
@dataclass(frozen=True)
class Roofline:
    """How fast one layer would be at a density, from its work and the machine's two speeds.

    Args:
        work: floating-point operations of the dense layer, C.
        activations: bytes of what goes in and comes out, S_A.
        weights: bytes of the dense weight, S_W.
        flops: operations a second, F.
        bandwidth: bytes a second, B.
        alpha: how many times slower an operation of the sparse code is.
        beta: bytes of a sparse weight with its index, over those of a dense one.
    """

    work: float
    activations: float
    weights: float
    flops: float
    bandwidth: float
    alpha: float = 3.0
    beta: float = 2.0

    def speedup(self, density: float) -> float:
        """Time of the dense layer over that of the sparse one, whichever of computing and fetching takes longer.

        >>> Roofline(work=1e9, activations=1e5, weights=1e5, flops=1e11, bandwidth=1e10).speedup(1 / 3)
        1.0
        """
        compute = self.alpha * density * self.work / self.flops
        fetch = (self.activations + self.beta * density * self.weights) / self.bandwidth
        return (self.work / self.flops) / max(compute, fetch)

    @property
    def least(self) -> float:
        """The sparsity above which the sparse code is faster than the dense, while computing is what takes longer."""
        return 1 - 1 / self.alpha

    @property
    def most(self) -> float | None:
        """The sparsity above which fetching takes longer and pruning brings nothing; None without a useful range."""
        slope = self.alpha * self.work * self.bandwidth / self.flops - self.beta * self.weights
        density = self.activations / slope if slope > 0 else float("inf")
        return 1 - density if density < 1 / self.alpha else None

    def verdict(self, sparsity: float, *, settled: bool, last: bool) -> Literal["enough", "restore", "go on"]:
        """What to do with a layer that came to a sparsity; `last`: it can rise no more."""
        if self.most is not None and (sparsity >= self.most or (last and sparsity > self.least)):
            return "enough"
        return "restore" if sparsity <= self.least and (settled or last) else "go on"


@recipe(
    paper="Park et al., ICLR 2017, arXiv:1608.01409",
    family="prune",
    needs={"labels", "train"},
    shrinks={"weights"},
    small={"flops": 1e10, "bandwidth": 1e10, "alpha": 2.0, "penalty": 0.5, "epochs": 4, "lr": 0.05, "finetune": 1},
)
def gsl(
    model: nn.Module,
    task: Task,
    *,
    penalty: Amount = 5e-4,
    flops: Positive = 1e11,
    bandwidth: Positive = 2e10,
    alpha: Positive = 3.0,
    beta: Positive = 2.0,
    batch: Count = 1,
    epochs: Count = 16,
    every: Count = 2,
    stable: Amount = 0.01,
    finetune: Amount = 8,
    lr: Positive = 0.01,
    optimizer: Optimizers = "sgd",
    where: WhereWeighted = None,
) -> nn.Module:
    """Trains with an L1 penalty the layers that would get faster, stops where no more is to be won, restores the rest.

    Jongsoo Park, Sheng Li, Wei Wen, Ping Tak Peter Tang, Hai Li, Yiran Chen, Pradeep Dubey, "Faster CNNs with Direct
    Sparse Convolutions and Guided Pruning", ICLR 2017. With `x` the density of a layer, the sparse code takes
    `max(alpha x C / F, (S_A + beta x S_W) / B)` and the dense `C / F`: pruning pays between the sparsities
    `1 - 1/alpha` and `1 - x*`, where the two terms cross, `x* = S_A / (alpha C B / F - beta S_W)`. Layers without such
    a range are left dense. Every so many epochs, a layer above its upper bound is pruned no further, and one whose
    sparsity has settled below its lower bound gets its dense weights back. Every layer keeps a weight.

    Departs from the paper: the penalty is a proximal step after every update (soft thresholding by `lr penalty`), which
    gives exact zeros, where the paper's subgradient needs a threshold, and which weighs a tenth of a term of the loss
    under a momentum of 0.9; at the end a layer below its lower bound is restored too. F and B are options, since
    measured ones would change the result from run to run: the defaults are of the size that one core with AVX2 reaches;
    measure yours, and alpha of the sparse code that you run. What an earlier method masked stays masked.

    Args:
        penalty: strength of the L1 penalty on the weights of the layers being pruned.
        flops: floating-point operations a second, F.
        bandwidth: bytes a second from memory, B.
        alpha: how many times slower an operation of the sparse code is than one of the dense.
        beta: bytes of a sparse weight with its index, over those of a dense one: 2 for compressed sparse rows.
        batch: samples that are computed at once.
        epochs: training with the penalty.
        every: after how many epochs layers are looked at.
        stable: a sparsity that rose by no more than this since the last look has settled, no sooner than half way.
        finetune: epochs with the masks, at a tenth of the learning rate.
        lr: learning rate of the training with the penalty.
        optimizer: "sgd" (default), "momentum" or "adam".
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: the speed model leaves every layer dense.
        CompressionError: no layer came above its lower bound, so that all were restored.
    """
    found = sites(model, where)
    speeds = rooflines(
        model, task, found, partial(Roofline, flops=flops, bandwidth=bandwidth, alpha=alpha, beta=beta), batch
    )
    dense = {path: hidden(found[path]).clone() for path in speeds}
    before, pruning, pruned = dict.fromkeys(speeds, 0.0), set(speeds), dict[str, Site]()

    def shrink(progress: float) -> None:
        for path in pruning:
            write(found[path], not_empty(shrunk(hidden(found[path]), lr * penalty), hidden(found[path])))

    for start in range(0, epochs, every):
        if pruning:
            task.fit(model, task, epochs=min(every, epochs - start), lr=lr, optimizer=optimizer, decay="constant",
                     after_step=shrink, label=f"sparsify {len(pruning)} layers")  # fmt: skip
        for path in sorted(pruning):
            site, speed, sparsity = found[path], speeds[path], zeros(found[path].weight)
            settled = sparsity - before[path] <= stable and 2 * start >= epochs
            before[path] = sparsity
            match speed.verdict(sparsity, settled=settled, last=start + every >= epochs):
                case "enough":
                    site.set_mask(model, site.weight.cpu() != 0)
                    pruned[path] = site
                    pruning.remove(path)
                    note(f"{path}: {sparsity:.1%} zeros, {speed.speedup(1 - sparsity):.2f} times as fast by the model")
                case "restore":
                    write(site, dense[path])
                    pruning.remove(path)
                    skip(path, f"{sparsity:.1%} zeros make it no faster (from {speed.least:.1%} on): it is dense again")
    if not pruned:
        raise CompressionError(
            f"no layer became sparse enough to be faster: raise penalty={penalty:g} or epochs={epochs}"
        )
    settle(model, pruned)
    note(told(pruned))
    return task.fit(model, task, epochs=finetune, lr=lr / 10, optimizer=optimizer, label="fine-tune")


def rooflines(
    model: nn.Module, task: Task, found: Mapping[str, Site], machine: Callable[..., Roofline], batch: int
) -> dict[str, Roofline]:
    """The models of speed of the layers that can get faster.

    Raises:
        BadOption: there are none.
    """
    macs = cost(bake(copy.deepcopy(model)), task.inputs()).layers
    numbers, able = activations(model, task, list(found)), dict[str, Roofline]()
    for path, site in found.items():
        work, weights = 2.0 * macs[path].macs * batch, BYTES * site.weight.numel()
        speed = machine(work=work, activations=BYTES * numbers[path] * batch, weights=weights)
        if speed.most is None:
            skip(path, "fetching takes longer than computing wherever sparse code would be faster: left dense")
        elif free(site) is None:
            skip(path, "another form holds its weight: left as it is")
        else:
            able[path] = speed
    if not able:
        raise BadOption("by flops=, bandwidth= and alpha= no layer gets faster when it is pruned: pass what your "
                        "machine reaches, or choose a method that counts weights (magnitude_iterative)")  # fmt: skip
    return able


def activations(model: nn.Module, task: Task, paths: list[str]) -> dict[str, float]:
    """How many numbers go into and come out of each layer, for one sample."""
    counts = dict.fromkeys(paths, 0.0)
    args, kwargs = task.inputs()
    samples = next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim())

    def hook(path: str) -> Callable[..., None]:
        def count(module: nn.Module, seen: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
            counts[path] += ((seen[0] if seen else named["input"]).numel() + output.numel()) / samples

        return count

    handles = [model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True) for path in paths]
    try:
        with eval_mode(model):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def zeros(weight: Tensor) -> float:
    """The fraction of zeros."""
    return float((weight == 0).double().mean())


def shrunk(weight: Tensor, by: float) -> Tensor:
    """Soft thresholding, the proximal step of the L1 norm.

    >>> from torch import tensor
    >>> shrunk(tensor([1.0, -0.1]), 0.25).tolist()
    [0.75, 0.0]
    """
    return weight.sign() * (weight.abs() - by).clamp_min(0) + 0.0


def not_empty(weight: Tensor, before: Tensor) -> Tensor:
    """The weight, but the largest of before where nothing of it is left: no layer is emptied."""
    if weight.any():
        return weight
    largest = before.abs().argmax()
    return weight.flatten().index_copy(0, largest[None], before.flatten()[largest][None]).view_as(weight)
