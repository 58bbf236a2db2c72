"""Sub-vectors of a weight that share few codewords: k-means of many blocks at once, and the form that holds them.

A weight is a matrix (rows, columns); its columns are cut into m blocks of d, and the pieces of all rows in a block
become k codewords (Jegou, Douze and Schmid, "Product quantization for nearest neighbor search", TPAMI 2011). Rows are
outputs; or, with the axis of the input channels as columns, outputs and places of the kernel, which then share words.
"""

from __future__ import annotations

from math import prod
from typing import final

import torch
from torch import Tensor, nn

from featherweight.core.forms import Codes, Form, Product, attach
from featherweight.core.ledger import note, skip
from featherweight.core.site import Site

CHUNK = 2**24
"""Distances that are held at a time, in float64."""


@final
class Codewords(Form):
    """`weight = Product(codebooks, axis)` of an index (rows, m); the free parameters are the codebooks (m, k, d).

    Of t stages the index is (t, rows, m), the codebooks are (t, m, k, d).
    """

    stands = ("weight",)
    stores = "free"
    settings = ("shape", "axis")
    index: Tensor

    def __init__(self, codebooks: Tensor, index: Tensor, shape: tuple[int, ...], axis: int | None = None) -> None:
        super().__init__()
        self.shape, self.axis = list(shape), axis
        self.register_buffer("index", index)
        self._start = codebooks.detach().clone()

    def free(self, weight: Tensor) -> tuple[Tensor, ...]:
        return (self._start,)

    def unsound(self) -> str:
        sizes = isinstance(self.shape, list) and all(isinstance(n, int) and 0 < n < 1 << 31 for n in self.shape)
        sizes = sizes and (self.axis is None or self.axis in range(len(self.shape)))
        whole = self._buffers.keys() == {"index"} and not self.index.is_floating_point() and not self.index.is_complex()
        return "" if sizes and whole else "without a shape and integers as its index"

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (codebooks,) = free
        return Product(codebooks, self.axis).decode(self.index, tuple(self.shape))

    def codes(self, *free: Tensor, keep: Tensor | None = None) -> Codes | None:
        (codebooks,) = free
        return Codes(self.index.detach().cpu(), Product(codebooks.detach().cpu(), self.axis), tuple(self.shape))


def divided(columns: int, dim: int) -> int:
    """The largest length of a block, no more than `dim`, of which the columns are whole blocks.

    >>> divided(784, 4), divided(75, 4)
    (4, 3)
    """
    return next(d for d in range(min(dim, columns), 0, -1) if columns % d == 0)


def columns_axis(site: Site) -> int | None:
    """The axis of a convolution's input channels, if its kernel has several places; None for all other layers."""
    return 1 if isinstance(site.module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and prod(site.weight.shape[2:]) > 1 else None


def matrix_of(weight: Tensor, axis: int | None) -> Tensor:
    """A weight as (rows, columns): the columns are that axis, or all but the first.

    >>> matrix_of(torch.arange(8).view(1, 2, 2, 2), 1).tolist()
    [[0, 4], [1, 5], [2, 6], [3, 7]]
    """
    return weight.flatten(1) if axis is None else weight.movedim(axis, -1).flatten(0, -2)


def blocks(matrix: Tensor, dim: int) -> Tensor:
    """The pieces (m, rows, d) of a matrix (rows, columns) in blocks of d columns."""
    return matrix.view(len(matrix), -1, dim).transpose(0, 1)


def affordable(site: Site, rows: int, words: int, share: float, stages: int = 1) -> int:
    """How many codewords, at most, cost no more than a share of the layer's float weights; 0 and a remark if not two.

    The codebooks hold `stages * k * columns` numbers, the weight `rows * columns`: only the rows count.
    """
    count = min(words, int(share * rows / stages + 1e-9))
    if count >= 2:
        return count
    least = 2 * stages / rows
    skip(site.path, f"codebooks of two words would cost {least:.0%} of its weights, over codebook_share={share:g}")
    return 0


def hold(model: nn.Module, site: Site, codebooks: Tensor, index: Tensor, kept: Tensor, axis: int | None = None) -> None:
    """Puts codewords on a layer; where `kept` (of the weight's shape) is False its zeros stay zeros, by a mask."""
    if not bool(kept.all()):
        site.set_mask(model, kept)
        note(f"{site.path}: it has zeros, which stay: the file holds values, not codewords")
    form = Codewords(codebooks.to(site.weight), index, tuple(site.weight.shape), axis)
    attach(site.module, form, at=site.name, root=model)


def told(site: Site, codebooks: Tensor) -> str:
    """What the codes of a layer cost, in words."""
    words, dim = codebooks.shape[-2], codebooks.shape[-1]
    stages = len(codebooks) if codebooks.dim() == 4 else 1
    pieces, values = stages * site.weight.numel() // dim, codebooks.numel()
    bits = (pieces * max(1, (words - 1).bit_length()) + 32 * values) / site.weight.numel()
    each = f"{words} words" if stages == 1 else f"{stages} times {words} words"
    return f"{each} for pieces of {dim}, {bits:.2f} bits a weight with the codebooks"


def cluster_vectors(
    points: Tensor, words: int, keep: Tensor | None = None, iterations: int = 50
) -> tuple[Tensor, Tensor]:
    """k-means of m sets at once: points (m, n, d) -> codebooks (m, k, d) in float64, index (n, m).

    It starts by k-means++ (Arthur and Vassilvitskii, SODA 2007), with draws from torch's generator. Where `keep` (of
    the shape of the points) is False, a coordinate counts neither in distances nor in means. The objective never
    increases; a codeword that loses all its points stays where it is.
    """
    x = points.detach().to("cpu", torch.float64)
    counts = torch.ones_like(x) if keep is None else keep.to("cpu", torch.float64)
    step = max(1, CHUNK // max(1, x.shape[1] * words))
    parts = [_clustered(*both, words, iterations) for both in zip(x.split(step), counts.split(step), strict=True)]
    index = torch.cat([part for _, part in parts]).T.contiguous()
    return torch.cat([book for book, _ in parts]), index


def _clustered(x: Tensor, counts: Tensor, words: int, iterations: int) -> tuple[Tensor, Tensor]:
    books = _spread(x, counts, words)
    index = distances(x, books, counts).argmin(-1)
    for _ in range(iterations):
        books = means(x, index, books, counts)
        moved = distances(x, books, counts).argmin(-1)
        if torch.equal(moved, index):
            break
        index = moved
    return books, index


def _spread(x: Tensor, counts: Tensor, words: int) -> Tensor:
    """k-means++: each word a point, drawn in proportion to its squared distance from the words before."""
    rows = torch.arange(len(x))
    first = torch.randint(x.shape[1], (len(x),))
    chosen, nearest = [x[rows, first]], torch.full(x.shape[:2], torch.inf, dtype=x.dtype)
    for _ in range(words - 1):
        nearest = torch.minimum(nearest, distances(x, chosen[-1][:, None], counts)[..., 0].clamp_min(0))
        odds = torch.where(nearest.sum(1, keepdim=True) > 0, nearest, 1.0)
        chosen.append(x[rows, torch.multinomial(odds, 1)[:, 0]])
    return torch.stack(chosen, 1)


def distances(x: Tensor, books: Tensor, counts: Tensor) -> Tensor:
    """Squared distances (m, n, k) over the coordinates that count."""
    squares = (counts * x.square()).sum(-1, keepdim=True)
    return squares - 2 * (counts * x) @ books.mT + counts @ books.square().mT


def means(x: Tensor, index: Tensor, books: Tensor, counts: Tensor) -> Tensor:
    """The codebooks (m, k, d) after every word moved to the mean of its points; `index` is (m, n)."""
    place = index[..., None].expand_as(x)
    total = torch.zeros_like(books).scatter_add_(1, place, counts * x)
    number = torch.zeros_like(books).scatter_add_(1, place, counts)
    return torch.where(number > 0, total / number.clamp_min(1), books)


def chosen(codebooks: Tensor, index: Tensor) -> Tensor:
    """The pieces (m, n, d) that codebooks (m, k, d) and an index (n, m) stand for."""
    return codebooks.gather(1, index.long().T[..., None].expand(-1, -1, codebooks.shape[-1]))
