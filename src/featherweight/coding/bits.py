"""Bits and bytes: a bounded reader, variable-length integers, codes of given widths, lists of small integers.

Bytes are little-endian; bits fill a byte from its most significant end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featherweight.errors import FormatError

Ints = NDArray[np.int64]

MIB = 1 << 20
CHUNK = 1 << 18  # codes that are turned into bits at a time
LONGEST = 40  # bits of the largest integer that a list may hold


class Allowance:
    """The number of bytes that may still be allocated for what a file describes; several readers may share it."""

    def __init__(self, left: int) -> None:
        self.left, self.lock = left, Lock()

    def spend(self, size: int) -> None:
        """Books `size` bytes that are about to be allocated.

        Raises:
            FormatError: the file describes more data than a file of its length may.
        """
        with self.lock:
            self.left -= size
            over = self.left < 0
        if over:
            raise FormatError(
                "the file describes far more data than its length can hold: if you trust it, raise limit="
            )


@dataclass(frozen=True)
class Wanted:
    """What is to be found in a file: weights, codes, floats of which type; `weigh`: also an account of its bytes."""

    weights: bool = True
    codes: bool = True
    dtype: Any = None
    weigh: bool = False


ALL = Wanted()


class Reader:
    """Bytes with a position, and an allowance for what they describe, as a number of bytes or shared with others.

    `coded` counts the bytes that were code words, apart from heads and tables. To `weigh`, the adaptive coders add to
    `spare` by how many bytes theirs are longer than what their models ideally take.
    """

    def __init__(self, data: bytes | memoryview, allowance: int | Allowance, wanted: Wanted = ALL) -> None:
        self.data, self.position, self.end = memoryview(data), 0, len(data)
        self.allowance = allowance if isinstance(allowance, Allowance) else Allowance(allowance)
        self.wanted, self.weigh, self.coded, self.spare = wanted, wanted.weigh, 0, 0.0

    @property
    def left(self) -> int:
        return self.end - self.position

    def take(self, count: int) -> bytes:
        """The next `count` bytes.

        Raises:
            FormatError: there are fewer.
        """
        return bytes(self.view(count))

    def view(self, count: int) -> memoryview:
        """The next `count` bytes, not copied.

        Raises:
            FormatError: there are fewer.
        """
        if count > self.left:
            raise FormatError(
                f"the file is truncated or corrupt: {count} more bytes are declared, {self.left} are left"
            )
        self.position += count
        return self.data[self.position - count : self.position]

    def code(self, count: int) -> bytes:
        """The next `count` bytes, which are code words.

        Raises:
            FormatError: there are fewer.
        """
        self.coded += count
        return self.take(count)

    def byte(self) -> int:
        if self.position >= self.end:
            self.take(1)
        self.position += 1
        return self.data[self.position - 1]

    def varint(self) -> int:
        """An unsigned LEB128 integer below 2**63.

        Raises:
            FormatError: it is longer.
        """
        if self.position < self.end and self.data[self.position] < 0x80:
            self.position += 1
            return self.data[self.position - 1]
        value = 0
        for shift in range(0, 63, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise FormatError("the file is corrupt: an integer is longer than 63 bits")

    def signed(self) -> int:
        """A zigzag LEB128 integer."""
        return unzigzag(self.varint())

    def spend(self, size: int) -> None:
        """Books `size` bytes that are about to be allocated.

        Raises:
            FormatError: the file describes more data than a file of its length may.
        """
        self.allowance.spend(size)


def varint(value: int) -> bytes:
    """LEB128: seven bits a byte, least significant first; the high bit says that more follow.

    >>> varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def zigzag(value: int) -> int:
    """0, -1, 1, -2, 2 as 0, 1, 2, 3, 4."""
    return value * 2 if value >= 0 else -value * 2 - 1


def unzigzag(value: int) -> int:
    return value >> 1 if value % 2 == 0 else -(value >> 1) - 1


# --- codes of given widths --------------------------------------------------------------------------------------------


def pack(values: NDArray[Any], widths: NDArray[Any]) -> bytes:
    """Each value in as many bits as its width says, one after the other; the last byte is filled with zeros.

    >>> pack(np.array([1, 5]), np.array([1, 4])).hex()
    'a8'
    """
    pieces = []
    for start in range(0, len(values), CHUNK):
        value, width = values[start : start + CHUNK].astype(np.int64), widths[start : start + CHUNK].astype(np.int64)
        ends = np.cumsum(width)
        shift = np.repeat(ends, width) - np.arange(ends[-1]) - 1
        pieces.append((np.repeat(value, width) >> shift & 1).astype(np.uint8))
    return np.packbits(np.concatenate(pieces)).tobytes() if pieces else b""


def pack_fixed(values: NDArray[Any], width: int) -> bytes:
    """Each value in `width` bits."""
    if width == 8:
        return values.astype(np.uint8).tobytes()
    return pack(values, np.full(len(values), width)) if width else b""


def unpack_fixed(data: bytes, count: int, width: int) -> Ints:
    """`count` values of `width` bits; `data` has at least that many bits."""
    if width == 0 or count == 0:
        return np.zeros(count, dtype=np.int64)
    if width == 8:
        return np.frombuffer(data, dtype=np.uint8, count=count).astype(np.int64)
    out = np.zeros(count, dtype=np.int64)
    step = CHUNK & ~7  # chunks start at whole bytes
    for start in range(0, count, step):
        some = min(step, count - start)
        first = start * width // 8
        piece = np.frombuffer(data[first : first + -(-some * width // 8)], dtype=np.uint8)
        bits = np.unpackbits(piece, count=some * width).reshape(some, width)
        for place in range(width):
            out[start : start + some] = out[start : start + some] << 1 | bits[:, place]
    return out


# --- lists of small integers ------------------------------------------------------------------------------------------

DELTA = 0x10


def pack_list(values: Sequence[int] | Ints) -> bytes:
    """A list of non-negative integers whose length the reader knows.

    One byte of parameters: the order k of the Exp-Golomb code in the low four bits, 0x10 if the integers are the
    zigzag differences of the list; then the codes. Whatever is shortest.
    """
    plain = np.asarray(values, dtype=np.int64)
    steps = np.diff(plain, prepend=0)
    delta = np.where(steps >= 0, steps * 2, -steps * 2 - 1)
    options = [(_golomb_bits(v, k), flag | k, v) for flag, v in ((0, plain), (DELTA, delta)) for k in range(16)]
    _, parameters, chosen = min(options, key=lambda option: option[:2])
    shifted = chosen + (1 << (parameters & 15))
    return bytes([parameters]) + pack(shifted, 2 * bit_lengths(shifted) - 1 - (parameters & 15))


def list_bits(values: Sequence[int] | Ints) -> int:
    """About as many bits as `pack_list` takes, found without trying every order."""
    plain = np.asarray(values, dtype=np.int64)
    middle = min(int(plain.mean()).bit_length(), 15) if len(plain) else 0
    return 8 + min(_golomb_bits(plain, k) for k in range(max(0, middle - 2), min(16, middle + 2)))


def _golomb_bits(values: Ints, k: int) -> int:
    return int((2 * bit_lengths(values + (1 << k)) - 1 - k).sum())


def bit_lengths(values: Ints) -> Ints:
    """The number of bits of positive integers below 2**52."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


def unpack_list(reader: Reader, count: int) -> Ints:
    """The list of `count` integers that `pack_list` wrote.

    Raises:
        FormatError: it is truncated, or holds an integer that no list may hold.
    """
    parameters = reader.byte()
    k = parameters & 15
    if parameters & ~0x1F:
        raise FormatError("the file is corrupt: a list of integers has unknown parameters")
    if count > reader.left * 8:
        raise FormatError(f"the file is truncated or corrupt: {count} integers are declared in {reader.left} bytes")
    window = reader.data[reader.position : reader.position + count * LONGEST // 4 + 1]
    bits = bin(int.from_bytes(b"\x01" + window, "big"))[3:]
    out, at = [], 0
    for _ in range(count):
        one = bits.find("1", at)
        end = one + (one - at) + k + 1
        if one < 0 or one - at > LONGEST or end > len(bits):
            raise FormatError("the file is corrupt: a list of integers does not end")
        out.append(int(bits[one:end], 2) - (1 << k))
        at = end
    reader.take(-(-at // 8))
    values = np.array(out, dtype=np.int64)
    if parameters & DELTA:
        values = np.cumsum(np.where(values % 2 == 0, values >> 1, -(values >> 1) - 1))
    if len(values) and (values.min() < 0 or values.max() >= 1 << LONGEST):
        raise FormatError("the file is corrupt: a list of integers leaves its range")
    return values


def entropy_bits(counts: Iterable[int] | Ints) -> float:
    """The order-0 entropy of all symbols that were counted, in bits.

    >>> entropy_bits([2, 2, 0])
    4.0
    """
    used = np.asarray(counts, dtype=np.float64)
    used = used[used > 0]
    return float((used * (np.log2(used.sum()) - np.log2(used))).sum()) if len(used) > 1 else 0.0
