"""Interleaved rANS: several states that take turns, decoded through a table of all slots. The coder for speed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featherweight.coding.bits import Ints, Reader, entropy_bits, list_bits, pack_list, varint
from featherweight.errors import FormatError

MOST = 16  # bits of the table of slots; a state has 32, of which 16 move at a time
PRECISIONS = (9, 10, 11, 12, 14)  # that a writer tries; a table of 2**12 slots of 8 bytes fits the nearest cache
WORTH = 0.995  # a larger table must save so much
STATES = ((1 << 10, 1), (1 << 13, 4))  # symbols below which so many states take turns; 8 beyond


def interleaved_rans(symbols: Ints, size: int) -> bytes:
    """The code of symbols below `size`: precision and states, table of frequencies, words, states.

    Duda, "Asymmetric numeral systems: entropy coding combining speed of Huffman coding with compression rate of
    arithmetic coding", arXiv:1311.2540, 2013; Giesen, "Interleaved entropy coders", arXiv:1402.3392, 2014: N states
    take turns, so that a processor works on all of them at once; all share one stream of words.

    Departs from the papers: states of 32 bits that move 16 at a time; the frequencies are those of the stream, rounded.
    """
    from featherweight.coding.rans_kernels import encode

    counts = np.bincount(symbols, minlength=size)
    bits, frequencies = _table(counts)
    lanes = next((number for below, number in STATES if len(symbols) < below), 8)
    states, words = encode(symbols, frequencies, bits, lanes)
    head = bytes([bits | (lanes.bit_length() - 1) << 5]) + pack_list(frequencies) + varint(len(words))
    return head + states.astype("<u4").tobytes() + words.astype("<u2").tobytes()


def _table(counts: Ints) -> tuple[int, Ints]:
    """The fewest bits of precision that are about the shortest, and frequencies that add up to 2**bits."""
    least = max(int(np.count_nonzero(counts) - 1).bit_length(), 1)
    tried = [bits for bits in PRECISIONS if bits >= least] or [MOST]
    made = [(bits, normalised(counts, bits)) for bits in tried]
    sizes = [_bits(counts, frequencies, bits) for bits, frequencies in made]
    best = min(range(len(made)), key=lambda i: sizes[i])
    return next(one for one, size in zip(made, sizes, strict=True) if size * WORTH <= sizes[best])


def _bits(counts: Ints, frequencies: Ints, bits: int) -> float:
    used = counts > 0
    return float((counts[used] * (bits - np.log2(frequencies[used]))).sum()) + list_bits(frequencies)


def normalised(counts: Ints, bits: int) -> Ints:
    """Frequencies that add up to 2**bits, at least 1 for a symbol that occurs: what is over or missing falls where it
    costs least."""
    counts = counts if counts.any() else np.eye(1, len(counts), dtype=np.int64)[0]  # of nothing, all is the first
    total, target = int(counts.sum()), 1 << bits
    exact = counts * (target / total)
    found = np.where(counts > 0, np.maximum(np.rint(exact), 1), 0).astype(np.int64)
    while (over := int(found.sum()) - target) != 0:
        step = -1 if over > 0 else 1
        able = np.flatnonzero(found > 1) if over > 0 else np.flatnonzero(found > 0)
        cost = counts[able] * np.log2(found[able] / (found[able] + step))
        some = able[np.argsort(cost, kind="stable")[: abs(over)]]
        found[some] += step
    return found


def interleaved_size(counts: Ints) -> float:
    """Bytes of the code of symbols with these counts, about."""
    total = int(counts.sum())
    table = list_bits(np.ceil(counts * (1024 / max(total, 1))).astype(np.int64))
    return (entropy_bits(counts) * 1.003 + table) / 8 + 5 + 4 * next((n for below, n in STATES if total < below), 8)


def interleaved_decode(reader: Reader, count: int, size: int) -> NDArray[Any]:
    """`count` symbols below `size`, in the narrowest unsigned type.

    Raises:
        FormatError: the code is none that a writer makes.
    """
    from featherweight.coding.rans_kernels import decode, read_list, slots

    first = reader.byte()
    bits, lanes = first & 31, 1 << (first >> 5)
    frequencies = np.zeros(size, dtype=np.int64)
    near = np.frombuffer(reader.data, np.uint8, min(8 * size + 1, reader.left), reader.position)
    taken = read_list(near, frequencies) if len(near) else -1
    fits = 0 < bits <= MOST and lanes <= 8 and taken > 0 and 0 <= frequencies.min() <= frequencies.max() <= 1 << bits
    if not fits or int(frequencies.sum()) != 1 << bits:
        raise FormatError("the file is corrupt: a table of frequencies does not fill its slots")
    reader.take(taken)
    words = reader.varint()
    states = np.frombuffer(reader.take(4 * lanes), dtype="<u4").astype(np.uint64)
    code = np.frombuffer(reader.code(2 * words), dtype="<u2").astype(np.uint16)
    symbols = np.empty(count, dtype=np.uint8 if size <= 256 else np.uint16)
    if states.min() < 1 << 16 or not decode(code, states, slots(frequencies, bits), bits, symbols):
        raise FormatError("the file is corrupt: the words of an interleaved code do not fit its symbols")
    return symbols
