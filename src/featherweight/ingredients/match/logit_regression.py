"""Regression on the teacher's logits: a shallow student mimics what a deep teacher puts out before its softmax.

Source: Ba and Caruana, Do Deep Nets Really Need to be Deep?, NIPS 2014, arXiv:1312.6184, eq. 1.
Departs from the paper: the student is whatever network is given; the paper's linear bottleneck, W = U V in place of a
wide layer, is what the factorizing methods make of a layer. The targets are not standardised for each class. Labels can
have a share of the loss, the paper trains on logits alone. Outputs that are no class scores are compared all the same.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from featherweight.catalogue import ingredient, method
from featherweight.core.features import Taps, scores


@ingredient("match", where="logits")
def squared_logits(student: Taps, teacher: Taps, batch: Any, progress: float, *, centred: bool = False) -> Tensor:
    """`1 / (2 B) sum_i ||z_S(x_i) - z_T(x_i)||^2`, a scalar.

    Args:
        centred: logits minus their mean in each sample, as a softmax does not see that mean.

    >>> import torch
    >>> float(squared_logits({"": torch.tensor([[1.0, 3.0]])}, {"": torch.tensor([[0.0, 0.0]])}, None, 0.0))
    5.0
    """
    ours, theirs = scores(student, teacher)
    if centred:
        ours, theirs = (z - z.mean(1, keepdim=True) for z in (ours, theirs))
    return 0.5 * (ours - theirs).square().sum(1).mean()


logit_regression = method(
    "distill",
    match=squared_logits,
    labels=0.0,
    weight=1.0,
    paper="Ba and Caruana, NIPS 2014, arXiv:1312.6184",
    needs={"train", "teacher"},
    small={"epochs": 1, "labels": 0.1},
)
