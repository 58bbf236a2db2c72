"""Canonical Huffman codes: a whole number of bits per symbol, and a table of code lengths only."""

from __future__ import annotations

import heapq

import numpy as np

from featherweight.catalogue import recipe
from featherweight.coding.bits import Ints, Reader, list_bits, pack, pack_list, unpack_list, varint
from featherweight.errors import FormatError

LONGEST = 24  # bits of a code word
SHORT = 1 << 13  # bytes
WINDOW = 1 << 20  # bit positions that are looked at at a time


@recipe(paper="Huffman, Proceedings of the IRE 40(9), 1952", family="code", kind="coder")
def huffman(symbols: Ints, size: int) -> bytes:
    """Canonical Huffman code: table of code lengths, length in bytes, code words.

    The average length L per symbol satisfies H <= L < H + 1 for the entropy H of the symbols. A single symbol that
    fills the stream takes no bits.

    Departs from the paper: code words longer than 24 bits are avoided by halving the counts, which only occurs in
    streams of millions of symbols; the code is canonical (Schwartz and Kallick, CACM 7(3), 1964).

    >>> huffman(np.array([0, 0, 1, 2]), 3).hex()
    '106e012c'
    """
    lengths = code_lengths(np.bincount(symbols, minlength=size))
    table = pack_list(lengths)
    if np.count_nonzero(lengths) <= 1:
        return table
    data = pack(code_words(lengths)[symbols], lengths[symbols])
    return table + varint(len(data)) + data


def huffman_size(counts: Ints) -> float:
    """Bytes of the code of symbols with these counts."""
    lengths = code_lengths(counts)
    bits = int((lengths * counts).sum()) if np.count_nonzero(lengths) > 1 else 0
    return 1 + list_bits(lengths) / 8 + bits / 8 + 1


def code_lengths(counts: Ints) -> Ints:
    """The lengths of optimal prefix codes, 0 for symbols that do not occur; one symbol alone has length 1.

    >>> code_lengths(np.array([4, 2, 1, 1, 0])).tolist()
    [1, 2, 3, 3, 0]
    """
    used = np.flatnonzero(counts)
    lengths = np.zeros(len(counts), dtype=np.int64)
    if len(used) == 1:
        lengths[used] = 1
    if len(used) <= 1:
        return lengths
    weights = counts[used].tolist()
    while True:
        lengths[used] = _tree_depths(weights)
        if lengths.max() <= LONGEST:
            return lengths
        weights = [w // 2 + 1 for w in weights]


def _tree_depths(weights: list[int]) -> list[int]:
    """The depth of each leaf in the tree that joins the two lightest nodes until one is left."""
    heap = [(weight, leaf) for leaf, weight in enumerate(weights)]
    heapq.heapify(heap)
    parent = [0] * (2 * len(weights) - 1)
    for node in range(len(weights), 2 * len(weights) - 1):
        first, left = heapq.heappop(heap)
        second, right = heap[0]
        parent[left] = parent[right] = node
        heapq.heapreplace(heap, (first + second, node))
    depth = [0] * len(parent)
    for node in range(len(parent) - 2, -1, -1):
        depth[node] = depth[parent[node]] + 1
    return depth[: len(weights)]


def code_words(lengths: Ints) -> Ints:
    """The canonical code words: in order of (length, symbol), each the one before plus one, shifted to its length."""
    words = np.zeros(len(lengths), dtype=np.int64)
    word = last = 0
    for symbol in np.lexsort((np.arange(len(lengths)), lengths)).tolist():
        length = int(lengths[symbol])
        if length:
            word = (word + 1) << (length - last) if last else 0
            words[symbol], last = word, length
    return words


def huffman_decode(reader: Reader, count: int, size: int) -> Ints:
    """`count` symbols below `size`.

    Raises:
        FormatError: the lengths are those of no prefix code, or the code words end too early.
    """
    lengths = unpack_list(reader, size)
    used = np.count_nonzero(lengths)
    if used == 1 and lengths.max() == 1:
        return np.full(count, int(lengths.argmax()), dtype=np.int64)
    if used == 0 or lengths.max() > LONGEST or int((1 << (LONGEST - lengths[lengths > 0])).sum()) != 1 << LONGEST:
        raise FormatError("the file is corrupt: a table of code lengths is that of no prefix code")
    return _decode(reader.code(reader.varint()), count, lengths)


def _decode(data: bytes, count: int, lengths: Ints) -> Ints:
    """Finds the length of a code word at *every* bit position, then walks from word to word."""
    order = np.lexsort((np.arange(len(lengths)), lengths))[np.count_nonzero(lengths == 0) :]
    per_length = np.bincount(lengths, minlength=LONGEST + 1)
    per_length[0] = 0
    ends = np.cumsum(per_length << (LONGEST - np.arange(LONGEST + 1)))  # left-aligned: the first word that is longer
    offsets = np.cumsum(per_length)
    many = len(data) > SHORT and lengths.max() <= 16  # a table of all words of 16 bits is for streams that need it
    short = np.searchsorted(ends, np.arange(1 << 16) << 8, side="right") if many else None
    padded = np.frombuffer(data + b"\0" * 4, dtype=np.uint8)
    out, found, start = np.empty(count, dtype=np.int64), 0, 0
    for base in range(0, len(data) * 8, WINDOW):
        if found == count:
            break
        window = _windows(padded[base // 8 : (base + WINDOW) // 8 + 3])
        length = np.searchsorted(ends, window, side="right") if short is None else short[window >> 8]
        after = (np.arange(len(window)) + length).tolist()
        here: list[int] = []
        at, room = start - base, count - found
        while at < len(after) and len(here) < room:
            here.append(at)
            at = after[at]
        start = base + at
        word, long = window[here], length[here]
        rank = offsets[long] - 1 - ((ends[long] - 1 - word) >> (LONGEST - long))
        out[found : found + len(here)] = order[rank]
        found += len(here)
    if found < count or start > len(data) * 8:
        raise FormatError(f"the file is truncated or corrupt: {count} code words are declared, {found} are there")
    return out


def _windows(data: np.typing.NDArray[np.uint8]) -> Ints:
    """The 24 bits that start at each bit of all bytes but the last three."""
    wide = data.astype(np.int64)
    word = wide[:-3] << 24 | wide[1:-2] << 16 | wide[2:-1] << 8 | wide[3:]
    return (word[:, None] >> np.arange(8, 0, -1) & ((1 << LONGEST) - 1)).reshape(-1)
