"""Iterative magnitude pruning with retraining: learning both weights and connections (Han et al., NIPS 2015).

Song Han, Jeff Pool, John Tran, William J. Dally, "Learning both Weights and Connections for Efficient Neural
Networks", NIPS 2015, arXiv:1506.02626: remove the connections below a threshold of `q` standard deviations of their
layer, retrain the survivors from their current values, repeat.

Departs from the paper: the sparsity is given and `q` follows from it (`scope="std"`, one `q` for all layers, taken over
the weights that survive); the dropout correction is left to the task's own network; units that lose all their inputs
are noted, not removed.
"""

from __future__ import annotations

from torch import Tensor

from featherweight.catalogue import ingredient, method
from featherweight.core.site import Site


@ingredient("score", grain="weight")
def magnitude(site: Site) -> Tensor:
    """The absolute value of every weight, of the weight's shape.

    >>> from torch import tensor
    >>> magnitude(Site.of(tensor([[-2.0, 1.0]]))).tolist()
    [[2.0, 1.0]]
    """
    return site.weight.abs()


magnitude_iterative = method(
    "prune",
    score=magnitude,
    paper="Han et al., NIPS 2015, arXiv:1506.02626",
    needs={"labels", "train"},
    shrinks={"weights"},
    small={"epochs": 1, "finetune": 0, "rounds": 2},
)
