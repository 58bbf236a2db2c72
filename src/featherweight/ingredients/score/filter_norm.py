"""Pruning filters for efficient ConvNets: the filters with the smallest l1 norms go (Li et al., ICLR 2017).

Hao Li, Asim Kadav, Igor Durdanovic, Hanan Samet, Hans Peter Graf, "Pruning Filters for Efficient ConvNets", ICLR 2017,
arXiv:1608.08710, sec. 3: `s_j = sum |F_ij|` over the inputs i of filter j; the feature maps of the lowest and the
kernels that read them are removed, once for all layers ("independent" scores), then the network is retrained.

Departs from the paper: one ratio for all layers, or a mapping, where the paper chooses layers and ratios by a
sensitivity analysis; filters that a residual sum couples go together by the sum of their norms, where the paper lets
the shortcut decide; kept filters are rounded up to whole vectors.
"""

from __future__ import annotations

from torch import Tensor

from featherweight.catalogue import ingredient, method
from featherweight.core.site import Site


@ingredient("score", grain="filter")
def filter_norm(site: Site) -> Tensor:
    """The l1 norm of the weights of every output, (outputs,).

    >>> from torch import tensor
    >>> filter_norm(Site.of(tensor([[-2.0, 1.0], [0.5, 0.0]]))).tolist()
    [3.0, 0.5]
    """
    return site.rows.abs().sum(1)


pfec_l1 = method(
    "prune",
    score=filter_norm,
    grain="filter",
    scope="layer",
    prune_ratio=0.3,
    rounds=1,
    epochs=0,
    finetune=20,
    lr=1e-3,
    optimizer="sgd",
    paper="Li et al., ICLR 2017, arXiv:1608.08710",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"finetune": 1, "round_to": 1},
)
