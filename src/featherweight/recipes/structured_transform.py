"""Structured transforms (Sindhwani et al., NIPS 2015): weights of low displacement rank, run by Fourier transforms."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval
from torch import nn

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.exchange import impose
from featherweight.core.fit import Optimizers
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task


@recipe(
    paper="Sindhwani et al., NIPS 2015, arXiv:1510.01722",
    family="share",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"rank": 1, "steps": 5, "epochs": 1},
)
def structured_transform(
    model: nn.Module,
    task: Task,
    *,
    rank: Count = 4,
    steps: Annotated[int, Interval(ge=0, le=1000)] = 20,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Replaces each weight by a Toeplitz-like matrix near to it, then trains the network.

    Vikas Sindhwani, Tara N. Sainath, Sanjiv Kumar, "Structured transforms for small-footprint deep learning", NIPS
    2015, arXiv:1510.01722. A square W with displacement `Z_1 W - W Z_-1 = sum_k g_k h_k^T` of rank r is `W = 1/2 sum_k
    Z_1(g_k) Z_-1(J h_k)` (theorem 3.1): 2 n r parameters instead of n^2, and a product by 2 r + 2 Fourier transforms of
    size n. r goes from circulants (1) and Toeplitz matrices (2) to all matrices (n).

    Departs from the paper: the network given is trained already, so g and h start near its weight, and not at random:
    at the singular vectors of its displacement, and from there by steps of L-BFGS on the distance to the weight (that
    start alone is often worse than zero); a matrix that is not square is cut into squares of its smaller size, the last
    one padded; convolutions are replaced too, as matrices (outputs, inputs * kernel), which are then made whole and not
    run by Fourier transforms: pass where="Linear" for fully connected layers alone.

    Args:
        rank: r; of smaller squares their size.
        steps: of L-BFGS towards each weight before training.
        epochs: training after the replacement.
        lr: learning rate of that training.
        optimizer: "adam" (default), "adamw", "sgd" or "momentum".
        where: which layers; all linear and 2-d convolution layers when left out.

    Raises:
        CompressionError: no layer would get smaller.
    """
    impose(model, task, where, lambda number, *size: ("toeplitz", min(rank, *size)), steps=steps)
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="train displacements")
