"""XNOR-Net: signs for weights and inputs, and a scale for each filter and for each place of the image."""

from __future__ import annotations

from torch import nn

from featherweight.allowed import Amount, Count, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.binary import (
    BinaryWeights,
    SizedSignInput,
    Start,
    TimesSize,
    channel_dim,
    constant_part,
    looked_at,
)
from featherweight.core.fit import Optimizers
from featherweight.core.forms import attach, take_off
from featherweight.core.ledger import note
from featherweight.core.norms import fit_and_settle
from featherweight.core.site import Site, channel_axis
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task
from featherweight.core.taught import taught
from featherweight.quantize import chosen_sites


@recipe(
    paper="Rastegari et al., ECCV 2016, arXiv:1603.05279",
    family="quantize",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"epochs": 1, "calibration_batches": 2},
)
def xnor_net(
    model: nn.Module,
    task: Task,
    *,
    keep_first_last: bool = True,
    calibration_batches: Count = 16,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    teacher_share: Share = 0.0,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Trains through `I * W ~ (sign(I) * sign(W)) K alpha`, alpha a number per filter, K one per place of the output.

    Mohammad Rastegari, Vicente Ordonez, Joseph Redmon, Ali Farhadi, "XNOR-Net: ImageNet Classification Using Binary
    Convolutional Neural Networks", ECCV 2016, sec. 3.2: `alpha = mean|W|`, `A = mean|I|` over the channels, `K = A * k`
    with k a box of the kernel's size, moved as the kernel is (eq. 11). For a linear layer K is the mean of |I|. The
    product of signs is exact in integers, `n - 2 popcount`. First and last layer stay float.

    Departs from the paper: training starts from the network that is given, not from scratch, in the order of its own
    layers. The paper's block is batch norm, sign, convolution, pooling; where a ReLU stands before the convolution its
    outputs have no signs, so signs and sizes are those of the input less a shift, one per channel, which starts at the
    mean that calibration saw and is trained: it stands for the batch norm, as does the window of the sign's gradient,
    the deviation that was seen in place of 1. A bias takes over the mean of the input. Gradients are those of the
    forward pass, through K and alpha too (see `bwn`). With a mask, alpha is that of the surviving weights. After the
    training the running statistics of batch norms are taken anew. Exported as float operators.

    Args:
        keep_first_last: leave the first and the last layer that run in float, as the paper does.
        calibration_batches: how many batches the shifts are taken from.
        epochs: training through the signs, the learning rate falling to zero.
        lr: learning rate.
        optimizer: as in `fit`.
        teacher_share: share of the teacher's softened class probabilities in the loss, the labels have the rest.
        where: which layers; all Linear and Conv2d layers when left out.

    Raises:
        CompressionError: nothing is left to binarize.
    """
    found = chosen_sites(model, task, where, keep_first_last=keep_first_last)
    step = taught(task, model, teacher_share) if epochs else None
    starts = looked_at(model, task, {path: site.module for path, site in found.items()}, calibration_batches)
    for path, site in found.items():
        binarize(model, site, starts[path])
    note(f"{len(found)} layers of signs, with a size for every filter and every place")
    return fit_and_settle(model, task, epochs=epochs, lr=lr, optimizer=optimizer, step=step, label="train on signs")


def binarize(model: nn.Module, site: Site, start: Start) -> None:
    """Signs for a layer's weights and inputs and sizes for its outputs; the bias moves behind the sizes."""
    layer, dim = site.module, channel_dim(site.module)
    take_off(model, layer, "bias")
    held, bias = layer._parameters.get("bias"), None
    if held is not None:
        bias = held.detach() + constant_part(site.weight, start.shift, getattr(layer, "groups", 1))
        held.requires_grad_(False).zero_()
    attach(layer, SizedSignInput(start.shift, dim, start.window, layer), "input")
    attach(layer, TimesSize(dim, bias), "output")
    attach(layer, BinaryWeights(channel_axis(site)), root=model)
