"""Sobolev training: the student has the teacher's outputs, and its outputs' derivatives by the input.

Source: Czarnecki, Osindero, Jaderberg, Swirszcz and Pascanu, Sobolev Training for Neural Networks, NIPS 2017,
arXiv:1706.04859, eq. 1 and sec. 3.
Departs from the paper: the outputs are compared by half their squared distance; the derivatives along one random
direction of the outputs for each sample and step, scaled so that the mean over directions is the squared distance of
the Jacobians. Batch norms that train couple the samples of a batch, so that a sample's derivative contains the others'.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from featherweight.allowed import Amount
from featherweight.catalogue import ingredient, method
from featherweight.core.features import INPUT, Taps, scores


@ingredient("match", where="logits", inputs=True)
def values_and_derivatives(
    student: Taps, teacher: Taps, batch: Any, progress: float, *, derivative: Amount = 1.0, normalise: bool = False
) -> Tensor:
    """`1/B sum 1/2 ||s(x) - t(x)||^2 + lambda C ||d<s(x), v>/dx - d<t(x), v>/dx||^2`, v uniform on the unit sphere.

    C is the number of outputs of a sample; the mean over v of `C ||...||^2` is `||J_S - J_T||_F^2`.

    Args:
        derivative: lambda.
        normalise: the derivatives of each sample have norm 1.
    """
    ours, theirs = scores(student, teacher)
    values = 0.5 * (ours - theirs).square().sum(1).mean()
    v = F.normalize(torch.randn_like(student[""]).flatten(1), dim=1).view_as(student[""])
    (ds,) = torch.autograd.grad((student[""] * v).sum(), student[INPUT], create_graph=True)
    (dt,) = torch.autograd.grad((teacher[""] * v).sum(), teacher[INPUT], retain_graph=True)
    gaps = [F.normalize(d.flatten(1), dim=1) if normalise else d.flatten(1) for d in (ds, dt.detach())]
    count = v[0].numel()
    return values + derivative * count * (gaps[0] - gaps[1]).square().sum(1).mean()


sobolev = method(
    "distill",
    match=values_and_derivatives,
    labels=0.0,
    weight=1.0,
    paper="Czarnecki et al., NIPS 2017, arXiv:1706.04859",
    needs={"train", "teacher"},
    small={"epochs": 1, "labels": 0.1},
)
