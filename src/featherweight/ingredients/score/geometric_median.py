"""Filter pruning via geometric median: filters go that the others of their layer could replace.

Yang He, Ping Liu, Ziwei Wang, Zhilan Hu, Yi Yang, "Filter Pruning via Geometric Median for Deep Convolutional Neural
Networks Acceleration", CVPR 2019, arXiv:1811.00250: `g(F_j) = sum_k ||F_j - F_k||_2` over the filters of a
layer; those with the smallest g are nearest to the median of the layer, hence redundant. As in soft filter pruning they
are zeroed at every epoch, learn on, and are removed at the end.

Departs from the paper: by the distances alone, without the tenth that its mixed variant removes by the norm; projection
shortcuts are pruned unless `where` leaves them out; what zeroing and removal do otherwise is said at `sfp`: the first
zeroing comes before the first epoch, the last is the removal, an epoch and a fine-tuning follow it, the learning rate
is constant until then, coupled filters go together by the sum of their scores, and counts are rounded to whole vectors.
20 epochs where the paper has 200 on CIFAR.
"""

from __future__ import annotations

from torch import Tensor, cdist

from featherweight.catalogue import ingredient, method
from featherweight.core.site import Site


@ingredient("score", grain="filter")
def geometric_median(site: Site) -> Tensor:
    """Sum of the distances of every output's weights to those of all others, (outputs,).

    >>> from torch import tensor
    >>> geometric_median(Site.of(tensor([[0.0], [1.0], [9.0]]))).tolist()
    [10.0, 9.0, 17.0]
    """
    rows = site.rows.double()
    return cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


fpgm = method(
    "prune",
    score=geometric_median,
    grain="filter",
    scope="layer",
    prune_ratio=0.4,
    permanence="soft",
    schedule="constant",
    rounds=20,
    epochs=20,
    finetune=10,
    lr=0.01,
    optimizer="sgd",
    paper="He et al., CVPR 2019, arXiv:1811.00250",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"rounds": 3, "epochs": 3, "finetune": 1, "round_to": 1},
)
