"""Sparse variational dropout: learn how much noise every weight bears, remove those that bear more than they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from featherweight.allowed import Amount, Fraction, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.noise import apart, linear_sites, noisy, samples
from featherweight.core.norms import settle_norms
from featherweight.core.select import lowest
from featherweight.core.site import Site
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Batch, Task, run
from featherweight.errors import CompressionError
from featherweight.prune import _note_dead_units


@recipe(
    paper="Molchanov et al., ICML 2017, arXiv:1701.05369",
    family="prune",
    needs={"labels", "train"},
    shrinks={"weights"},
    small={"epochs": 6, "lr": 0.02, "noise_lr": 0.5, "threshold": 2.0},
)
def sparse_vd(
    model: nn.Module,
    task: Task,
    *,
    sparsity: Fraction | None = None,
    threshold: float = 3.0,
    penalty: Amount = 1.0,
    warmup: Share = 0.5,
    epochs: Amount = 100,
    finetune: Amount = 0,
    lr: Positive = 1e-3,
    noise_lr: Positive | None = None,
    optimizer: Optimizers = None,
    start: float = -10.0,
    where: WhereWeighted = None,
) -> nn.Module:
    """Trains Gaussians `N(theta, alpha theta^2)` over the weights and masks those whose `log alpha` is above 3.

    Dmitry Molchanov, Arsenii Ashukha, Dmitry Vetrov, "Variational Dropout Sparsifies Deep Neural Networks", ICML 2017,
    arXiv:1701.05369. Minimises `loss + beta / N * sum KL(log alpha)` over `theta` and `log sigma^2`, the variance of
    every weight, with `log alpha = log sigma^2 - log theta^2` and the approximation of the divergence from a
    log-uniform prior (eq. 14); `loss` is the task's, the mean over a batch, `N` the number of training samples, and
    `beta` rises from 0 to `penalty`. Noise is drawn at the outputs of a layer, none in evaluation. In the end
    the means are the weights.

    Departs from the paper: training starts at the given weights, where the paper starts at random ones or warms up;
    biases stay deterministic; `sparsity`, if given, moves the threshold to where exactly this fraction is above it;
    every layer keeps the weight that bears least noise; running statistics of batch norms are taken anew without
    noise; `noise_lr` and `finetune` are added, and off.

    Args:
        sparsity: fraction of the weights that is removed, those of highest alpha in all layers together; when left out,
            what is above the threshold.
        threshold: of log alpha; the paper's 3 is a dropout rate of 0.95.
        penalty: weight of the divergence; 1 is the variational lower bound.
        warmup: fraction of the training in which that weight rises linearly from 0.
        epochs: passes of training with noise, the learning rate falling linearly to zero.
        finetune: passes after the removal, without noise.
        lr: learning rate of the weights.
        noise_lr: learning rate of the log variances; that of the weights when left out.
        optimizer: "adam" (default), "adamw" or "sgd".
        start: log variance at the start.
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: no layer is a linear map with weights of its own.
        CompressionError: no weight was above the threshold.
    """
    found, count = linear_sites(model, task, where), samples(task)

    with noisy(model, found, start) as log_variances:

        def step(network: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
            output, target = run(network, task, batch)
            beta = penalty * min(1.0, progress / warmup) if warmup else penalty
            each = {path: dropout_kl(log_alpha(site, log_variances[path])) for path, site in found.items()}
            total = torch.stack([alive(found[path], kl).sum() for path, kl in each.items()]).sum()
            return {"loss": task.loss(output, target), "divergence": beta / count * total}

        separate = apart(optimizer, log_variances.values(), noise_lr or lr)
        task.fit(model, task, epochs=epochs, lr=lr, optimizer=separate, decay="linear", step=step, label="noise")
        noise = {path: log_alpha(site, log_variances[path]).detach().cpu() for path, site in found.items()}

    mask_noisiest(model, found, noise, threshold, sparsity)
    settle_norms(model, task)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def log_alpha(site: Site, log_variance: Tensor) -> Tensor:
    """`log sigma^2 - log theta^2`, of the weight's shape."""
    return log_variance - (getattr(site.module, site.name).square() + 1e-16).log()


def alive(site: Site, values: Tensor) -> Tensor:
    """Values of weights, zero where a mask removed the weight."""
    return values if site.mask is None else values * site.mask.keep


def dropout_kl(log_alpha: Tensor) -> Tensor:
    """Divergence of `N(theta, alpha theta^2)` from the log-uniform prior, up to a constant, entry by entry (eq. 14).

    It falls from infinity to 0 as alpha grows. Outside [-8, 8] it is that of the nearest end.

    >>> [round(float(value), 4) for value in dropout_kl(torch.tensor([-2.0, 0.0, 8.0]))]
    [1.5405, 0.4312, 0.0002]
    """
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    clipped = log_alpha.clamp(-8, 8)
    return k1 - k1 * torch.sigmoid(k2 + k3 * clipped) + 0.5 * functional.softplus(-clipped)


def mask_noisiest(
    model: nn.Module, found: Mapping[str, Site], noise: Mapping[str, Tensor], threshold: float, sparsity: float | None
) -> None:
    """Masks, in place, what has a log alpha above the threshold, or the given fraction: the highest first.

    Raises:
        CompressionError: nothing was above the threshold.
    """
    scores = {path: torch.where(site.keep, -noise[path], -torch.inf) for path, site in found.items()}
    for path, score in scores.items():
        if sparsity is None and score.max() < -threshold:
            note(f"{path}: all weights are above the threshold, the one that bears least noise is kept")
        score.view(-1)[score.argmax()] = torch.inf  # no layer is emptied
    if sparsity is not None:
        gone = lowest(scores, sparsity)
        above = [noise[path][marked & found[path].keep] for path, marked in gone.items()]
        least = min((float(values.min()) for values in above if len(values)), default=threshold)
        note(f"the threshold of log alpha is {least:.2f} for sparsity={sparsity:g}")
    else:
        gone = {path: score < -threshold for path, score in scores.items()}
        if not any(bool((gone[path] & site.keep).any()) for path, site in found.items()):
            raise CompressionError(
                f"no weight has a log alpha above threshold={threshold:g}: raise epochs, noise_lr or penalty, or pass "
                "sparsity"
            )
    for path, site in found.items():
        site.set_mask(model, site.keep & ~gone[path])
        note(f"{path}: {float(site.keep.float().mean()):.2%} of the weights kept")
        _note_dead_units(site)
