"""Which entries of a weight live and die together: the grain at which weights are masked."""

from __future__ import annotations

import re
from typing import Annotated

import torch
from annotated_types import Predicate
from torch import Tensor

from featherweight.errors import BadOption

_PAIR = re.compile(r"([1-9]\d*)(:|x)([1-9]\d*)")
NAMED = ("weight", "kernel", "shape", "filter")


def is_grain(text: str) -> bool:
    """Whether this names a grain.

    >>> [is_grain(text) for text in ("weight", "2:4", "16x16", "4:2", "row")]
    [True, True, True, False, False]
    """
    pair = _PAIR.fullmatch(text)
    return text in NAMED or (pair is not None and (pair[2] == "x" or int(pair[1]) < int(pair[3])))


Grain = Annotated[str, Predicate(is_grain)]


def pattern_of(grain: str) -> tuple[int, int] | None:
    """(N, M) of a grain "N:M": of every M neighbouring inputs N stay."""
    pair = _PAIR.fullmatch(grain)
    return (int(pair[1]), int(pair[3])) if pair is not None and pair[2] == ":" else None


def units(shape: tuple[int, ...], grain: str) -> Tensor:
    """The number of the unit that each entry belongs to, from 0, of the given shape (out, in, ...).

    Args:
        grain: "weight" (every entry by itself), "kernel" (what joins one input to one output), "shape" (the same place
            in every filter, as in structured sparsity learning), "RxC" (blocks of R outputs by C of what they read).

    >>> units((2, 4), "2x2").tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    if not is_grain(grain):
        raise BadOption(
            f"grain={grain!r}: must be weight, kernel, shape, filter, N:M such as 2:4, or RxC such as 16x16"
        )
    places = torch.arange(torch.Size(shape).numel()).view(shape)
    if grain == "weight" or pattern_of(grain):
        return places
    rows = shape[0]
    if grain == "kernel":
        number = torch.arange(rows * shape[1]).view(rows, shape[1], *[1] * (len(shape) - 2))
        return number.expand(shape).contiguous()
    if grain == "shape":
        return (places % (places.numel() // rows)).contiguous()
    if grain == "filter":
        return (places // (places.numel() // rows)).contiguous()
    height, width = (int(text) for text in grain.split("x"))
    columns = places.numel() // rows
    down, along = torch.arange(rows) // height, torch.arange(columns) // width
    return (down[:, None] * (-(-columns // width)) + along[None, :]).view(shape)


def pooled(values: Tensor, numbers: Tensor) -> Tensor:
    """Mean of the values of each unit, by the unit's number."""
    count = int(numbers.max()) + 1 if numbers.numel() else 0
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, numbers.flatten(), values.flatten().double().cpu())
    return total / torch.bincount(numbers.flatten(), minlength=count)


def all_but(scores: Tensor, n: int, m: int) -> Tensor:
    """Marks all but the `n` highest of every `m` neighbouring inputs, along dimension 1; ties go by index.

    A rest of fewer than `m` inputs keeps `n`, or all it has.

    >>> all_but(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), 2, 4).tolist()
    [[False, True, False, True]]
    """
    along = scores.movedim(1, -1)
    marked = torch.zeros(along.shape, dtype=torch.bool)
    for start in range(0, along.shape[-1], m):
        part = along[..., start : start + m]
        order = part.argsort(dim=-1, descending=True, stable=True)[..., n:]
        marked[..., start : start + m].scatter_(-1, order, True)
    return marked.movedim(-1, 1)
