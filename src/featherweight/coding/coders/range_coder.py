"""Range coding: any number of bits per symbol, first in first out."""

from __future__ import annotations

import constriction
import numpy as np

from featherweight.catalogue import recipe
from featherweight.coding.bits import Ints, Reader, varint
from featherweight.coding.frequencies import (
    categorical,
    estimated_bits,
    frequency_table,
    read_frequencies,
    words_of,
    write_frequencies,
)
from featherweight.errors import FormatError

SHORT = 1 << 12  # streams of fewer symbols are tried with fewer bytes at the end


@recipe(
    paper="Martin, Video and Data Recording Conference, 1979; Pasco, PhD thesis, Stanford, 1976",
    family="code",
    kind="coder",
    aliases=("range",),
)
def range_coder(symbols: Ints, size: int) -> bytes:
    """Range code: table of frequencies, length in bytes, code. Within a few bytes of the entropy at any skew.

    Departs from the paper: 32-bit words, a 64-bit state, probabilities in units of 2**-24; the last bytes are left out
    where the symbols can be read without them.
    """
    frequencies = frequency_table(np.bincount(symbols, minlength=size))
    encoder = constriction.stream.queue.RangeEncoder()
    model = categorical(frequencies)
    encoder.encode(symbols.astype(np.int32), model)
    data = encoder.get_compressed().astype("<u4").tobytes()
    data = _shortened(data, symbols, model) if len(symbols) < SHORT else data
    return write_frequencies(frequencies) + varint(len(data)) + data


def _shortened(data: bytes, symbols: Ints, model: object) -> bytes:
    """The code with as few bytes of its last word as still decode to the same symbols."""
    head, last = data[:-4], int.from_bytes(data[-4:], "little")
    for kept in range(4):
        unit = 1 << (8 * (4 - kept))
        for word in (last // unit * unit, (last // unit + 1) * unit):
            shorter = head + word.to_bytes(5, "little")[4 - kept : 4]
            if word < 1 << 32 and _decodes(shorter, symbols, model):
                return shorter
    return data


def _decodes(data: bytes, symbols: Ints, model: object) -> bool:
    try:
        found = constriction.stream.queue.RangeDecoder(words_of(data)).decode(model, len(symbols))
    except (AssertionError, ValueError):
        return False
    return bool(np.array_equal(found, symbols))


def entropy_coder_size(counts: Ints) -> float:
    """Bytes of the range code, or of the ANS code, of symbols with these counts."""
    return estimated_bits(counts) / 8 + 3


def range_decode(reader: Reader, count: int, size: int) -> Ints:
    """`count` symbols below `size`.

    Raises:
        FormatError: the code is none that a writer makes.
    """
    model = categorical(read_frequencies(reader, size))
    decoder = constriction.stream.queue.RangeDecoder(words_of(reader.code(reader.varint())))
    try:
        return np.asarray(decoder.decode(model, count), dtype=np.int64)
    except (AssertionError, ValueError):
        raise FormatError("the file is corrupt: a range code is none that fits its table of frequencies") from None
