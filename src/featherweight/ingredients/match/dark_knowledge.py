"""Which part of a teacher's probabilities helps: its confidence, or what it says of the other classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from featherweight.catalogue import ingredient
from featherweight.core.features import Taps, rows, scores
from featherweight.errors import BadOption


@ingredient("match", where="logits")
def permuted(student: Taps, teacher: Taps, batch: Any, progress: float) -> Tensor:
    """DKPP: `KL(p_T' || p_S)`, the teacher's probabilities but the largest permuted at random, sample by sample.

    Source: Furlanello et al., Born-Again Neural Networks, ICML 2018, sec. 3.3.
    """
    ours, theirs = scores(student, teacher)
    target = permute_others(theirs.softmax(1))
    return F.kl_div(ours.log_softmax(1), target.clamp_min(1e-30).log(), reduction="batchmean", log_target=True)


def permute_others(p: Tensor) -> Tensor:
    """Probabilities (n, classes) with all but the largest of each row in random order.

    >>> p = permute_others(torch.tensor([[0.1, 0.6, 0.3]]))
    >>> round(float(p[0, 1]), 3), sorted(round(float(v), 3) for v in p[0])
    (0.6, [0.1, 0.3, 0.6])
    """
    order = torch.rand_like(p).scatter(1, p.argmax(1, keepdim=True), 2.0).argsort(1)  # the largest one comes last
    others = p.gather(1, order)[:, :-1]
    places = torch.ones_like(p).scatter(1, p.argmax(1, keepdim=True), 0.0).nonzero()[:, 1].view(len(p), -1)
    return p.scatter(1, places, others)


@ingredient("match", where="logits")
def weighted_by_confidence(student: Taps, teacher: Taps, batch: Any, progress: float) -> Tensor:
    """CWTM: `sum_s w_s H(y_s, p_S(x_s))` with `w_s = max p_T(x_s) / sum_u max p_T(x_u)` over the batch.

    Source: Furlanello et al., Born-Again Neural Networks, ICML 2018, sec. 3.3.

    Raises:
        BadOption: the batch has no class for each of its samples.
    """
    ours, theirs = scores(student, teacher)
    labels = _classes(batch, student[""])
    weights = theirs.softmax(1).amax(1)
    return (weights / weights.sum() * F.cross_entropy(ours, labels, reduction="none")).sum()


def _classes(batch: Any, logits: Tensor) -> Tensor:
    last = batch.get("labels") if isinstance(batch, dict) else batch[-1] if isinstance(batch, (tuple, list)) else None
    if not isinstance(last, Tensor) or last.is_floating_point() or last.numel() != len(rows(logits)):
        raise BadOption("the teacher's confidence weights classes, one a sample: choose another form")
    return last.flatten().to(logits.device)
