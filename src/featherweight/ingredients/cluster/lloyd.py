"""Weight sharing by k-means with trained centroids (Han et al., ICLR 2016): the second stage of Deep Compression.

Song Han, Huizi Mao, William J. Dally, "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained
Quantization and Huffman Coding", ICLR 2016, arXiv:1510.00149, section 3: the weights of a layer share `k` values, which
are then trained; the gradient of a value is the sum over its weights.

Departs from the paper: nothing known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.catalogue import ingredient, method


@ingredient("cluster")
def lloyd(values: Tensor, centroids: Tensor, iterations: int = 300) -> Tensor:
    """The centroids (k,) after Lloyd's iterations on values of any shape, ascending, in float64.

    On a line a cluster is an interval of the sorted values, so that an iteration is k searches and k differences of
    running sums. The objective never increases; a centroid that loses all its values stays where it is.

    >>> lloyd(torch.tensor([0.0, 1.0, 9.0, 10.0]), torch.tensor([0.0, 1.0])).tolist()
    [0.5, 9.5]
    """
    ordered = values.detach().flatten().double().cpu().sort().values
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), ordered.cumsum(0)])
    centroids = centroids.double().sort().values
    for _ in range(iterations):
        ends = torch.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2, right=True)
        edges = torch.cat([torch.tensor([0]), ends, torch.tensor([ordered.numel()])])
        counts = edges.diff()
        moved = torch.where(counts > 0, sums[edges].diff() / counts.clamp(min=1), centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


kmeans_share = method(
    "share",
    cluster=lloyd,
    paper="Han et al., ICLR 2016, arXiv:1510.00149, section 3",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"epochs": 1},
)
