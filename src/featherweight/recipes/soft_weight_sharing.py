"""Soft weight-sharing: weights train under a mixture of Gaussians that learns with them, then become its means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, final

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.checkpoint import checkpoint

from featherweight.allowed import Amount, Positive
from featherweight.catalogue import recipe
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.ledger import note
from featherweight.core.site import Site, sites
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Batch, Task, loss_of, run
from featherweight.errors import BadData, CompressionError, MissingNeed
from featherweight.share import share

SPAN, SPREAD = 0.6, 0.25
"""Where the paper's means start, from -SPAN to SPAN, and the deviation that all components start with."""
ZERO, OTHERS = (5e3, 2.0), (2.5e2, 0.1)
"""Shape and rate of the Gamma priors on precisions: of the zero component, of the others, for means within SPAN."""
CHUNK = 2**18  # weights whose responsibilities are held at a time

Components = Annotated[int, Interval(ge=2, le=256)]
ZeroShare = Annotated[float, Interval(gt=0, lt=1)]


@final
class Mixture(nn.Module):
    """`p(w) = sum_j pi_j N(w; mu_j, 1 / lambda_j)`; mu_0 = 0 and pi_0 are fixed, all else learns; log scales in nats.

    Args:
        span: the largest weight that counts; all numbers of the paper are for 0.6, and are scaled to it.
    """

    def __init__(self, components: int, zero_share: float, span: float) -> None:
        super().__init__()
        self.scale, self.zero_share = span / SPAN, zero_share
        self.means = nn.Parameter(torch.linspace(-span, span, components - 1))
        self.log_precision = nn.Parameter(torch.full((components,), -2 * math.log(SPREAD * self.scale)))
        self.log_mixing = nn.Parameter(torch.zeros(components - 1))

    @property
    def mu(self) -> Tensor:
        """The means (J,), the first of them zero."""
        return torch.cat([self.means.new_zeros(1), self.means])

    @property
    def log_pi(self) -> Tensor:
        """The logarithms of the mixing proportions (J,)."""
        first = self.means.new_full((1,), math.log(self.zero_share))
        return torch.cat([first, math.log1p(-self.zero_share) + self.log_mixing.log_softmax(0)])

    def joint(self, weight: Tensor) -> Tensor:
        """`log pi_j N(w; mu_j, 1 / lambda_j)` of weights (n,), shape (n, J)."""
        gap = (weight[:, None] - self.mu).square() * self.log_precision.exp()
        return self.log_pi + 0.5 * (self.log_precision - math.log(2 * math.pi) - gap)

    def complexity(self, weight: Tensor) -> Tensor:
        """`-sum_i log p(w_i)`, in nats."""
        total = [checkpoint(self._complexity, part, use_reentrant=False) for part in weight.flatten().split(CHUNK)]
        return torch.stack(total).sum()

    def _complexity(self, weight: Tensor) -> Tensor:
        return -self.joint(weight).logsumexp(1).sum()

    def hyperprior(self) -> Tensor:
        """Minus the logarithm of the Gamma priors on the precisions, but for constants: `(1 - a) log t + b t`."""
        count = len(self.log_precision)
        a = self.means.new_tensor([ZERO[0], *[OTHERS[0]] * (count - 1)])
        b = self.means.new_tensor([ZERO[1], *[OTHERS[1]] * (count - 1)]) * self.scale**2
        return ((1 - a) * self.log_precision + b * self.log_precision.exp()).sum()


@recipe(
    paper="Ullrich, Meeds and Welling, ICLR 2017, arXiv:1702.04008",
    family="quantize",
    needs={"labels", "train"},
    shrinks={"weights", "bits"},
    aliases=("soft_weight_sharing_prune",),
    small={"epochs": 10, "zero_share": 0.5, "precision_lr": 0.2, "mean_lr": 0.02},
)
def soft_weight_sharing(
    model: nn.Module,
    task: Task,
    *,
    tau: Amount = 0.005,
    components: Components = 16,
    zero_share: ZeroShare = 0.99,
    span: Positive | None = None,
    merge: Amount = 0.01,
    epochs: Amount = 30,
    lr: Positive = 5e-4,
    mean_lr: Positive = 1e-4,
    precision_lr: Positive = 3e-3,
    mixing_lr: Positive = 3e-3,
    where: WhereWeighted = None,
) -> nn.Module:
    """Retrains under a mixture prior on all weights, whose components become narrow, then snaps weights to its means.

    Karen Ullrich, Edward Meeds, Max Welling, "Soft Weight-Sharing for Neural Network Compression", ICLR 2017,
    arXiv:1702.04008, after Nowlan and Hinton, 1992. Minimises `sum of the examples' losses + tau (-log p(w) - log
    p(lambda))`, here divided by the number N of training examples: `mean loss + tau / N (...)`. The first component
    stays at zero with a fixed, large proportion; Gamma priors keep precisions from growing without end. After training
    components that hardly differ are merged, the one nearest to zero becomes zero, and each weight takes the mean of
    the component that most probably made it. One mixture serves all layers.

    Departs from the paper: the means start over the range of the given network's weights, and deviations, priors and
    the means' learning rate, which are made for weights within 0.6, are scaled to it (`span=0.6` is the paper's);
    biases and norms are not in the prior; learning rates fall to zero. Weights that a mask holds at zero are not in it
    either, and stay zero. The table of means is simulated: storage only; a runtime that looks weights up would run it.

    Args:
        tau: weight of the prior; the paper's 0.003 to 0.005.
        components: of the mixture, the zero one included.
        zero_share: the fixed proportion of the zero component.
        span: where the means start, from -span to span; the size of the largest weight when left out.
        merge: components whose symmetric Kullback-Leibler divergence is below this become one.
        epochs: retraining under the prior.
        lr: learning rate of the network, with Adam.
        mean_lr: learning rate of the means.
        precision_lr: learning rate of the logarithms of the precisions.
        mixing_lr: learning rate of the logarithms of the proportions.
        where: which layers; all linear and convolution layers when left out.

    Raises:
        UnknownName: a pattern matches nothing.
        CompressionError: all weights became zero.
    """
    masked = masked_names(model)
    bake(model)
    mask_zeros(model, masked)
    found, examples = sites(model, where), examples_of(task)
    mixture = Mixture(components, zero_share, span or largest(found)).to(next(iter(found.values())).weight)

    def step(network: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        output, target = run(network, task, batch)
        prior = sum((mixture.complexity(alive(site)) for site in found.values()), mixture.hyperprior())
        return {"loss": loss_of(task, output, target), "complexity": tau / examples * prior}

    rates = {mixture.means: mean_lr * mixture.scale, mixture.log_precision: precision_lr, mixture.log_mixing: mixing_lr}
    before = described(mixture, found)
    task.fit(model, task, epochs=epochs, lr=lr, optimizer=partial(grouped, rates), step=step,
             params=[*model.parameters(), *rates], label="train under the mixture")  # fmt: skip
    note(f"{before:.2f} bits a weight under the mixture before, {described(mixture, found):.2f} after")
    if not snap(found, *merged(mixture, merge)):
        raise CompressionError(f"all weights became zero under tau={tau:g}: pass a smaller one, or more epochs")
    return share(model, task, weight_bits=8, epochs=0, where=list(found))  # as many values as there are: none moves


def examples_of(task: Task) -> int:
    """How many examples the training data hold."""
    if task.train is None:
        raise MissingNeed("soft_weight_sharing needs training data: pass Task(train=...)")
    batches = [torch.utils._pytree.tree_leaves(task.split(batch)[:2]) for batch in task.train]
    return max(1, sum(len(next(t for t in leaves if isinstance(t, Tensor))) for leaves in batches))


def largest(found: Mapping[str, Site]) -> float:
    """The size of the largest weight.

    Raises:
        BadData: all weights are zero.
    """
    size = max(float(site.weight.abs().max()) for site in found.values())
    if size == 0:
        raise BadData("all weights of the chosen layers are zero: there is nothing to share")
    return size


def alive(site: Site) -> Tensor:
    """The weights (n,) that no mask holds at zero, with their gradient."""
    weight: Tensor = getattr(site.module, site.name)
    return weight.flatten() if site.mask is None else weight[site.mask.keep]


def grouped(rates: Mapping[nn.Parameter, float], params: list[nn.Parameter], lr: float) -> Optimizer:
    """Adam with a rate of its own for each of the mixture's parameters."""
    network = [p for p in params if all(p is not own for own in rates)]
    groups: list[dict[str, Any]] = [{"params": [own], "lr": rate} for own, rate in rates.items()]
    return Adam([{"params": network, "lr": lr}, *groups])


@torch.no_grad()
def described(mixture: Mixture, found: Mapping[str, Site]) -> float:
    """What the mixture says of a weight, on average, in bits; of a density, so that only differences count."""
    total = sum(float(mixture.complexity(alive(site))) for site in found.values())
    return total / math.log(2) / sum(len(alive(site)) for site in found.values())


@torch.no_grad()
def merged(mixture: Mixture, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """Means, precisions and proportions, with components that hardly differ as one and the one nearest zero at zero."""
    mu, precision, pi = (t.double() for t in (mixture.mu, mixture.log_precision.exp(), mixture.log_pi.exp()))
    while len(mu) > 2:
        gap = divergence(mu, precision)
        place = int(gap.argmin())
        if float(gap.flatten()[place]) >= least:
            break
        i, j = sorted(divmod(place, len(mu)))
        share = pi[[i, j]] / pi[[i, j]].sum()
        mean = (share * mu[[i, j]]).sum()
        spread = (share * (1 / precision[[i, j]] + (mu[[i, j]] - mean).square())).sum()
        mu[i], precision[i], pi[i] = mean, 1 / spread, pi[[i, j]].sum()
        left = torch.arange(len(mu), device=mu.device) != j
        mu, precision, pi = mu[left], precision[left], pi[left]
    mu[mu.abs().argmin()] = 0.0
    return mu, precision, pi


def divergence(mu: Tensor, precision: Tensor) -> Tensor:
    """The symmetric Kullback-Leibler divergence of every pair of Gaussians, (J, J), infinite on the diagonal."""
    ratio, gap = precision[:, None] / precision, (mu[:, None] - mu).square()
    found = 0.5 * (ratio + 1 / ratio - 2 + gap * (precision[:, None] + precision)) / 2
    return found.fill_diagonal_(torch.inf)


@torch.no_grad()
def snap(found: Mapping[str, Site], mu: Tensor, precision: Tensor, pi: Tensor) -> bool:
    """Writes to each weight the mean of its most responsible component; whether any is left that is not zero."""
    for site in found.values():
        parts = site.weight.flatten().double().split(CHUNK)
        index = torch.cat([responsible(part, mu, precision, pi).argmax(1) for part in parts])
        site.held.copy_(mu[index].view_as(site.weight))
    return any(bool(site.weight.any()) for site in found.values())


def responsible(weight: Tensor, mu: Tensor, precision: Tensor, pi: Tensor) -> Tensor:
    """The responsibilities (n, J) of the components for weights (n,); each row sums to one.

    >>> two = torch.ones(2)
    >>> responsible(torch.tensor([0.9]), torch.tensor([0.0, 1.0]), 100 * two, 0.5 * two).round()
    tensor([[0., 1.]])
    """
    joint = pi.log() + 0.5 * precision.log() - 0.5 * (weight[:, None] - mu).square() * precision
    return joint.softmax(1)
