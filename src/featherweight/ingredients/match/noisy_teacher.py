"""Logits of a teacher with noise on them: one teacher plays many.

Source: Sau and Balasubramanian, Deep Model Compression: Distilling Knowledge from Noisy Teachers, 2016,
arXiv:1610.09650.
Departs from the paper: whether the noise is one number a sample or one a logit is a setting; a sample of logits is hit
with a probability, the samples of a batch independently, or all of them together as in a public implementation.

The noise is no regulariser of the expected loss: under squares `E ||z'_T - z_S||^2 = ||z_T - z_S||^2 + alpha sigma^2
||z_T||^2`, and what is added does not depend on the student. Only the gradient's variance grows.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from featherweight.allowed import Amount, Share
from featherweight.catalogue import ingredient, method
from featherweight.core.features import Taps, scores


@ingredient("match", where="logits")
def noisy_logits(
    student: Taps,
    teacher: Taps,
    batch: Any,
    progress: float,
    *,
    share: Share = 0.5,
    variance: Amount = 0.1,
    hits: Literal["sample", "batch"] = "sample",
    noise: Literal["elementwise", "scalar"] = "elementwise",
) -> Tensor:
    """`1 / (2 B) sum ||z_S - z'_T||^2` with `z'_T = (1 + xi) z_T` in a share of the samples, `xi ~ N(0, sigma^2)`.

    Args:
        share: alpha, the probability that a sample's logits get noise.
        variance: sigma^2.
        hits: whether samples are hit one by one, or a whole batch.
        noise: one xi a logit, or one a sample.
    """
    ours, theirs = scores(student, teacher)
    xi = variance**0.5 * torch.randn_like(theirs if noise == "elementwise" else theirs[:, :1])
    hit = torch.rand_like(theirs[:, :1] if hits == "sample" else theirs[:1, :1]) < share
    return 0.5 * (ours - theirs * (1 + xi * hit)).square().sum(1).mean()


noisy_teacher = method(
    "distill",
    match=noisy_logits,
    labels=0.0,
    weight=1.0,
    paper="Sau and Balasubramanian, 2016, arXiv:1610.09650",
    needs={"train", "teacher"},
    small={"epochs": 1},
)
