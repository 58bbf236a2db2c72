"""Residual quantization of weights (Gong et al., 2014): rows as sums of codewords, each for what the last one left."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from featherweight.allowed import Bits, Count, Share
from featherweight.catalogue import recipe
from featherweight.core.ledger import note, skip
from featherweight.core.site import sites
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task
from featherweight.core.vectors import (
    affordable,
    blocks,
    chosen,
    cluster_vectors,
    columns_axis,
    divided,
    hold,
    matrix_of,
    told,
)
from featherweight.errors import CompressionError
from featherweight.share import narrow


@recipe(
    paper="Gong et al., 2014, arXiv:1412.6115, section 3.2",
    family="share",
    shrinks={"bits"},
    small={"codebook_share": 0.25, "pieces": "channels", "iterations": 10},
)
def gong_rq(
    model: nn.Module,
    task: Task,
    *,
    stages: Count = 2,
    index_bits: Bits = 6,
    dim: Count | None = None,
    codebook_share: Share = 0.125,
    pieces: Literal["rows", "channels"] = "rows",
    iterations: Count = 50,
    where: WhereWeighted = None,
) -> nn.Module:
    """Replaces each row of a layer by a sum of codewords: k-means of the rows, then of what that leaves, and again.

    Yunchao Gong, Liu Liu, Ming Yang, Lubomir Bourdev, "Compressing Deep Convolutional Networks using Vector
    Quantization", 2014, arXiv:1412.6115, section 3.2: `w_z ~ c_j^1 + c_j^2 + ... + c_j^t`, the words of stage t by
    k-means of the residuals behind stage t - 1. A layer of m rows and n columns costs `m t log2 k` bits, and `32 t k n`
    for its codebooks. The error never rises from stage to stage.

    Departs from the paper: k falls until the codebooks of all stages cost no more than `codebook_share` of the float
    weights; a layer of too few rows for that is left alone, and that is said. Whole rows share words badly:
    `dim` cuts them into blocks, `pieces="channels"` makes a row of every place of a kernel. Convolutions
    are quantized too (where="Linear" is the paper's choice). Zeros stay zeros: k-means counts only the weights that are
    left, and the file then holds values.

    Args:
        stages: codewords that are added for a row.
        index_bits: bits of an index, so that a stage has at most `2 ** index_bits` codewords.
        dim: at most so many weights in a block of columns; the whole row when left out.
        codebook_share: what the codebooks of a layer may cost, as a share of its float weights.
        pieces: of a convolution: "rows" are all that an output reads, "channels" the input channels of one place of
            the kernel (many more rows for each codebook).
        iterations: of k-means, at most.
        where: which layers; all linear and convolution layers when left out.

    Raises:
        UnknownName: a pattern matches nothing.
        CompressionError: no layer can afford two codewords.
    """
    found, done = sites(model, where), 0
    for path, site in found.items():
        weight, axis = site.weight, columns_axis(site) if pieces == "channels" else None
        kept, matrix = weight != 0, matrix_of(weight, axis)
        if not kept.any():
            skip(path, "all its weights are zero")
        elif words := affordable(site, len(matrix), 2**index_bits, codebook_share, stages):
            width = divided(matrix.shape[1], dim or matrix.shape[1])
            points, counts = blocks(matrix, width), blocks(matrix_of(kept, axis), width)
            codebooks, index = residual_words(points, words, counts, stages, iterations)
            hold(model, site, codebooks, narrow(index), kept, axis)
            error = float((site.weight - weight).norm() / weight.norm())
            note(f"{path}: {told(site, codebooks)}, off by {error:.1%}")
            done += 1
    if not done:
        raise CompressionError(
            f"no chosen layer has rows enough for two codewords at codebook_share={codebook_share:g}: pass a larger one"
        )
    return model


def residual_words(points: Tensor, words: int, counts: Tensor, stages: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Codebooks (t, m, k, d) and index (t, n, m) of points (m, n, d), stage after stage."""
    left, books, index = points.double(), list[Tensor](), list[Tensor]()
    for _ in range(stages):
        own, at = cluster_vectors(left, words, counts, iterations)
        left = left - chosen(own, at)
        books.append(own)
        index.append(at)
    return torch.stack(books), torch.stack(index)
