"""Compression on the fly: training pulls weights towards two values, so that product quantization loses little."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Bits, Count, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.layerwise import called
from featherweight.core.ledger import note
from featherweight.core.site import Site, sites
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Batch, Task, loss_of, run
from featherweight.errors import CompressionError
from featherweight.recipes.gong_pq import quantize_pieces


@recipe(
    paper="Soulie, Gripon and Robert, ICANN 2016, arXiv:1509.08745",
    family="quantize",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"epochs": 1, "where": "*", "codebook_share": 0.25, "dim": 2, "last_bits": 1},
)
def soulie_onthefly(
    model: nn.Module,
    task: Task,
    *,
    penalty: Amount = 0.1,
    power: Literal[1, 2] = 2,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    index_bits: Bits = 4,
    last_bits: Bits = 2,
    dim: Count = 4,
    codebook_share: Share = 0.125,
    iterations: Count = 50,
    where: WhereWeighted = "Linear",
) -> nn.Module:
    """Trains linear layers under a pull of each weight to minus or plus one size, then quantizes pieces of them.

    Guillaume Soulie, Vincent Gripon, Maelys Robert, "Compression of Deep Neural Networks on the Fly", ICANN 2016,
    arXiv:1509.08745: a term of the loss draws the weights of fully connected layers to two values while the network
    learns, product quantization (as `gong_pq`) follows, a coarser one for the output layer.

    Departs from the paper: whose regulariser is reconstructed, since the text was not at hand: `penalty * mean ||w|/c -
    1|^power` for each layer, c the root mean square of its weights at that moment, so that the term does not depend on
    their scale. Training starts from the network that is given. Codewords are as many as their codebooks are worth.

    Args:
        penalty: weight of the term of each layer.
        power: of the distance: 2, or 1.
        epochs: training under it.
        lr: learning rate of that training.
        optimizer: "adam" (default), "adamw" or "sgd".
        index_bits: bits of a piece's index.
        last_bits: bits of a piece's index in the last of the chosen layers.
        dim: at most so many weights in a piece.
        codebook_share: what the codebooks of a layer may cost, as a share of its float weights.
        iterations: of k-means, at most.
        where: which layers; the linear ones when left out.

    Raises:
        UnknownName: a pattern matches nothing.
        CompressionError: no layer can afford two codewords.
    """
    masked = masked_names(model)
    bake(model)
    mask_zeros(model, masked)
    found = sites(model, where)

    def step(network: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        output, target = run(network, task, batch)
        pull = sum((two_values(alive(site), power) for site in found.values()), torch.zeros(()))
        return {"loss": loss_of(task, output, target), "two values": penalty * pull}

    before = spread(found)
    task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, step=step, label="pull to two values")
    note(f"distance from two values, squared, over the weights' energy: {before:.1%} before, {spread(found):.1%} after")
    last = [path for path in called(model, task) if path in found][-1:]
    done = [
        quantize_pieces(model, site, 2 ** (last_bits if path in last else index_bits), dim, codebook_share, iterations)
        for path, site in found.items()
    ]
    if not any(done):
        raise CompressionError(
            f"no chosen layer has rows enough for two codewords at codebook_share={codebook_share:g}: pass a larger one"
        )
    return model


def alive(site: Site) -> Tensor:
    """The weights (n,) that no mask holds at zero, with their gradient."""
    weight: Tensor = getattr(site.module, site.name)
    return weight.flatten() if site.mask is None else weight[site.mask.keep]


def two_values(weight: Tensor, power: int = 2) -> Tensor:
    """`mean ||w| / c - 1|^power`, c the root mean square of the weights (n,): zero if and only if all sizes are equal.

    >>> two_values(torch.tensor([0.5, -0.5])).item(), two_values(torch.tensor([1.0, 0.0])).item() > 0
    (0.0, True)
    """
    size = weight.detach().square().mean().sqrt()
    return (weight.abs() / torch.where(size > 0, size, torch.ones_like(size)) - 1).abs().pow(power).mean()


@torch.no_grad()
def spread(found: Mapping[str, Site]) -> float:
    """How far the weights are from two values, squared, over their energy; the mean over layers."""
    return sum(float(two_values(alive(site))) for site in found.values()) / len(found)
