"""Network trimming: channels go whose activations are zero most of the time.

Hengyuan Hu, Rui Peng, Yu-Wing Tai, Chi-Keung Tang, "Network Trimming: A Data-Driven Neuron Pruning Approach towards
Efficient Deep Architectures", 2016, arXiv:1607.03250: the average percentage of zeros of channel c is
`APoZ_c = sum_n sum_m [O_c(n, m) = 0] / (N M)` over samples n and positions m, behind the nonlinearity. The highest go,
a little at a time, and the survivors are retrained from their own weights.

Departs from the paper: a ratio is given, of all layers ranked together, where the paper takes what lies a deviation
above the mean of a layer, a few layers a round; all layers take part in every round. Layers without zeros (no ReLU
directly behind them or their batch norm, as before a residual sum) have no such score: they and what is coupled to them
stay, and that is said; the ratio is that of the others. Kept channels are rounded up to whole vectors.
"""

from __future__ import annotations

from torch import Tensor

from featherweight.catalogue import ingredient, method
from featherweight.core.site import Site


@ingredient("score", grain="filter")
def zeros(site: Site) -> Tensor:
    """1 - APoZ: the part of its activations that are not zero, for each output; infinite where a layer has no zeros."""
    active = site.data.activations(nonzero).get(site.path)
    if active is None:
        return site.stays()
    found = active.mean(0)
    if found.min() == 1:
        return site.stays("its activations are never zero, which is what this score counts: no ReLU behind it?")
    return found


def nonzero(activation: Tensor) -> Tensor:
    """The part of the positions of every sample and channel that is not zero, (n, channels)."""
    return (activation != 0).flatten(2).double().mean(2) if activation.dim() > 2 else (activation != 0).double()


apoz = method(
    "prune",
    score=zeros,
    grain="filter",
    scope="global",
    prune_ratio=0.3,
    schedule="linear",
    rounds=4,
    epochs=8,
    finetune=8,
    lr=1e-3,
    optimizer="sgd",
    paper="Hu et al., 2016, arXiv:1607.03250",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"rounds": 2, "epochs": 1, "finetune": 1, "round_to": 1},
)
