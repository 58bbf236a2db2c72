"""Rows as a multiset: what the order of hidden units would cost is not written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from featherweight.catalogue import recipe
from featherweight.coding.bits import Ints, Reader, varint
from featherweight.errors import FormatError

APART = 4  # with fewer rows than this to a run, on the average, each row is one of its own


@recipe(paper="Basu and Varshney, DCC 2017, arXiv:1804.02800", family="code", kind="coder")
def unlabeled_graph(symbols: Ints, size: int, widths: Sequence[int] = ()) -> bytes:
    """Rows in ascending order by their counts: how many begin with each symbol, of these how many go on with each, ...

    A row is all that belongs to one output. Rows in another order are broken into ascending runs; where these are
    short, every row is told by itself. `universal_source_coding` brings rows into ascending order.

    Departs from the paper: the chances of symbols, which it takes as known, are learned on the way (a Krichevsky and
    Trofimov estimate for each bit of a symbol: counts are beta-binomial instead of binomial); networks are decoded
    as a whole, not a neuron at a time while they are evaluated.
    """
    from featherweight.coding.multiset_kernels import MOST, encode, runs

    width = next((w for w in widths[:1] if 0 < w <= len(symbols) and len(symbols) % w == 0), max(len(symbols), 1))
    rows = symbols.reshape(-1, width)
    ends = runs(rows)
    lengths = np.diff(np.flatnonzero(ends), prepend=-1)
    if len(lengths) * APART > len(rows) or len(rows) > MOST:
        ends[:], lengths = True, lengths[:0]
    told = varint(len(lengths)) + b"".join(varint(int(n)) for n in lengths[:-1])
    data = encode(rows, ends, _bits(size)).tobytes()
    kept = data[: max(len(data) - 4, 0)] + data[-4:].rstrip(b"\0")  # what is not there reads as zero
    return varint(width) + told + varint(len(kept)) + kept


def _bits(size: int) -> int:
    return max(size - 1, 0).bit_length()


def unlabeled_graph_decode(reader: Reader, count: int, size: int) -> Ints:
    """`count` symbols below `size`.

    Raises:
        FormatError: the code is none that a writer makes.
    """
    from featherweight.coding.context_kernels import ready
    from featherweight.coding.multiset_kernels import MOST, decode

    width, several = reader.varint(), reader.varint()
    if width == 0 or count % width or several > min(count // width, MOST) or (several and count // width > MOST):
        raise FormatError("the file is corrupt: rows of a multiset do not fill their tensor")
    last = np.cumsum([reader.varint() for _ in range(several - 1)], dtype=np.float64)
    ends = np.full(count // width, not several)
    if several:
        if len(last) and not (last[0] > 0 and (np.diff(last) > 0).all() and last[-1] < len(ends)):
            raise FormatError("the file is corrupt: runs of rows are empty, or more than there are rows")
        ends[last.astype(np.int64) - 1] = ends[-1] = True
    data = reader.code(reader.varint())
    if data[:4] == b"\xff" * 4:  # such a code lies beyond the first range, and would grow without end
        raise FormatError("the file is corrupt: the first bytes of a multiset are impossible")
    state = ready(reader.weigh)
    rows, used = decode(np.frombuffer(data, dtype=np.uint8), ends, width, _bits(size), state)
    reader.spare += len(data) - state[3] / (8 << 24) if reader.weigh else 0
    symbols = np.asarray(rows.reshape(-1), dtype=np.int64)
    if used < len(data) or (count and int(symbols.max()) >= size):
        raise FormatError("the file is corrupt: a multiset goes on, or leaves its alphabet")
    return symbols
