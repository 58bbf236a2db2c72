"""A reader of bare .fw files, written from docs/format.md alone: no numpy, no torch, no coding library."""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from math import prod

SIZES = (4, 2, 2, 8, 1, 1, 2, 4, 8, 1, 2, 4, 8, 8, 16, 1, 1)  # bytes of an element, by number of the type
FLOATS = {0, 1, 2, 3, 15, 16}
NARROWER = (None, 2, 1, 0, 4, 5, 6, 7)  # number of the storage -> number of the type
SIGNED = {5, 6, 7, 8}
SYMBOL_TYPES = (4, 5, 6, 7, 8)
ALL = (1 << 64) - 1
Tensor = tuple[int, tuple[int, ...], bytes]


@dataclass
class Bytes:
    data: bytes
    at: int = 0

    def take(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]

    def varint(self) -> int:
        value = shift = 0
        while True:
            (byte,) = self.take(1)
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value


def read_bare(data: bytes) -> list[Tensor]:
    """(number of the type, shape, little-endian elements) of every record of a bare file."""
    assert data[:3] == b"FW\x81"
    assert zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little")
    source = Bytes(data[:-4], 3)
    source.take(source.varint())  # swaps, edits and forms
    found: list[Tensor] = []
    while source.at < len(source.data):
        if source.data[source.at] == 31:
            source.take(1)
            found.append(found[source.varint()])
        else:
            found.append(tensor(source))
    return found


def tensor(source: Bytes) -> Tensor:
    (first,) = source.take(1)
    kind, dims = first & 31, first >> 5
    dims = source.varint() if dims == 7 else dims
    shape = tuple(source.varint() for _ in range(dims))
    (byte,) = source.take(1)
    read = (raw, planes, table, affine, product)[byte & 7]
    return kind, shape, read(source, kind, shape, byte)


def raw(source: Bytes, kind: int, shape: tuple[int, ...], byte: int) -> bytes:
    storage = byte >> 4
    if storage == 15:
        return bytes(prod(shape) * SIZES[kind])
    stored = NARROWER[storage] if storage else kind
    data = source.take(prod(shape) * SIZES[stored])
    if stored == kind:
        return data
    return b"".join(encode(kind, decode(stored, piece)) for piece in pieces(data, SIZES[stored]))


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


def decode(kind: int, data: bytes) -> float | int:
    if kind == 2:
        return struct.unpack("<f", b"\0\0" + data)[0]
    if kind in FLOATS:
        return struct.unpack("<" + "fe?d"[kind], data)[0]
    return int.from_bytes(data, "little", signed=kind in SIGNED)


def encode(kind: int, value: float | int) -> bytes:
    if kind == 2:
        return struct.pack("<f", value)[2:]
    if kind in FLOATS:
        return struct.pack("<" + "fe?d"[kind], value)
    return int(value).to_bytes(SIZES[kind], "little", signed=kind in SIGNED)


def planes(source: Bytes, kind: int, shape: tuple[int, ...], byte: int) -> bytes:
    size = SIZES[kind]
    streams = [symbols(source, prod(shape), 256) for _ in range(size)]
    out = []
    for i in range(prod(shape)):
        word = int.from_bytes(bytes(stream[i] for stream in streams), "little")
        if kind in FLOATS:
            word = word >> 1 | (word & 1) << (8 * size - 1)
        out.append(word.to_bytes(size, "little"))
    return b"".join(out)


def table(source: Bytes, kind: int, shape: tuple[int, ...], byte: int) -> bytes:
    _, (count,), values = tensor(source)
    entries = pieces(values, SIZES[kind])
    return b"".join(entries[s] for s in symbols(source, prod(shape), count))


def affine(source: Bytes, kind: int, shape: tuple[int, ...], byte: int) -> bytes:
    (first,) = source.take(1)
    axis = (first & 31) - 1
    zigzag, size = source.varint(), source.varint()
    low = zigzag >> 1 if zigzag % 2 == 0 else -(zigzag >> 1) - 1
    scale, zero = (
        [decode(k, piece) for piece in pieces(data, SIZES[k])] for k, _, data in (tensor(source), tensor(source))
    )
    after = prod(shape[axis + 1 :]) if axis >= 0 else 1
    out = []
    for i, symbol in enumerate(symbols(source, prod(shape), size)):
        channel = i // after % shape[axis] if axis >= 0 else 0
        offset = low + symbol - zero[channel % len(zero)]
        out.append(encode(kind, offset * scale[channel % len(scale)]))
    return signs(source, kind, out, byte)


def product(source: Bytes, kind: int, shape: tuple[int, ...], byte: int) -> bytes:
    _, (blocks, count, width), data = tensor(source)
    vectors = pieces(data, SIZES[kind] * width)
    chosen = symbols(source, shape[0] * blocks, count)
    joined = b"".join(vectors[i % blocks * count + s] for i, s in enumerate(chosen))
    return signs(source, kind, pieces(joined, SIZES[kind]), byte)


def signs(source: Bytes, kind: int, elements: list[bytes], byte: int) -> bytes:
    if byte & 16:
        zeros = [i for i, e in enumerate(elements) if decode(kind, e) == 0]
        for i, negative in zip(zeros, symbols(source, len(zeros), 2), strict=True):
            elements[i] = encode(kind, -0.0 if negative else 0.0)
    return b"".join(elements)


# --- streams of symbols -----------------------------------------------------------------------------------------------


def symbols(source: Bytes, count: int, size: int) -> list[int]:
    (head,) = source.take(1)
    layout, rest = head & 3, head >> 2
    if layout == 0:
        if size <= 1 or not count:
            return [0] * count
        return (fixed, huffman, range_code, ans)[rest](source, count, size)
    background = source.varint()
    if layout == 2:
        mask = symbols(source, count, 2)
        values = iter(symbols(source, sum(mask), size))
        return [next(values) if kept else background for kept in mask]
    entries = source.varint()
    gaps = symbols(source, entries, 1 << rest)
    values = symbols(source, entries, size)
    out: list[int] = []
    for gap, value in zip(gaps, values, strict=True):
        out += [background] * gap + [value]
    return out + [background] * (count - len(out))


def bit_string(data: bytes) -> str:
    return "".join(f"{byte:08b}" for byte in data)


def fixed(source: Bytes, count: int, size: int) -> list[int]:
    width = (size - 1).bit_length()
    bits = bit_string(source.take(-(-count * width // 8)))
    return [int(bits[i * width : (i + 1) * width], 2) for i in range(count)]


def integers(source: Bytes, count: int) -> list[int]:
    (parameters,) = source.take(1)
    k = parameters & 15
    bits, at, out = bit_string(source.data[source.at :]), 0, []
    for _ in range(count):
        zeros = bits.index("1", at) - at
        end = at + 2 * zeros + k + 1
        out.append(int(bits[at + zeros : end], 2) - (1 << k))
        at = end
    source.take(-(-at // 8))
    if parameters & 16:
        total, steps, out = 0, out, []
        for step in steps:
            total += step >> 1 if step % 2 == 0 else -(step >> 1) - 1
            out.append(total)
    return out


def huffman(source: Bytes, count: int, size: int) -> list[int]:
    lengths = integers(source, size)
    used = sorted((length, symbol) for symbol, length in enumerate(lengths) if length)
    if len(used) == 1:
        return [used[0][1]] * count
    words, word, last = {}, 0, used[0][0]
    for i, (length, symbol) in enumerate(used):
        word = (word + 1) << (length - last) if i else 0
        last = length
        words[f"{word:0{length}b}"] = symbol
    bits, at, out = bit_string(source.take(source.varint())), 0, []
    for _ in range(count):
        end = at + 1
        while bits[at:end] not in words:
            end += 1
        out.append(words[bits[at:end]])
        at = end
    return out


def intervals(frequencies: list[int]) -> list[int]:
    """Where each symbol starts among 2**24, and 2**24."""
    sums = [0]
    for frequency in frequencies:
        sums.append(sums[-1] + frequency)
    scaled = [(s << 22) // sums[-1] for s in sums[:-1]]
    return [(s * ((1 << 24) - len(frequencies)) >> 22) + i for i, s in enumerate(scaled)] + [1 << 24]


def range_code(source: Bytes, count: int, size: int) -> list[int]:
    starts = intervals(integers(source, size))
    data = source.take(source.varint())
    rest = len(data) % 4
    data = data[: len(data) - rest] + (bytes(4 - rest) + data[len(data) - rest :] if rest else b"")
    words = [int.from_bytes(piece, "little") for piece in pieces(data, 4)] + [0, 0]
    point, at, lower, span, out = words[0] << 32 | words[1], 2, 0, ALL, []
    for _ in range(count):
        unit = span >> 24
        symbol = bisect_right(starts, (point - lower & ALL) // unit) - 1
        out.append(symbol)
        lower = lower + unit * starts[symbol] & ALL
        span = unit * (starts[symbol + 1] - starts[symbol])
        if span < 1 << 32:
            lower, span = lower << 32 & ALL, span << 32
            point = point << 32 & ALL | (words[at] if at < len(words) else 0)
            at += 1
    return out


def ans(source: Bytes, count: int, size: int) -> list[int]:
    starts = intervals(integers(source, size))
    data = source.take(source.varint())
    words = [int.from_bytes(piece, "little") for piece in pieces(data, 4)]
    state = 0
    for _ in range(2):
        state = state << 32 | words.pop() if words else state
    out = []
    for _ in range(count):
        slot = state & ((1 << 24) - 1)
        symbol = bisect_right(starts, slot) - 1
        out.append(symbol)
        state = (state >> 24) * (starts[symbol + 1] - starts[symbol]) + slot - starts[symbol]
        if state < 1 << 32 and words:
            state = state << 32 | words.pop()
    return out
