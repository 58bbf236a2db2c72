"""Importance estimation: channels go whose squared first-order effect on the loss is smallest.

Pavlo Molchanov, Arun Mallya, Stephen Tyree, Iuri Frosio, Jan Kautz, "Importance Estimation for Neural Network Pruning",
CVPR 2019, arXiv:1906.10771: a gate of one stands behind the batch norm of every channel; the squared change of the loss
when it closes is to first order `I_k = (dL/dz_k)^2`, with the gradient of a batch's mean loss, averaged over batches.
All channels are ranked together, without normalising layers; training goes on between the removals.

Departs from the paper: the network is trained in rounds, and the batches of each are looked at after its training, at
evaluation, in place of a running mean (momentum 0.9) over the steps of training; gates of layers that a residual sum
couples are squared and then averaged, where the paper shares one gate and divides by the number of its uses;
kept channels are rounded up to whole vectors. A batch's gradient shrinks as the batch grows, so that the score depends
on the batch size; that changes the scale of all scores alike as far as samples are independent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.catalogue import ingredient, method
from featherweight.core.site import Site


@ingredient("score", grain="filter")
def taylor_squared(site: Site) -> Tensor:
    """Mean over batches of the squared gradient of the batch's loss by a gate on each output, (outputs,)."""
    gates = site.data.gates().get(site.path)
    if gates is None:
        return site.stays()
    return torch.stack([rows.mean(0).square() for rows in gates.double().split(site.data.sizes())]).mean(0)


taylor_fo_sq = method(
    "prune",
    score=taylor_squared,
    grain="filter",
    scope="global",
    coupled="mean",
    prune_ratio=0.28,
    schedule="linear",
    rounds=16,
    epochs=8,
    finetune=17,
    lr=1e-3,
    optimizer="sgd",
    paper="Molchanov et al., CVPR 2019, arXiv:1906.10771",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"rounds": 2, "epochs": 1, "finetune": 1, "round_to": 1},
)
