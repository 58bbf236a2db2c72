"""Integer frequencies, from which writer and reader build exactly the same model for range coding and ANS."""

from __future__ import annotations

from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from featherweight.coding.bits import Ints, Reader, entropy_bits, list_bits, pack_list, unpack_list
from featherweight.errors import FormatError

TOTAL = 22  # frequencies are scaled to the sum 2**22
PRECISION = 24  # of the coder: probabilities are multiples of 2**-24
ROUNDINGS = tuple(range(4, 15))


def frequency_table(counts: Ints) -> Ints:
    """Frequencies for given counts, rounded as far as the shorter table pays for the longer stream.

    A symbol that occurs has a frequency of at least 1. The sum is at most 2**22.
    """
    return min(_roundings(counts), key=lambda f: list_bits(f) + stream_bits(counts, f))


def estimated_bits(counts: Ints) -> float:
    """About as many bits as table and stream take, found without trying every rounding."""
    total = max(int(counts.sum()), 1)
    few = min(total.bit_length(), 10)
    return entropy_bits(counts) * 1.002 + list_bits(np.ceil(counts * ((1 << few) / total)).astype(np.int64))


def _roundings(counts: Ints) -> list[Ints]:
    total = int(counts.sum())
    exact = [counts] if 0 < total < 1 << TOTAL else []
    wide = len(counts) > 4096  # a table that long is not worth many attempts
    rounded = []
    for bits in (10, 14) if wide else ROUNDINGS:
        scaled = np.rint(counts * ((1 << bits) / max(total, 1))).astype(np.int64)
        rounded.append(np.where(counts > 0, np.maximum(scaled, 1), 0))
    return exact + [f for f in rounded if f.sum() > 0] or [np.ones(len(counts), dtype=np.int64)]


def stream_bits(counts: Ints, frequencies: Ints) -> float:
    """The bits that symbols with these counts take under a model of these frequencies."""
    used = counts > 0
    probability = np.diff(_cumulated(frequencies)) / (1 << TOTAL)
    return float(-(counts[used] * np.log2(probability[used])).sum())


def _cumulated(frequencies: Ints) -> Ints:
    """`floor(2**22 * sum of all before / sum of all)`, one more entry than frequencies; exact integers."""
    sums = np.concatenate([[0], np.cumsum(frequencies)])
    return (sums << TOTAL) // sums[-1]


def categorical(frequencies: Ints) -> Any:
    """The model of the coder. With C the scaled cumulative frequencies and K symbols, symbol i starts at
    `floor(C[i] * (2**24 - K) / 2**22) + i`: all values are exact in double precision, so every machine agrees."""
    scaled = np.diff(_cumulated(frequencies)).astype(np.float64)
    return constriction.stream.model.Categorical(scaled, perfect=False)


def write_frequencies(frequencies: Ints) -> bytes:
    return pack_list(frequencies)


def read_frequencies(reader: Reader, size: int) -> Ints:
    """The frequencies of `size` symbols.

    Raises:
        FormatError: they are none that a writer makes.
    """
    frequencies = unpack_list(reader, size)
    if not 0 < int(frequencies.sum()) <= 1 << TOTAL:
        raise FormatError("the file is corrupt: a table of frequencies has an impossible sum")
    return frequencies


def words_of(data: bytes) -> NDArray[np.uint32]:
    """Little-endian 32-bit words; the bytes of a last, partial word are its most significant ones."""
    rest = len(data) % 4
    whole = data[: len(data) - rest] + (b"\0" * (4 - rest) + data[len(data) - rest :] if rest else b"")
    return np.frombuffer(whole, dtype="<u4").astype(np.uint32)
