"""Binarized neural networks: signs for weights and activations, sums of signs between them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.allowed import Amount, Count, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.binary import (
    SignInput,
    Start,
    add_mean,
    channel_dim,
    clip,
    looked_at,
    power_of_two,
    sign_weights,
)
from featherweight.core.fit import Optimizers
from featherweight.core.forms import attach
from featherweight.core.ledger import note
from featherweight.core.norms import fit_and_settle
from featherweight.core.site import Site
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task
from featherweight.core.taught import taught
from featherweight.quantize import chosen_sites, ends_of, quantize


@recipe(
    paper="Hubara et al., NIPS 2016, arXiv:1602.02830",
    family="quantize",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"epochs": 1, "calibration_batches": 2},
)
def bnn(
    model: nn.Module,
    task: Task,
    *,
    keep_first_last: bool = False,
    calibration_batches: Count = 16,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers | Literal["shift_adamax"] = None,
    teacher_share: Share = 0.0,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Trains through `sign` of weights and of layer inputs; the first layer reads integers of 8 bits.

    Itay Hubara, Matthieu Courbariaux, Daniel Soudry, Ran El-Yaniv, Yoshua Bengio, "Binarized Neural Networks", NIPS
    2016 (and arXiv:1602.02830): deterministic signs (eq. 1), straight-through gradient where |r| <= 1 (eq. 4), latent
    weights clipped after every update (algorithm 1). A layer then adds signs: `a . b = K - 2 popcount(a xor b)`, and a
    batch norm before the next sign is the comparison of that integer with a threshold
    (`core.thresholds.integer_thresholds`).

    Departs from the paper: training starts from the network that is given, not from scratch, in the order of its own
    layers. What comes out of a ReLU has no signs, so the sign is taken around a shift, one per input channel, which
    starts at the mean that calibration saw and is trained: it stands for the batch norm before the sign, as does the
    window of the gradient, the deviation that was seen in place of 1. Weights keep a fixed scale per output channel,
    the mean size of weights times that of inputs, by which a network without batch norms goes on working (a batch norm
    behind the layer absorbs it) and in which units weights are clipped, which amounts to the learning rates of the
    paper (scaled by Glorot's coefficients); a bias takes over the mean of the input. Batch norms stay ordinary ones,
    the paper's shift-based batch norm is not there; its shift-based AdaMax is (`optimizer="shift_adamax"`). The default
    is Adam. Zero padding adds zeros to the sum, not signs. After the
    training the running statistics of batch norms are taken anew. Exported as float operators.

    Args:
        keep_first_last: leave the first and the last layer that run in float (the paper does not).
        calibration_batches: how many batches the shifts are taken from.
        epochs: training through the signs, the learning rate falling to zero.
        lr: learning rate; of shift-based AdaMax the paper's is 2^-10.
        optimizer: "adam" (default), "adamw", "sgd", "momentum" or "shift_adamax".
        teacher_share: share of the teacher's softened class probabilities in the loss, the labels have the rest.
        where: which layers; all Linear and Conv2d layers when left out.

    Raises:
        CompressionError: nothing is left to binarize.
    """
    found = chosen_sites(model, task, where, keep_first_last=keep_first_last)
    step = taught(task, model, teacher_share) if epochs else None

    first = {*ends_of(model, task)[:1]} & found.keys()
    for path in first:
        quantize(model, task, weights=None, acts="minmax", calibration_batches=calibration_batches, where=path)
        attach(found[path].module, sign_weights(found[path]), root=model)
    inner = {path: site for path, site in found.items() if path not in first}
    starts = looked_at(model, task, {p: site.module for p, site in inner.items()}, calibration_batches)
    for path, site in inner.items():
        binarize(model, site, starts[path])

    kind: Any = shift_adamax if optimizer == "shift_adamax" else optimizer
    note(f"{len(inner)} layers of signs in and out, {len(first)} of signs that reads 8 bits")
    return fit_and_settle(model, task, epochs=epochs, lr=lr, optimizer=kind, step=step, label="train on signs",
                          after_step=lambda progress: clip(found.values()))  # fmt: skip


def binarize(model: nn.Module, site: Site, start: Start) -> None:
    """Signs for a layer's weights and inputs, at the scale that the layer had; its bias takes the mean of the input."""
    layer = site.module
    add_mean(model, site, start)
    attach(layer, SignInput(start.shift, channel_dim(layer), start.window), "input")
    attach(layer, sign_weights(site, start.size), root=model)


# --- the paper's optimizer --------------------------------------------------------------------------------------------


@final
class ShiftAdaMax(Optimizer):
    """AdaMax whose products are shifts (algorithm 4): `w -= lr / (1 - beta1^t) * m * AP2(1 / v)`.

    `m` is the mean of gradients, `v` the largest size of late; both factors of m are powers of two if lr is one. The
    paper has lr = 2^-10, beta1 = 1 - 2^-3, beta2 = 1 - 2^-10.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, beta1: float = 1 - 2**-3, beta2: float = 1 - 2**-10
    ) -> None:
        super().__init__(params, {"lr": lr, "beta1": beta1, "beta2": beta2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in (p for p in group["params"] if p.grad is not None):
                held = self.state[weight]
                if not held:
                    held |= {"t": 0, "m": torch.zeros_like(weight), "v": torch.zeros_like(weight)}
                held["t"] += 1
                held["m"].lerp_(weight.grad, 1 - group["beta1"])
                torch.maximum(group["beta2"] * held["v"], weight.grad.abs(), out=held["v"])
                rate = power_of_two(torch.tensor(group["lr"] / (1 - group["beta1"] ** held["t"])))
                moving = torch.where(held["v"] > 0, power_of_two(1 / held["v"]), torch.zeros_like(weight))
                weight.sub_(rate.to(weight) * held["m"] * moving)


def shift_adamax(params: list[nn.Parameter], lr: float) -> Optimizer:
    """The optimizer for `fit`."""
    return ShiftAdaMax(params, lr)
