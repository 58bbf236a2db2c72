"""Bayesian compression: random scales on channels, log-uniform a priori; noisy ones go, noise tells the bits left."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.gates import Gates, along_inputs, gated, gates_of, remove_closed
from featherweight.core.ledger import note
from featherweight.core.noise import apart, linear_sites, noisy, samples
from featherweight.core.norms import settle_norms
from featherweight.core.site import Site
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Batch, Task, run
from featherweight.core.widths import rounded
from featherweight.recipes.sparse_vd import dropout_kl


@recipe(
    paper="Louizos et al., NIPS 2017, arXiv:1705.08665",
    family="prune",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"epochs": 16, "lr": 0.02, "noise_lr": 0.3, "round_to": 1},
)
def bayes_group(
    model: nn.Module,
    task: Task,
    *,
    threshold: float | None = None,
    penalty: Amount = 1.0,
    warmup: Share = 0.5,
    epochs: Amount = 100,
    finetune: Amount = 0,
    lr: Positive = 1e-3,
    noise_lr: Positive | None = None,
    optimizer: Optimizers = None,
    start: float = -9.0,
    first_variance: Positive = 0.04,
    round_to: Count = 16,
    where: WhereWeighted = None,
) -> nn.Module:
    """Trains weights `z_g v` with Gaussian `z_g` and `v`, removes the channels whose z is noise, reports the bits left.

    Christos Louizos, Karen Ullrich, Max Welling, "Bayesian Compression for Deep Learning", NIPS 2017, arXiv:1705.08665,
    with the group normal-Jeffreys prior: z log-uniform, v standard normal. Minimises `loss + beta / N (sum_g KL(q(z_g)
    || p(z)) + sum_w KL(q(v_w) || N(0, 1)))` over the means and variances of all z and v. The first divergence is that
    of sparse variational dropout, of `log alpha = log sigma_z^2 - log mu_z^2`; N is the number of training samples,
    beta rises from 0 to `penalty`. A z is drawn for each sample, v at the outputs of a layer. In the end a channel goes
    if its log alpha is above the threshold, and the weights are `mu_z mu_v`. The posterior variance of the weights that
    stay, `sigma_z^2 (sigma_v^2 + mu_v^2) + sigma_v^2 mu_z^2`, tells the bits that they need: this is noted, not done.

    Departs from the paper: training starts at the given weights; biases stay deterministic; the threshold, which the
    paper reads off histograms layer by layer, is the middle of the widest gap between -6 and 1 in which no log alpha
    lies, one for all; a scale stands where its channel is read, behind batch norm, activation and pooling, and channels
    that a residual sum couples share one; the network's own inputs, of which a linear layer may ignore some, are
    masked, not removed; kept channels are rounded up; the half-Cauchy (horseshoe) prior is left out; bits of the
    exponent are counted from the largest weight down to the unit of the significand; running statistics are taken
    anew; `noise_lr` and `finetune` are added, and off.

    Args:
        threshold: of log alpha, above which a channel goes; the middle of the widest gap when left out.
        penalty: weight of the divergence; 1 is the variational lower bound.
        warmup: fraction of the training in which that weight rises linearly from 0.
        epochs: passes of training with noise, the learning rate falling linearly to zero.
        finetune: passes after the removal, without noise.
        lr: learning rate of the weights.
        noise_lr: learning rate of the scales and of all log variances; that of the weights when left out.
        optimizer: "adam" (default), "adamw" or "sgd".
        start: log variance at the start.
        first_variance: the largest variance that weights of the first layer may have.
        round_to: wider layers keep a multiple of this many channels, the least noisy of those that would go; 1 keeps
            what is below the threshold.
        where: which layers are random; all linear and convolution layers when left out.

    Raises:
        BadOption: there is nothing to scale.
        CompressionError: no log alpha was above the threshold.
        TraceError: the network cannot be traced.
    """
    found, count = linear_sites(model, task, where), samples(task)
    masked = masked_names(model)
    gates = gates_of(bake(model), task.inputs(), {path: site.module for path, site in found.items()})
    mask_zeros(model, masked)
    mean = nn.Parameter(1 + 0.01 * torch.randn(gates.count))
    log_variance = nn.Parameter(torch.full((gates.count,), start))

    def scale(samples: int, training: bool) -> Tensor:
        noise = torch.randn(samples, gates.count, device=mean.device)
        return mean + (log_variance / 2).exp() * noise if training else mean[None]

    with gated(model, gates, scale, {"mean": mean, "log_variance": log_variance}), noisy(model, found, start) as spread:
        first = next(iter(spread.values()))

        def step(network: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
            output, target = run(network, task, batch)
            beta = penalty * min(1.0, progress / warmup) if warmup else penalty
            total = dropout_kl(log_alpha(mean, log_variance)).sum()
            total = total + torch.stack([normal_kl(site, spread[path]) for path, site in found.items()]).sum()
            return {"loss": task.loss(output, target), "divergence": beta / count * total}

        def clip(progress: float) -> None:
            first.data.clamp_(max=math.log(first_variance))

        separate = apart(optimizer, [mean, log_variance, *spread.values()], noise_lr or lr)
        task.fit(model, task, epochs=epochs, lr=lr, optimizer=separate, decay="linear", step=step, after_step=clip,
                 label="noise")  # fmt: skip

    noise = log_alpha(mean, log_variance).detach().cpu()
    limit = gap(noise) if threshold is None else threshold
    closed = noise > limit
    note(f"{int(closed.sum())} of {gates.count} scales have a log alpha above {limit:.2f}")
    for path, site in found.items():
        z, square = moments(gates, path, site.module, mean, log_variance, closed)
        note(f"{path}: " + told(*bits(site, spread[path], z, square)))
    remove_closed(model, gates, mean, closed, -noise, choose=lambda channels, some: rounded(channels, some, round_to))
    settle_norms(model, task)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def log_alpha(mean: Tensor, log_variance: Tensor) -> Tensor:
    """The logarithm of variance over squared mean."""
    return log_variance - (mean.square() + 1e-16).log()


def normal_kl(site: Site, log_variance: Tensor) -> Tensor:
    """Divergence of `N(weight, variance)` from `N(0, 1)`, summed over the weights that no mask removed."""
    weight, keep = getattr(site.module, site.name), site.keep.to(log_variance.device)
    each = 0.5 * (log_variance.exp() + weight.square() - log_variance - 1)
    return (each * keep).sum()


def gap(noise: Tensor) -> float:
    """The middle of the widest interval between -6 and 1 in which no log alpha lies.

    >>> gap(torch.tensor([-11.0, -5.0, -1.0, 0.0, 8.0]))
    -3.0
    """
    edges = torch.cat([noise[(noise > -6) & (noise < 1)], torch.tensor([-6.0, 1.0])]).sort().values
    widest = int(edges.diff().argmax())
    return float(edges[widest] + edges[widest + 1]) / 2


# --- the bits that noise leaves ---------------------------------------------------------------------------------------


def moments(
    gates: Gates, path: str, layer: nn.Module, mean: Tensor, log_variance: Tensor, closed: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and mean square of what multiplies a layer's weights, shaped to meet them; 0 where it is closed."""
    if path not in gates.reads:
        return torch.ones(()), torch.ones(())
    first, square = mean.detach().cpu(), (mean.square() + log_variance.exp()).detach().cpu()
    found = [gates.factors(path, torch.where(closed, 0.0, values)[None])[0] for values in (first, square)]
    return along_inputs(layer, found[0]), along_inputs(layer, found[1])


def bits(site: Site, log_variance: Tensor, z: Tensor, square: Tensor) -> tuple[int, int]:
    """Bits of the exponent and of the significand of the weights that stay, given their posterior variance.

    Of one weight: so many behind the point, 23 at most, that its unit `2^-t` is not below twice the variance. Of a
    layer: the mean of its weights, rounded up. Exponents reach from that of the largest weight down to the unit.
    (0, 0) if nothing stays.
    """
    weight = site.weight.cpu()
    variance = square * (log_variance.detach().cpu().exp() + weight.square()) - (z * weight).square()
    stays = (z * weight != 0) & site.keep
    if not stays.any():
        return 0, 0
    significand = (-(2 * variance[stays]).log2()).floor().clamp(0, 23).mean().ceil()
    largest = (z * weight)[stays].abs().max().log2().floor()
    return math.ceil(math.log2(max(2.0, float(largest + significand + 2)))), int(significand)


def told(exponent: int, significand: int) -> str:
    """The bits in words."""
    if not exponent:
        return "nothing stays"
    whole = 1 + exponent + significand
    return f"{whole} bits a weight bear its noise, {exponent} of the exponent and {significand} of the significand"
