"""Weights of low displacement rank (Zhao et al., ICML 2017): like Toeplitz, Hankel, Vandermonde or Cauchy matrices."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval
from torch import nn

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.exchange import impose
from featherweight.core.fit import Optimizers
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task

WORDS = {
    "toeplitz": "stein_toeplitz",
    "hankel": "stein_hankel",
    "vandermonde": "stein_vandermonde",
    "cauchy": "stein_cauchy",
    "toeplitz_hankel": "sylvester_toeplitz_hankel",
}


@recipe(
    paper="Zhao et al., ICML 2017, arXiv:1703.00144",
    family="share",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"rank": 1, "steps": 5, "epochs": 1},
)
def ldr_general(
    model: nn.Module,
    task: Task,
    *,
    operators: Literal["toeplitz", "hankel", "vandermonde", "cauchy", "toeplitz_hankel"] = "toeplitz",
    rank: Count = 4,
    steps: Annotated[int, Interval(ge=0, le=1000)] = 20,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Replaces each weight by a matrix of low displacement rank near to it, then trains the network.

    Liang Zhao, Siyu Liao, Yanzhi Wang, Zhe Li, Jian Tang, Bo Yuan, "Theoretical properties for neural networks with
    weight matrices of low displacement rank", ICML 2017, arXiv:1703.00144. A square W of which `W - A W B = G H^T` is
    thin is made from G and H, 2 n r parameters, which are trained; A and B are fixed: cyclic shifts Z_1 and Z_-1
    (toeplitz, hankel), a diagonal and a shift (vandermonde), two diagonals (cauchy). Networks of such weights
    approximate any continuous function, with an error of the same order as dense ones.

    Departs from the paper: sums of Toeplitz and Hankel matrices are held by `A W - W B` with A and B tridiagonal (Z_0 +
    Z_0^T with corners 1, 1 and 1, -1): their displacement has rank 4 there, while with `W - A W A` it is full, and no W
    at all follows from it at sizes of which n + 1 is a multiple of 3 or 5. The network given is trained already, so G
    and H start near its weight, and not at random: at singular vectors of its displacement, and from there by steps of
    L-BFGS on the distance to the weight. A matrix that is not square is cut into squares of its smaller size, the last
    one padded; convolutions are replaced too, as matrices (outputs, inputs * kernel). The weight is made whole at each
    call, then multiplied with: fewer bytes, more work (`structured_transform` runs its matrices by Fourier transforms).

    Args:
        operators: the class of matrices, by its best known members.
        rank: r; of smaller squares their size.
        steps: of L-BFGS towards each weight before training.
        epochs: training after the replacement.
        lr: learning rate of that training.
        optimizer: "adam" (default), "adamw", "sgd" or "momentum".
        where: which layers; all linear and 2-d convolution layers when left out.

    Raises:
        CompressionError: no layer would get smaller.
    """
    impose(model, task, where, lambda number, *size: (WORDS[operators], min(rank, *size)), steps=steps)
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="train displacements")
