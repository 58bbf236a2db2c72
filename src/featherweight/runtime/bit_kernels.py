"""The loops of bit-packed layers, compiled by numba; with NUMBA_DISABLE_JIT=1 the same Python runs as it stands.

A value is `(2 q - z) * h`: q an unsigned integer of a few bits, of which bit plane i is packed into words of 64, z an
integer (an odd one for signs, whose grid has no zero), h half the grid's step. So the products of integers are
`sum (2 q - z)(2 q' - z') = 4 sum_ij 2^(i+j) popcount(plane_i & plane'_j) - 2 z' sum q - 2 z sum q' + K z z'`,
and for signs `K - 2 popcount(plane ^ plane')`. Both are `alpha * counts - beta * sum q + base`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from featherweight.runtime.popcounts import (
    LANES,
    ROWS,
    common_four,
    common_one,
    differing_four,
    differing_one,
    popcount,
)

PIECE = 512  # values of one channel whose bits are gathered at a time: eight planes of words fit the first cache
WORD = 64


class Quantizer(NamedTuple):
    """How a float becomes an integer: by its sign, or as `clamp(round(x * inverse) + zero, low, high) - low`."""

    sign: bool
    inverse: Any
    zero: Any
    low: Any
    high: Any


class Numbers(NamedTuple):
    """What becomes of the counts: `(alpha counts - beta sum q + base) * scale + bias`, arrays with a value an output.

    With thresholds (an array that is not empty) +1 where `direction * product >= threshold`, else -1.
    """

    xor: bool
    alpha: int
    beta: Any
    scale: Any
    bias: Any
    threshold: Any
    direction: Any
    base: Any


class Taps(NamedTuple):
    """Where a convolution reads: offsets into the positions of a padded image, of pixels and from there of taps.

    A pixel's kind says which taps of it lie on the image: `base` (outputs, kinds) is that of these taps alone.
    """

    channels: int
    taps: Any
    corners: Any
    kinds: Any
    together: int  # blocks of LANES pixels that are worked on at a time


@njit(cache=True, nogil=True)
def level(value: Any, how: Quantizer) -> Any:
    """The unsigned integer of a value."""
    if how.sign:
        return np.int32(value >= 0)
    return np.int32(min(max(np.rint(value * how.inverse) + how.zero, how.low), how.high) - how.low)


@njit(cache=True, nogil=True)
def pack_rows(x: Any, how: Quantizer, words: Any, first: int, last: int) -> None:
    """Rows `first` to `last` of x (n, k) to words (n, bits, ceil(k / 64)): bit c % 64 of word c // 64 is of x[:, c]."""
    bits, length = words.shape[1], words.shape[2]
    for n in range(first, last):
        for w in range(length):
            start = w * WORD
            for i in range(bits):
                word = np.uint64(0)
                for c in range(min(WORD, x.shape[1] - start)):
                    word |= np.uint64((level(x[n, start + c], how) >> i) & 1) << np.uint64(c)
                words[n, i, w] = word


@njit(cache=True, nogil=True)
def pack_images(x: Any, how: Quantizer, words: Any, origin: tuple[int, int], first: int, last: int) -> None:
    """x (n, groups, c, h, w) to words (n, groups, bits, ceil(c / 64), h + ..., w + ...), which are zero before.

    `origin` is where the image starts. `first` to `last` count (n, group, word of channels).
    """
    _, groups, channels, height, width = x.shape
    bits, length = words.shape[2], words.shape[3]
    held = np.zeros((bits, PIECE), dtype=np.uint64)
    for job in range(first, last):
        n, g, w = job // (groups * length), job // length % groups, job % length
        flat = x[n, g].reshape(channels, height * width)
        for start in range(0, height * width, PIECE):
            count = min(PIECE, height * width - start)
            held[:] = 0
            for c in range(min(WORD, channels - w * WORD)):
                values = flat[w * WORD + c, start : start + count]
                for i in range(bits):
                    row = held[i]
                    for j in range(count):
                        row[j] |= np.uint64((level(values[j], how) >> i) & 1) << np.uint64(c)
            for i in range(bits):
                for j in range(count):
                    y, at = (start + j) // width, (start + j) % width
                    words[n, g, i, w, origin[0] + y, origin[1] + at] = held[i, j]


@njit(cache=True, nogil=True)
def _count(
    xor: bool, taken: int, rows: tuple[Any, int, int], lanes: tuple[Any, int, int], length: int, counts: Any
) -> None:
    """`counts[r, lane] = sum_ij 2^(i+j) popcount(plane i of row r op plane j of the lanes)`, for ROWS rows or one.

    Args:
        rows: words, where the first row starts, its planes; rows follow each other, and so do the planes of one.
        lanes: words, where the block of LANES starts, its planes.
    """
    words, at, planes = rows
    block, start, others = lanes
    for i in range(taken * LANES):
        counts[i] = 0
    for i in range(planes):
        for j in range(others):
            row, column, stride = at + i * length, start + j * length * LANES, planes * length
            if taken == ROWS:
                if xor:
                    differing_four(words, row, stride, block, column, length, i + j, counts)
                else:
                    common_four(words, row, stride, block, column, length, i + j, counts)
            elif xor:
                differing_one(words, row, stride, block, column, length, i + j, counts)
            else:
                common_one(words, row, stride, block, column, length, i + j, counts)


@njit(cache=True, nogil=True)
def _ended(product: Any, o: int, numbers: Numbers) -> Any:
    """The product of integers of output o as it leaves the layer."""
    if numbers.threshold.size:
        return np.float32(1) if numbers.direction[o] * product >= numbers.threshold[o] else np.float32(-1)
    return np.float32(product) * numbers.scale[o] + numbers.bias[o]


@njit(cache=True, nogil=True)
def linear(x: Any, lanes: Any, planes: int, numbers: Numbers, out: Any, first: int, last: int) -> None:
    """out (n, o) from x (n, bits, words) as packed and `lanes` (blocks, planes, words, LANES), flat.

    `first` to `last` count blocks of LANES outputs.
    """
    batch, bits, length = x.shape
    words, wide = x.reshape(-1), out.shape[1]
    alpha, beta = numbers.alpha, numbers.beta
    sums = np.zeros(batch, dtype=np.int32)
    for n in range(0 if numbers.xor else batch):
        for i in range(bits):
            for k in range(length):
                sums[n] += popcount(x[n, i, k]) << i
    counts = np.zeros(ROWS * LANES, dtype=np.int32)
    for b in range(first, last):
        block = (lanes, b * planes * length * LANES, planes)
        n = 0
        while n < batch:
            taken = ROWS if n + ROWS <= batch else 1
            _count(numbers.xor, taken, (words, n * bits * length, bits), block, length, counts)
            for r in range(taken):
                for lane in range(min(LANES, wide - b * LANES)):
                    o = b * LANES + lane
                    product = alpha * counts[r * LANES + lane] - beta[o] * sums[n + r] + numbers.base[o]
                    out[n + r, o] = _ended(product, o, numbers)
            n += taken


@njit(cache=True, nogil=True)
def _gather(image: Any, where: Taps, corners: Any, lanes: Any) -> None:
    """LANES patches of one plane of an image (words of channels, positions), side by side.

    Bit `tap * channels + c` of lane l is channel c at that tap of the pixel whose corner is l.
    """
    for t in range(where.taps.size):
        for w in range(image.shape[0]):
            row, bit = image[w], t * where.channels + w * WORD
            into, start = bit % WORD, bit // WORD * LANES
            for lane in range(LANES):
                word = row[corners[lane] + where.taps[t]]
                if into == 0:
                    lanes[start + lane] = word
                else:
                    lanes[start + lane] |= word << np.uint64(into)
            if into + min(WORD, where.channels - w * WORD) > WORD:
                for lane in range(LANES):
                    lanes[start + LANES + lane] = row[corners[lane] + where.taps[t]] >> np.uint64(WORD - into)


@njit(cache=True, nogil=True)
def _sum(lanes: Any, bits: int, length: int, sums: Any) -> None:
    """The sum of the integers of each lane."""
    sums[:LANES] = 0
    for i in range(bits):
        for k in range(length):
            for lane in range(LANES):
                sums[lane] += popcount(lanes[(i * length + k) * LANES + lane]) << i


@njit(cache=True, nogil=True)
def convolve(x: Any, rows: Any, where: Taps, numbers: Numbers, out: Any, first: int, last: int) -> None:
    """out (n, o, pixels) from x (n, groups, bits, words of channels, positions) as packed and rows (o, planes, words).

    `first` to `last` count (n, group, run of `together` blocks of LANES pixels).
    """
    _, groups, bits, _, _ = x.shape
    outputs, pixels, together = out.shape[1] // groups, out.shape[2], where.together
    alpha, beta = numbers.alpha, numbers.beta
    _, planes, length = rows.shape
    words, size = rows.reshape(-1), length * LANES
    runs = (pixels + together * LANES - 1) // (together * LANES)
    patches = np.zeros(together * bits * size, dtype=np.uint64)
    corners = np.zeros(together * LANES, dtype=np.int64)
    sums = np.zeros(together * LANES, dtype=np.int32)
    counts = np.zeros(ROWS * LANES, dtype=np.int32)
    for job in range(first, last):
        n, g, run = job // (groups * runs), job // runs % groups, job % runs
        origin = run * together * LANES
        present = min(together * LANES, pixels - origin)
        blocks = (present + LANES - 1) // LANES
        for p in range(blocks * LANES):
            corners[p] = where.corners[min(origin + p, pixels - 1)]
        for b in range(blocks):
            for i in range(bits):
                _gather(x[n, g, i], where, corners[b * LANES :], patches[(b * bits + i) * size :])
            if not numbers.xor:
                _sum(patches[b * bits * size :], bits, length, sums[b * LANES :])
        o = 0
        while o < outputs:
            taken = ROWS if o + ROWS <= outputs else 1
            for b in range(blocks):
                row = (words, (g * outputs + o) * planes * length, planes)
                _count(numbers.xor, taken, row, (patches, b * bits * size, bits), length, counts)
                for r in range(taken):
                    q = g * outputs + o + r
                    for lane in range(min(LANES, present - b * LANES)):
                        p = origin + b * LANES + lane
                        product = alpha * counts[r * LANES + lane] - beta[q] * sums[b * LANES + lane]
                        product += numbers.base[q, where.kinds[p]]
                        out[n, q, p] = _ended(product, q, numbers)
            o += taken
