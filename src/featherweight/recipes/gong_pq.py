"""Product quantization of weights (Gong et al., 2014): pieces of rows share few codewords; no training, no data."""

from __future__ import annotations

from typing import Literal

from torch import nn

from featherweight.allowed import Bits, Count, Share
from featherweight.catalogue import recipe
from featherweight.core.ledger import note, skip
from featherweight.core.site import Site, sites
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task
from featherweight.core.vectors import affordable, blocks, cluster_vectors, columns_axis, divided, hold, matrix_of, told
from featherweight.errors import CompressionError
from featherweight.share import narrow


@recipe(
    paper="Gong et al., 2014, arXiv:1412.6115, section 3.2",
    family="share",
    shrinks={"bits"},
    small={"codebook_share": 0.25, "dim": 2, "iterations": 10},
)
def gong_pq(
    model: nn.Module,
    task: Task,
    *,
    index_bits: Bits = 4,
    dim: Count = 4,
    codebook_share: Share = 0.125,
    pieces: Literal["rows", "channels"] = "rows",
    iterations: Count = 50,
    where: WhereWeighted = None,
) -> nn.Module:
    """Cuts the columns of a layer into blocks and replaces the pieces of each block by the nearest of its codewords.

    Yunchao Gong, Liu Liu, Ming Yang, Lubomir Bourdev, "Compressing Deep Convolutional Networks using Vector
    Quantization", 2014, arXiv:1412.6115, section 3.2: `W = [W_1, ..., W_s]`, and for each block `min sum_z sum_j
    |w_z - c_j|^2` by k-means; a layer of m rows costs `m s log2 k` bits, and `32 k n` for its codebooks. The columns of
    a convolution are its inputs times its kernel; or its inputs alone, and all places of the kernel share codewords.

    Departs from the paper: the paper's k = 256 pays only for rows in their thousands (at 4096 rows the codebooks are
    half of the file), so here k is 16 and falls until the codebooks cost no more than `codebook_share` of the float
    weights; a layer of too few rows for that is left alone, and that is said. All blocks of a layer have one length,
    the largest one up to `dim` that divides the columns. Convolutions are quantized too (where="Linear" is the paper's
    choice). Zeros stay zeros: k-means counts only the weights that are left, and the file then holds values.

    Args:
        index_bits: bits of a piece's index, so that a block has at most `2 ** index_bits` codewords.
        dim: at most so many weights in a piece.
        codebook_share: what the codebooks of a layer may cost, as a share of its float weights.
        pieces: of a convolution: "rows" cuts all that an output reads, "channels" its input channels, with codewords
            for all places of the kernel (many more pieces for each codebook).
        iterations: of k-means, at most.
        where: which layers; all linear and convolution layers when left out.

    Raises:
        UnknownName: a pattern matches nothing.
        CompressionError: no layer can afford two codewords.
    """
    found = sites(model, where)
    axes = {path: columns_axis(site) if pieces == "channels" else None for path, site in found.items()}
    done = [
        quantize_pieces(model, site, 2**index_bits, dim, codebook_share, iterations, axes[path])
        for path, site in found.items()
    ]
    if not any(done):
        raise CompressionError(
            f"no chosen layer has rows enough for two codewords at codebook_share={codebook_share:g}: pass a larger one"
        )
    return model


def quantize_pieces(
    model: nn.Module, site: Site, words: int, dim: int, share: float, iterations: int, axis: int | None = None
) -> bool:
    """Product quantization of one layer; False, and a remark, if it is left alone."""
    weight = site.weight
    kept = weight != 0
    if not kept.any():
        skip(site.path, "all its weights are zero")
        return False
    matrix = matrix_of(weight, axis)
    if not (words := affordable(site, len(matrix), words, share)):
        return False
    dim = divided(matrix.shape[1], dim)
    codebooks, index = cluster_vectors(blocks(matrix, dim), words, blocks(matrix_of(kept, axis), dim), iterations)
    hold(model, site, codebooks, narrow(index), kept, axis)
    error = float((site.weight - weight).norm() / weight.norm())
    note(f"{site.path}: {told(site, codebooks)}, off by {error:.1%}")
    return True
