"""Context-adaptive binary arithmetic coding of integer weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from featherweight.catalogue import recipe
from featherweight.coding.bits import Ints, Reader, varint
from featherweight.errors import FormatError

RATES = ((4, 7), (5, 9), (6, 11))  # shifts of the fast and the slow estimate that a writer tries


@recipe(paper="Wiedemann et al., IEEE JSTSP 2020, arXiv:1905.08318", family="code", kind="coder", aliases=("cabac",))
def deepcabac(symbols: Ints, size: int, widths: Sequence[int] = ()) -> bytes:
    """Adaptive binary code: no table, every bin's probability is learned from its neighbours on the way (section III).

    A symbol is told by its distance from the most frequent one: whether it is that one, the sign, flags for greater
    than 1 to 14, an Exp-Golomb code beyond.

    Args:
        widths: lengths of a row that are tried; the symbol above, one row back, is one of the neighbours.

    Departs from the paper: contexts are the two symbols before and the one above (the paper's is the one before); two
    estimates for each probability, as the standard that followed it has; the quantization that the paper couples
    with its coder (rate-distortion optimised rounding) is a method of its own and not done here.
    """
    from featherweight.coding.context_kernels import encode

    centre = int(np.bincount(symbols).argmax()) if len(symbols) else 0
    values = symbols.astype(np.int64) - centre
    made: list[bytes] = []
    rows = [w for w in dict.fromkeys(widths) if 0 < w < len(symbols)] or [max(len(symbols), 1)]
    fast, slow = RATES[0]
    for width in rows:
        made.append(_head(centre, width, fast, slow) + _sized(encode(values, width, fast, slow)))
    best = rows[min(range(len(rows)), key=lambda i: len(made[i]))]
    for fast, slow in RATES[1:]:
        made.append(_head(centre, best, fast, slow) + _sized(encode(values, best, fast, slow)))
    return min(made, key=len)


def _head(centre: int, width: int, fast: int, slow: int) -> bytes:
    return varint(centre) + varint(width) + bytes([fast | slow << 4])


def _sized(code: np.ndarray) -> bytes:
    data = code.tobytes().rstrip(b"\0")  # what is not there reads as zero
    return varint(len(data)) + data


def deepcabac_decode(reader: Reader, count: int, size: int) -> Ints:
    """`count` symbols below `size`.

    Raises:
        FormatError: the code is none that a writer makes.
    """
    from featherweight.coding.context_kernels import decode, ready

    centre, width, rates = reader.varint(), reader.varint(), reader.byte()
    fast, slow = rates & 15, rates >> 4
    data = reader.code(reader.varint())
    outside = data[:4] == b"\xff" * 4  # such a code lies beyond the first range, and would grow without end
    if centre >= size or not 0 < width < 1 << 48 or not fast or not slow or outside or data.endswith(b"\0"):
        raise FormatError("the file is corrupt: the head of a context-adaptive code is impossible")
    state = ready(reader.weigh)
    values, used = decode(np.frombuffer(data, dtype=np.uint8), count, width, fast, slow, state)
    reader.spare += len(data) - state[3] / (8 << 24) if reader.weigh else 0
    symbols = values + centre
    if used < len(data) or (count and not 0 <= int(symbols.min()) <= int(symbols.max()) < size):
        raise FormatError("the file is corrupt: a context-adaptive code goes on, or leaves its alphabet")
    return np.asarray(symbols, dtype=np.int64)
