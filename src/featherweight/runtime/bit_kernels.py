"""The loops of bit-packed layers, compiled by numba; with NUMBA_DISABLE_JIT=1 the same Python runs as it stands.

A value is `(2 q - z) * h`: q an unsigned integer of a few bits, of which bit plane i is packed into words of 64, z an
integer (an odd one for signs, whose grid has no zero), h half the grid's step. So the products of integers are
`sum (2 q - z)(2 q' - z') = 4 sum_ij 2^(i+j) popcount(plane_i & plane'_j) - 2 z' sum q - 2 z sum q' + K z z'`,
and for signs `K - 2 popcount(plane ^ plane')`. Both are
`base - beta * sum q + 4 counts`, with -2 in the place of 4 for signs.
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
SPAN = 32  # blocks of outputs whose sums a thread keeps: with ROWS rows 8 kB


class Quantizer(NamedTuple):
    """How a float becomes an integer: `clamp(round(x * inverse) + zero, low, high) - low`, or the sign.

    With `sign` it is 1 where the value is at least the `shift` of its channel, else 0.
    """

    sign: bool
    shift: Any
    inverse: Any
    zero: Any
    low: Any
    high: Any


class Numbers(NamedTuple):
    """What becomes of the counts: `(base - beta sum q + 4 counts) * scale + bias`, with `xor` -2 in the place of 4.

    Arrays with a value for every output.
    With thresholds (an array that is not empty) +1 where `direction * product >= threshold`, else -1.
    """

    xor: bool
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
def level(value: Any, channel: int, how: Quantizer) -> Any:
    """The unsigned integer of a value."""
    if how.sign:
        return np.int32(value >= how.shift[channel])
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
                    word |= np.uint64((level(x[n, start + c], start + c, how) >> i) & 1) << np.uint64(c)
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
                channel = w * WORD + c
                values = flat[channel, start : start + count]
                for i in range(bits):
                    row = held[i]
                    for j in range(count):
                        row[j] |= np.uint64((level(values[j], g * channels + channel, how) >> i) & 1) << np.uint64(c)
            for i in range(bits):
                for j in range(count):
                    y, at = (start + j) // width, (start + j) % width
                    words[n, g, i, w, origin[0] + y, origin[1] + at] = held[i, j]


@njit(cache=True, nogil=True)
def _multiply(
    xor: bool, taken: int, rows: tuple[Any, int, int], lanes: tuple[Any, int, int], length: int, sums: Any, to: int
) -> None:
    """Adds the products of `taken` rows (ROWS or one) with a block of LANES to sums (ROWS, ...), from column `to`.

    That is `4 sum_ij 2^(i+j) popcount(plane i of a row & plane j of a lane)`, or `-2 popcount(row ^ lane)`.

    Args:
        rows: words, where the first row starts, its planes; rows follow each other, and so do the planes of one.
        lanes: words, where the block starts, its planes.
    """
    words, at, planes = rows
    block, start, others = lanes
    stride = planes * length
    if xor and taken == ROWS:
        differing_four(words, at, stride, block, start, length, 1, sums, to)
    elif xor:
        differing_one(words, at, stride, block, start, length, 1, sums, to)
    else:
        for i in range(planes):
            for j in range(others):
                row, lane = at + i * length, start + j * length * LANES
                if taken == ROWS:
                    common_four(words, row, stride, block, lane, length, 2 + i + j, sums, to)
                else:
                    common_one(words, row, stride, block, lane, length, 2 + i + j, sums, to)


@njit(cache=True, nogil=True)
def linear(x: Any, lanes: Any, planes: int, numbers: Numbers, out: Any, first: int, last: int) -> None:
    """out (n, o) from x (n, bits, words) as packed and `lanes` (blocks, planes, words, LANES), flat.

    `first` to `last` count blocks of LANES outputs; the numbers are there for whole blocks.
    """
    batch, bits, length = x.shape
    words, size = x.reshape(-1), planes * length * LANES
    totals = np.zeros(batch, dtype=np.int32)
    for n in range(0 if numbers.xor else batch):
        for i in range(bits):
            for k in range(length):
                totals[n] += popcount(x[n, i, k]) << i
    sums = np.zeros((ROWS, SPAN * LANES), dtype=np.int32)
    for start in range(first, last, SPAN):
        o, blocks = start * LANES, min(SPAN, last - start)
        base, beta = numbers.base[o:], numbers.beta[o:]  # an index from zero is known to be none from the end
        n = 0
        while n < batch:
            taken = ROWS if n + ROWS <= batch else 1
            for r in range(taken):
                row, total = sums[r], totals[n + r]
                for lane in range(blocks * LANES):
                    row[lane] = np.int32(base[lane] - beta[lane] * total)
            for b in range(blocks):
                rows, block = (words, n * bits * length, bits), (lanes, (start + b) * size, planes)
                _multiply(numbers.xor, taken, rows, block, length, sums, b * LANES)
            for r in range(taken):
                _write_row(sums[r], o, numbers, out[n + r, o : o + blocks * LANES])
            n += taken


@njit(cache=True, nogil=True)
def _write_row(sums: Any, o: int, numbers: Numbers, row: Any) -> None:
    """Products of outputs from o on as they leave the layer."""
    if numbers.threshold.size:
        direction, threshold = numbers.direction[o:], numbers.threshold[o:]
        for lane in range(row.size):
            row[lane] = np.float32(1) if direction[lane] * sums[lane] >= threshold[lane] else np.float32(-1)
    else:
        scale, bias = numbers.scale[o:], numbers.bias[o:]
        for lane in range(row.size):
            row[lane] = np.float32(sums[lane]) * scale[lane] + bias[lane]


@njit(cache=True, nogil=True)
def _gather(image: Any, where: Taps, origin: int, lanes: Any) -> None:
    """Patches of LANES pixels of an image (bits, words of channels, positions), side by side, plane after plane.

    Bit `tap * channels + c` of a lane is channel c at that tap. Lanes beyond the last pixel repeat it.
    """
    bits, depth, _ = image.shape
    length = (where.taps.size * where.channels + WORD - 1) // WORD
    corners = np.empty(LANES, dtype=np.int64)
    for lane in range(LANES):
        corners[lane] = where.corners[min(origin + lane, where.corners.size - 1)]
    for i in range(bits):
        for t in range(where.taps.size):
            for w in range(depth):
                row, bit = image[i, w], t * where.channels + w * WORD
                into, start = bit % WORD, (i * length + bit // WORD) * LANES
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
    outputs, pixels, span = out.shape[1] // groups, out.shape[2], where.together * LANES
    _, planes, length = rows.shape
    words, size = rows.reshape(-1), bits * length * LANES
    runs = (pixels + span - 1) // span
    patches = np.zeros(where.together * size, dtype=np.uint64)
    totals, sums = np.zeros(span, dtype=np.int32), np.zeros((ROWS, span), dtype=np.int32)
    for job in range(first, last):
        n, g, origin = job // (groups * runs), job // runs % groups, job % runs * span
        present = min(span, pixels - origin)
        kinds, blocks = where.kinds[origin : origin + span], (present + LANES - 1) // LANES
        for b in range(blocks):
            _gather(x[n, g], where, origin + b * LANES, patches[b * size :])
            if not numbers.xor:
                _sum(patches[b * size :], bits, length, totals[b * LANES :])
        o = 0
        while o < outputs:
            taken = ROWS if o + ROWS <= outputs else 1
            for r in range(taken):
                q = g * outputs + o + r
                row, base, beta = sums[r], numbers.base[q], numbers.beta[q]
                for lane in range(present):
                    row[lane] = np.int32(base[kinds[lane]] - beta * totals[lane])
            for b in range(blocks):
                four = (words, (g * outputs + o) * planes * length, planes)
                _multiply(numbers.xor, taken, four, (patches, b * size, bits), length, sums, b * LANES)
            for r in range(taken):
                q = g * outputs + o + r
                _write(sums[r], q, numbers, out[n, q, origin : origin + present])
            o += taken


@njit(cache=True, nogil=True)
def _write(sums: Any, q: int, numbers: Numbers, row: Any) -> None:
    """Products of output q as they leave the layer."""
    if numbers.threshold.size:
        direction, threshold = numbers.direction[q], numbers.threshold[q]
        for lane in range(row.size):
            row[lane] = np.float32(1) if direction * sums[lane] >= threshold else np.float32(-1)
    else:
        scale, bias = numbers.scale[q], numbers.bias[q]
        for lane in range(row.size):
            row[lane] = np.float32(sums[lane]) * scale + bias
