"""Soft filter pruning: the filters with the smallest l2 norms are zero for an epoch, learn on, and are chosen anew.

Yang He, Guoliang Kang, Xuanyi Dong, Yanwei Fu, Yi Yang, "Soft Filter Pruning for Accelerating Deep Convolutional Neural
Networks", IJCAI 2018, arXiv:1808.06866: after every epoch `N P` filters of every layer are set
to zero, `||F_j||_2` deciding; in the next epoch all filters are updated; the zero ones are removed at the end.

Departs from the paper: the first zeroing comes before the first epoch and not behind it, and the last one is the
removal, behind which an epoch and the fine-tuning follow, because a removal takes the shifts of the batch norms along,
which zeroed filters still had (where that shift is not positive, the ReLU behind it lets no gradient through and the
filter stays zero, here as in the paper); 20 epochs where the paper has 200 on CIFAR; a learning rate that falls in the
fine-tuning alone; filters that a residual sum couples go together by the sum of their norms; kept filters are rounded
up to whole vectors.
"""

from __future__ import annotations

from torch import Tensor

from featherweight.catalogue import ingredient, method
from featherweight.core.site import Site


@ingredient("score", grain="filter")
def filter_norm_l2(site: Site) -> Tensor:
    """The l2 norm of the weights of every output, (outputs,).

    >>> from torch import tensor
    >>> filter_norm_l2(Site.of(tensor([[-3.0, 4.0], [0.5, 0.0]]))).tolist()
    [5.0, 0.5]
    """
    return site.rows.norm(dim=1)


sfp = method(
    "prune",
    score=filter_norm_l2,
    grain="filter",
    scope="layer",
    prune_ratio=0.3,
    permanence="soft",
    schedule="constant",
    rounds=20,
    epochs=20,
    finetune=10,
    lr=0.01,
    optimizer="sgd",
    paper="He et al., IJCAI 2018, arXiv:1808.06866",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"rounds": 3, "epochs": 3, "finetune": 1, "round_to": 1},
)
