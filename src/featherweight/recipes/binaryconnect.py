"""BinaryConnect: weights of two values in every forward and backward pass, updates to float ones."""

from __future__ import annotations

from torch import nn

from featherweight.allowed import Amount, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.binary import clip, sign_weights
from featherweight.core.fit import Optimizers
from featherweight.core.forms import attach
from featherweight.core.ledger import note
from featherweight.core.norms import fit_and_settle
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task
from featherweight.core.taught import taught
from featherweight.quantize import chosen_sites


@recipe(
    paper="Courbariaux et al., NIPS 2015, arXiv:1511.00363",
    family="quantize",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"epochs": 1},
)
def binaryconnect(
    model: nn.Module,
    task: Task,
    *,
    stochastic: bool = False,
    keep_first_last: bool = False,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    teacher_share: Share = 0.0,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Trains through signs of weights (algorithm 1): binarize, forward and backward, update the float weights, clip.

    Matthieu Courbariaux, Yoshua Bengio, Jean-Pierre David, "BinaryConnect: Training Deep Neural Networks with binary
    weights during propagations", NIPS 2015. `w_b = sign(w)` (eq. 1), or drawn, 1 with the probability
    `clip((w + 1) / 2, 0, 1)` (eq. 2 and 3); the gradient of w_b is applied to w, and w is clipped to [-1, 1].

    Departs from the paper: training starts from the network that is given, not from scratch, so -1 and 1 stand for the
    mean size of an output channel's weights, a fixed scale (a batch norm behind the layer would absorb it, a network
    without one needs it); weights, their clipping and learning rate are in these units, which is what the paper's
    scaling of learning rates by Glorot's coefficients amounts to. With a mask the scale is that of the surviving
    weights. The result has signs in both modes, where the paper tests float weights after stochastic training; the
    running statistics of batch norms are taken anew. No dropout, no squared hinge loss unless the task brings them.
    Executed as int8 weights by the ONNX file.

    Args:
        stochastic: draw the signs in training.
        keep_first_last: leave the first and the last layer that run in float (the paper does not).
        epochs: training, the learning rate falling to zero.
        lr: learning rate.
        optimizer: as in `fit`.
        teacher_share: share of the teacher's softened class probabilities in the loss, the labels have the rest.
        where: which layers; all Linear and Conv2d layers when left out.

    Raises:
        CompressionError: nothing is left to binarize.
    """
    found = chosen_sites(model, task, where, keep_first_last=keep_first_last)
    step = taught(task, model, teacher_share) if epochs else None
    for site in found.values():
        attach(site.module, sign_weights(site, stochastic=stochastic), root=model)
    clip(found.values())
    note(f"{len(found)} layers of {'drawn ' if stochastic else ''}signs")
    return fit_and_settle(model, task, epochs=epochs, lr=lr, optimizer=optimizer, step=step, label="train on signs",
                          after_step=lambda progress: clip(found.values()))  # fmt: skip
