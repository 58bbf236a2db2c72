"""Functional hashing (Shi et al., 2016): several hashed weights an entry, one by a small network."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Gt, Interval
from torch import nn

from featherweight.allowed import Amount, Positive
from featherweight.catalogue import recipe
from featherweight.core.exchange import impose
from featherweight.core.fit import Optimizers
from featherweight.core.surgery import WhereLinearConv2dOrEmbedding
from featherweight.core.task import Task

KINDS = (nn.Linear, nn.Conv2d, nn.Embedding)


@recipe(
    paper="Shi et al., 2016, arXiv:1605.06560",
    family="share",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"hashes": 2, "width": 3, "steps": 5, "epochs": 1},
)
def funhash(
    model: nn.Module,
    task: Task,
    *,
    compression: Annotated[float, Gt(1)] = 8.0,
    hashes: Annotated[int, Interval(ge=1, le=16)] = 4,
    width: Annotated[int, Interval(ge=0, le=64)] = 4,
    seed: Annotated[int, Interval(ge=0, le=1 << 32)] = 0,
    steps: Annotated[int, Interval(ge=0, le=1000)] = 20,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    where: WhereLinearConv2dOrEmbedding = None,
) -> nn.Module:
    """Makes each weight by a small network from several hashed parameters, then trains parameters and networks.

    Lei Shi, Shikun Feng, Zhifan Zhu, "Functional hashing for compressing neural networks", 2016, arXiv:1605.06560.
    `V[i, j] = g([xi_1 w[h_1(i, j)], ..., xi_U w[h_U(i, j)]])`: two weights that share a parameter by one hash differ by
    the others, where the hashing trick (U = 1 and g the identity: `hashed_net`) makes them equal. A layer of m n
    weights has round(m n / compression) parameters and a small network, U to `width` tanh units to 1. No index is
    stored; the work is that of the plain layer, and m n (U + 1) width multiplications a call to make its weight.

    Departs from the paper: the text at hand gives neither the size of g nor its training (4 tanh units and joint
    training are choices), and its extensions (a second space for g, hashing of hashed values, one space for all layers)
    are not here. The network given is trained already, so parameters start near its weights: at means over buckets and
    a g that is about the mean, from there by steps of L-BFGS on the distance to the weight. The hash is the finalizer
    of splitmix64; convolutions and embeddings are hashed too.

    Args:
        compression: weights for each parameter, the small networks apart.
        hashes: U, parameters that an entry is made from (the paper: 2 to 4).
        width: units of the small network; 0: g is the sum.
        seed: of the hashes; each layer has its own, from this one on.
        steps: of L-BFGS towards each weight before training.
        epochs: training after the sharing.
        lr: learning rate of that training.
        optimizer: "adam" (default), "adamw", "sgd" or "momentum".
        where: which layers; all linear, 2-d convolution and embedding layers when left out.

    Raises:
        CompressionError: no layer would get smaller.
    """

    def told(number: int, rows: int, columns: int) -> tuple[str, int, int, int, int]:
        return "functional", max(1, round(rows * columns / compression)), hashes, width, seed + number

    impose(model, task, where, told, KINDS, steps)
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="train hashed weights")
