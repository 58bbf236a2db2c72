"""Taylor pruning: feature maps go without which the loss changes least, to first order, a few after every few steps.

Pavlo Molchanov, Stephen Tyree, Tero Karras, Timo Aila, Jan Kautz, "Pruning Convolutional Neural Networks for Resource
Efficient Inference", ICLR 2017, arXiv:1611.06440: for every sample t the mean over positions m of gradient
times activation, `Theta_k = mean_t |1/M sum_m dC/dz_tmk z_tmk|`; the scores of a layer are divided by their l2 norm,
`lambda` times the operations of a map may be taken off, and all maps are ranked together. Training goes on between the
removals.

Departs from the paper: the network is trained in rounds between which equally many maps go, not one map every 10 or 30
batches; products are taken behind the batch norm and before the ReLU, where they are the same; scores come from
calibration batches with the network as it is at evaluation; `flops` is 0 unless it is set (1e-3 in the paper); maps
that a residual sum couples go together by the sum of their scores; kept maps are rounded up to whole vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.catalogue import ingredient, method
from featherweight.core.site import Site


@ingredient("score", grain="filter")
def taylor_activation(site: Site) -> Tensor:
    """Mean over the samples of |mean over positions of activation times gradient|, for each output, (outputs,)."""
    gates = site.data.gates().get(site.path)
    if gates is None:
        return site.stays()
    positions = site.data.activations(number_of_positions)[site.path].sum() / len(site.data.batches())
    return gates.abs().mean(0) / positions


def number_of_positions(activation: Tensor) -> Tensor:
    return torch.full((1, 1), float(activation[0, 0].numel()))


taylor_act = method(
    "prune",
    score=taylor_activation,
    grain="filter",
    scope="global",
    normalise="l2",
    prune_ratio=0.5,
    schedule="linear",
    rounds=16,
    epochs=8,
    finetune=8,
    lr=1e-3,
    optimizer="sgd",
    paper="Molchanov et al., ICLR 2017, arXiv:1611.06440",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"rounds": 2, "epochs": 1, "finetune": 1, "round_to": 1},
)
