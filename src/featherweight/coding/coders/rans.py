"""Asymmetric numeral systems in their range variant: any number of bits per symbol, last in first out."""

from __future__ import annotations

import constriction
import numpy as np

from featherweight.catalogue import recipe
from featherweight.coding.bits import Ints, Reader, varint
from featherweight.coding.frequencies import (
    categorical,
    frequency_table,
    read_frequencies,
    write_frequencies,
)
from featherweight.errors import FormatError


@recipe(paper="Duda, arXiv:1311.2540, 2013", family="code", kind="coder", aliases=("ans",))
def rans(symbols: Ints, size: int) -> bytes:
    """Range ANS: table of frequencies, length in bytes, code. Within two bytes of the entropy at any skew.

    Departs from the paper: 32-bit words, a 64-bit state that starts empty, probabilities in units of 2**-24.
    """
    frequencies = frequency_table(np.bincount(symbols, minlength=size))
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols.astype(np.int32), categorical(frequencies))
    # the last word is never zero, but its leading bytes may be: the reader puts them back
    data = coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")
    return write_frequencies(frequencies) + varint(len(data)) + data


def rans_decode(reader: Reader, count: int, size: int) -> Ints:
    """`count` symbols below `size`.

    Raises:
        FormatError: the code is none that a writer makes.
    """
    model = categorical(read_frequencies(reader, size))
    data = reader.code(reader.varint())
    if data.endswith(b"\0"):
        raise FormatError("the file is corrupt: an ANS code ends in a zero")
    words = np.frombuffer(data + b"\0" * (-len(data) % 4), dtype="<u4").astype(np.uint32)
    coder = constriction.stream.stack.AnsCoder(words)
    symbols = np.asarray(coder.decode(model, count), dtype=np.int64)
    if not coder.is_empty():
        raise FormatError("the file is corrupt: an ANS code holds more symbols than are declared")
    return symbols
