"""Attention by gradients: where a small change of the input would change the student's loss, as it would the teacher's.

Source: Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, arXiv:1612.03928, sec. 3.2.
Departs from the paper: the norm of the difference is taken sample by sample and averaged over the batch; a batch norm
that trains couples the samples, so that the student's gradient by one input contains what it does to the others. The
symmetric form, which asks for the same gradient of a mirrored image, is not offered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from featherweight.catalogue import ingredient, method
from featherweight.core.features import INPUT, Taps, rows, scores
from featherweight.errors import BadOption


@ingredient("match", where="logits", inputs=True)
def input_gradients(student: Taps, teacher: Taps, batch: Any, progress: float) -> Tensor:
    """`1/2 mean_i ||J_S(x_i) - J_T(x_i)||` with `J = dH(y, p)/dx`, of the cross-entropy summed over the batch.

    Raises:
        BadOption: the batch has no class for each of its samples.
    """
    scores(student, teacher)  # the same classes
    labels = classes(batch, student[""])
    ours, theirs = (
        torch.autograd.grad(
            F.cross_entropy(rows(taps[""]), labels, reduction="sum"), taps[INPUT], create_graph=own, retain_graph=True
        )[0].flatten(1)
        for taps, own in ((student, True), (teacher, False))
    )
    return 0.5 * ((ours - theirs.detach()).square().sum(1) + 1e-12).sqrt().mean()


def classes(batch: Any, logits: Tensor) -> Tensor:
    """The classes of a batch (inputs, labels), one a row of logits.

    Raises:
        BadOption: there are none.
    """
    last = batch.get("labels") if isinstance(batch, dict) else batch[-1] if isinstance(batch, (tuple, list)) else None
    if not isinstance(last, Tensor) or last.is_floating_point() or last.numel() != len(rows(logits)):
        raise BadOption("the gradient of the loss is that of classes, one a sample: choose sobolev")
    return last.flatten().to(logits.device)


attention_transfer_gradient = method(
    "distill",
    match=input_gradients,
    labels=1.0,
    weight=1.0,
    paper="Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928",
    needs={"labels", "train", "teacher"},
    small={"epochs": 1},
)
