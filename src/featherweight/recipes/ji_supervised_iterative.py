"""Supervised iterative quantization: k-means and retraining take turns, until k-means costs nothing any more."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from featherweight.allowed import Amount, Bits, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.ledger import note
from featherweight.core.site import Site, sites
from featherweight.core.study import Study
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task
from featherweight.ingredients.cluster.exact import exact
from featherweight.ingredients.start.starts import density
from featherweight.quantize import LAYERS, quantize
from featherweight.share import centroids_of, nearest, share


@recipe(
    paper="Ji et al., SPIE 9496, 2015",
    family="quantize",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"epochs": 2, "rounds": 2},
)
def ji_supervised_iterative(
    model: nn.Module,
    task: Task,
    *,
    weight_bits: Bits = 4,
    act_bits: Bits | None = 8,
    rounds: Count = 5,
    epochs: Amount = 10,
    tolerance: Amount = 0.01,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    calibration_batches: Count = 16,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Quantizes weights by k-means, trains on from the quantized weights, and again; activations are uniform.

    Zhengping Ji, Ilia Ovsiannikov, Yibing Wang, Lilong Shi, Qiang Zhang, "Reducing weight precision of convolutional
    neural networks towards large-scale on-chip image recognition", Proc. SPIE 9496, 2015. On the server, alternately:
    the weights of every layer become the nearest of `2 ** weight_bits` k-means centroids (adaptive quantization), and
    the network is retrained from there, all weights free. On the client, inputs and feature maps lie on uniform grids.
    In `kmeans_share` weights keep their cluster and only centroids move; here weights may change it.

    Departs from the paper: of which only the abstract was at hand. Training starts from the network that is given;
    k-means is exact; it stops when quantization raises the loss by no more than `tolerance`, or after `rounds`, and the
    quantized network of the lowest loss is the result; the grids of activations are set once, at the end, from the
    limits of what calibration saw. Zeros keep a value of their own. Activations of 8 bits run as integers in a runtime;
    the weights' tables are simulated: storage only.

    Args:
        weight_bits: bits of a weight's index, beside the zero.
        act_bits: bits of a layer's inputs; None leaves them float.
        rounds: how often the weights are quantized, at most.
        epochs: retraining in total between the rounds.
        tolerance: where it stops: by what share quantization may raise the loss.
        lr: learning rate of the retraining.
        optimizer: "adam" (default), "adamw" or "sgd".
        calibration_batches: batches on which the loss is taken, and the ranges of activations.
        where: which layers; all Linear and Conv2d layers when left out.

    Raises:
        UnknownName: a pattern matches nothing.
        CompressionError: every chosen layer is zero.
    """
    masked = masked_names(model)
    bake(model)
    mask_zeros(model, masked)
    found = sites(model, where, LAYERS)
    study = Study(model, replace(task, calibration=None), (), calibration_batches)  # the loss needs labels
    least, best = float("inf"), copy.deepcopy(model.state_dict())
    for turn in range(rounds):
        if turn:
            task.fit(model, task, epochs=epochs / (rounds - 1), lr=lr, optimizer=optimizer,
                     label=f"retrain {turn}/{rounds - 1}")  # fmt: skip
        free = study.loss()
        snap(found.values(), 2**weight_bits)
        bound = study.loss()
        note(f"round {turn + 1}: quantization takes the loss from {free:.4g} to {bound:.4g}")
        if bound < least:
            least, best = bound, copy.deepcopy(model.state_dict())
        if bound - free <= tolerance * free:
            break
    model.load_state_dict(best)
    share(model, task, cluster=exact, weight_bits=weight_bits, epochs=0, where=list(found))
    if act_bits is not None:
        quantize(model, task, weights=None, acts="minmax", act_bits=act_bits, calibration_batches=calibration_batches,
                 where=list(found))  # fmt: skip
    return model


@torch.no_grad()
def snap(found: Iterable[Site], k: int) -> None:
    """Writes to every weight that is not zero the nearest of its layer's k centroids."""
    for site in found:
        weight = site.weight
        alive = weight != 0
        if alive.any():
            centroids = centroids_of(weight[alive], exact, density, k).to(weight)
            site.held.copy_(torch.where(alive, centroids[nearest(weight, centroids)], weight))
