"""Circulant projections (Cheng et al., ICCV 2015): every weight matrix a circulant times random signs, run by FFT."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval
from torch import nn

from featherweight.allowed import Amount, Positive
from featherweight.catalogue import recipe
from featherweight.core.exchange import impose
from featherweight.core.fit import Optimizers
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task

Seed = Annotated[int, Interval(ge=0, le=1 << 32)]


@recipe(
    paper="Cheng et al., ICCV 2015, arXiv:1502.03436",
    family="share",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"epochs": 1},
)
def circulant_linear(
    model: nn.Module,
    task: Task,
    *,
    seed: Seed = 0,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Replaces each weight by the nearest circulant times fixed random signs, then trains the network.

    Yu Cheng, Felix X. Yu, Rogerio S. Feris, Sanjiv Kumar, Alok Choudhary, Shih-Fu Chang, "An exploration of parameter
    redundancy in deep networks with circulant projections", ICCV 2015, arXiv:1502.03436. `W = C(r) D`, where column j
    of C(r) is r shifted down by j and D a diagonal of random signs; `W x = IFFT(FFT(r) * FFT(D x))`: a layer of width d
    has d parameters in the place of d^2 and takes O(d log d) multiplications. Gradients are those of this formula.

    Departs from the paper: the network given is trained already, so r starts at the least-squares projection of its
    weight (the mean over each shifted diagonal, signs taken off) and not at random; a matrix with more rows than
    columns is a stack of circulants of the width of its input, one with fewer uses the first rows (the paper pads with
    zeros to a square); convolutions are replaced too, as matrices (outputs, inputs * kernel), which are then made whole
    and not run by Fourier transforms: pass where="Linear" for the paper's fully connected layers alone.

    Args:
        seed: of the random signs; each layer has its own, from this one on.
        epochs: training after the replacement.
        lr: learning rate of that training.
        optimizer: "adam" (default), "adamw", "sgd" or "momentum".
        where: which layers; all linear and 2-d convolution layers when left out.

    Raises:
        CompressionError: no layer would get smaller.
    """
    impose(model, task, where, lambda number, rows, columns: ("circulant", seed + number))
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="train circulants")
