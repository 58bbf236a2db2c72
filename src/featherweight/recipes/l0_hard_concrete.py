"""L0 regularisation: random gates on channels, the probability that one is open is paid for, closed ones go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.gates import gated, gates_of, remove_closed
from featherweight.core.noise import apart, linear_sites, samples
from featherweight.core.norms import settle_norms
from featherweight.core.site import PerLayer
from featherweight.core.surgery import WhereWeighted, patterns, targets
from featherweight.core.task import Batch, Task, run
from featherweight.core.widths import rounded

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
LEAST, MOST = math.log(0.01), math.log(100)


@recipe(
    paper="Louizos et al., ICLR 2018, arXiv:1712.01312",
    family="prune",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"epochs": 8, "lr": 0.01, "gate_lr": 0.4, "penalty": 0.1, "round_to": 1},
)
def l0_hard_concrete(
    model: nn.Module,
    task: Task,
    *,
    penalty: PerLayer[Amount] = 0.1,
    weight_decay: Amount = 5e-4,
    drop: Fraction = 0.5,
    draw: Literal["batch", "sample"] = "batch",
    warmup: Share = 0.0,
    epochs: Amount = 100,
    finetune: Amount = 0,
    lr: Positive = 1e-3,
    gate_lr: Positive | None = None,
    optimizer: Optimizers = None,
    round_to: Count = 16,
    where: WhereWeighted = None,
) -> nn.Module:
    """Trains hard concrete gates on channels under the expected number of weights that are left, removes the closed.

    Christos Louizos, Max Welling, Diederik P. Kingma, "Learning Sparse Neural Networks through L0 Regularization", ICLR
    2018, arXiv:1712.01312. A gate is `z = clip(s (zeta - gamma) + gamma, 0, 1)` with `s = sigmoid((log u - log(1 - u) +
    log a) / beta)` and `u` uniform (eq. 10, 11); beta = 2/3, gamma = -0.1, zeta = 1.1. Minimises `loss + 1/N sum_g
    P(z_g > 0) sum_w (lambda + N/2 decay w^2)`, the inner sum over the weights that a gate decides about, with `P(z > 0)
    = sigmoid(log a - beta log(-gamma / zeta))` (eq. 12); N is the number of training samples. In the end a gate is
    `clip(sigmoid(log a) (zeta - gamma) + gamma, 0, 1)` (eq. 13) and multiplied into the weights.

    Departs from the paper: training starts at the given weights; a gate stands where its channel is read, behind batch
    norm, activation and pooling, not where it is put out, and channels that a residual sum couples share one; the
    network's own inputs, of which a linear layer may ignore some, are masked, not removed; kept channels are rounded
    up; running statistics are taken anew; `gate_lr`, `warmup` and `finetune` are added, and off.

    Args:
        penalty: lambda, of each weight that is left; one for all layers, or layer patterns with one each (that of
            convolutions counts for their filters, that of linear layers for their inputs).
        weight_decay: on the weights, as far as their gate is open.
        drop: probability with which gates start closed, about.
        draw: "batch" draws a gate once for a batch, as the paper does, "sample" for each sample, with less variance.
        warmup: fraction of the training in which the penalty rises linearly from 0.
        epochs: passes of training with gates, the learning rate falling linearly to zero.
        finetune: passes after the removal.
        lr: learning rate of the weights.
        gate_lr: learning rate of the gates; that of the weights when left out.
        optimizer: "adam" (default), "adamw" or "sgd".
        round_to: wider layers keep a multiple of this many channels, some closed ones opened again; 1 keeps the open.
        where: which layers' inputs have gates; all linear and convolution layers when left out.

    Raises:
        BadOption: there is nothing to gate.
        CompressionError: no gate was closed.
        TraceError: the network cannot be traced.
    """
    found, count = linear_sites(model, task, patterns(where, {"penalty": penalty})), samples(task)
    masked = masked_names(model)
    gates = gates_of(bake(model), task.inputs(), {path: site.module for path, site in found.items()})
    mask_zeros(model, masked)
    weights = {h.path: model.get_submodule(h.path) for h in gates.held}
    rate = {path: float(one) for path, one in _rates(model, penalty, weights).items()}
    log_a = math.log(1 - drop) - math.log(drop) if drop else MOST
    log_alpha = nn.Parameter(log_a + 0.01 * torch.randn(gates.count))

    def gate(samples: int, training: bool) -> Tensor:
        if not training:
            return at_last(log_alpha)[None]
        return drawn(log_alpha, torch.rand(samples if draw == "sample" else 1, gates.count, device=log_alpha.device))

    def step(network: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        output, target = run(network, task, batch)
        rising = min(1.0, progress / warmup) if warmup else 1.0
        cost = {
            path: rate[path] / count + 0.5 * weight_decay * layer.weight.square()  # type: ignore[operator]
            for path, layer in weights.items()
        }
        return {
            "loss": task.loss(output, target),
            "L0": rising * (open_probability(log_alpha) * gates.total(cost)).sum(),
        }

    def clamp(progress: float) -> None:
        log_alpha.data.clamp_(LEAST, MOST)

    with gated(model, gates, gate, {"log_alpha": log_alpha}):
        separate = apart(optimizer, [log_alpha], gate_lr or lr)
        task.fit(model, task, epochs=epochs, lr=lr, optimizer=separate, decay="linear", step=step, after_step=clamp,
                 label="gates")  # fmt: skip

    closed = at_last(log_alpha) == 0
    remove_closed(model, gates, torch.where(closed, expected(log_alpha), at_last(log_alpha)), closed, log_alpha,
                  choose=lambda channels, doomed: rounded(channels, doomed, round_to))  # fmt: skip
    settle_norms(model, task)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def _rates(model: nn.Module, penalty: PerLayer[float], weights: Mapping[str, nn.Module]) -> dict[str, float]:
    """The penalty of each layer; of two patterns that match, the later counts."""
    if not isinstance(penalty, Mapping):
        return dict.fromkeys(weights, penalty)
    found = dict.fromkeys(weights, 0.0)
    for pattern, one in penalty.items():
        found |= {path: one for path in targets(model, pattern) if path in weights}
    return found


def drawn(log_alpha: Tensor, u: Tensor) -> Tensor:
    """Gates from uniform numbers (eq. 10, 11): the noise is kept away from 0 and 1, where its logarithm ends.

    >>> drawn(torch.zeros(3), torch.tensor([0.1, 0.5, 0.9]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    u = u.clamp(1e-6, 1 - 1e-6)
    s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """`P(z > 0)` (eq. 12).

    >>> open_probability(torch.tensor(math.log(0.01)))
    tensor(0.0471)
    """
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def at_last(log_alpha: Tensor) -> Tensor:
    """The gates of the network that is used (eq. 13)."""
    return (torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def expected(log_alpha: Tensor) -> Tensor:
    """The mean of a gate, by the midpoints of a thousand equally probable intervals."""
    u = (torch.arange(1000, device=log_alpha.device) + 0.5) / 1000
    return drawn(log_alpha.detach(), u[:, None]).mean(0)
