"""Matching the widths of two layers by a 1x1 convolution.

Source: Chou, thesis, 2019, with Chou, Chiu and Liao, APSIPA Transactions 10, 2021, e18.
Departs from the paper: only its abstract was available; that the convolution stands on the student's side, has no bias
and no batch norm, and is trained along from torch's initial weights is inferred. Tokens and vectors, which the paper
does not have, get a linear layer.
"""

from __future__ import annotations

from torch import Tensor, nn

from featherweight.catalogue import ingredient
from featherweight.errors import BadOption


@ingredient("adapter", paper="Chou, Chiu and Liao, APSIPA Transactions on Signal and Information Processing, 2021, e18",
            family="distill")  # fmt: skip
def one_by_one_match(ours: Tensor, theirs: Tensor) -> nn.Module:
    """A 1x1 convolution from the student's channels to the teacher's, without bias; a linear layer behind no maps.

    It stands on the student's side: one on the teacher's would have the trivial solution 0.

    Raises:
        BadOption: one has maps and the other has none.

    >>> import torch
    >>> one_by_one_match(torch.zeros(2, 8, 6, 6), torch.zeros(2, 16, 4, 4))
    Conv2d(8, 16, kernel_size=(1, 1), stride=(1, 1), bias=False)
    """
    if ours.dim() != theirs.dim():
        raise BadOption(
            f"features of shape {tuple(ours.shape[1:])} and {tuple(theirs.shape[1:])} cannot be joined: "
            "pass layers that both put out maps, or both vectors"
        )
    if ours.dim() == 4:
        return nn.Conv2d(ours.shape[1], theirs.shape[1], 1, bias=False)
    return nn.Linear(ours.shape[-1], theirs.shape[-1], bias=False)
