"""A reader of .fw files, written from docs/format.md alone: the standard library and numpy, nothing of ours."""

from __future__ import annotations

import json
import re
import zlib
from bisect import bisect_right
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = Path(__file__).parents[1] / "docs" / "format.md"
WORDS = "".join(re.findall("```words\n(.*?)```", FORMAT.read_text(), re.DOTALL)).replace("\n", "").encode()
# By the number of a type: what numpy calls it, or calls its bit patterns (bfloat16, float8).
TYPES = ("f4", "f2", "u2", "f8", "u1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "c8", "c16", "u1", "u1")
BF16 = 2
NARROWER = (None, 2, 1, 0, 4, 5, 6, 7)  # number of the storage -> number of the type
ALL = (1 << 64) - 1
Tensor = tuple[int, tuple[int, ...], bytes]


class Bytes:
    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    def take(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        return self.data[start : self.at]

    def varint(self) -> int:
        value = shift = 0
        while (byte := self.take(1)[0]) >= 128:
            value, shift = value | (byte & 127) << shift, shift + 7
        return value | byte << shift

    def checked(self, start: int) -> None:
        assert zlib.crc32(self.data[start : self.at]).to_bytes(4, "little") == self.take(4)


def read(data: bytes, shapes: list[tuple[int, ...]] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description, and (number of the type, shape, little-endian elements) of every tensor by name or number.

    A compact file needs the shapes of the model's tensors.
    """
    if data[0] >= 0xE0:
        return compact(data, shapes or [])
    bare, source, found = data[2] >= 128, Bytes(data), list[Tensor]()
    assert source.take(3) in (b"FW\x01", b"FW\x81")
    told = json.loads(zlib.decompressobj(-15, WORDS).decompress(source.take(source.varint())) or "{}")
    (Bytes(data, len(data) - 4) if bare else source).checked(0)
    while source.at < len(data) - 4 * bare:
        start, length, block = source.at, 0 if bare else source.varint(), source.at
        if bare and data[start] == 31:
            source.take(1)
            found.append(found[source.varint()])
        else:
            found.append(tensor(source))
        if not bare:
            assert source.at == block + length
            source.checked(start)
    if bare:
        return told, {str(i): one for i, one in enumerate(found)}
    sites = [(path, at, form) for path, held in told.get("activations", {}).items() for at, form in held.items()]
    forms = sorted((i, f"{path}/{at}/{key}") for path, at, form in sites for key, i in form["tensors"].items())
    names = [*told.get("names", []), *(name for _, name in forms), *told.get("hidden", [])]
    tensors = dict(zip(names, found, strict=True))
    return told, tensors | {name: tensors[owner] for name, owner in told.get("ties", {}).items()}


def tensor(source: Bytes) -> Tensor:
    first = source.take(1)[0]
    shape = tuple(source.varint() for _ in range(source.varint() if first >> 5 == 7 else first >> 5))
    return first & 31, shape, body(source, first & 31, shape)


def body(source: Bytes, kind: int, shape: tuple[int, ...]) -> bytes:
    byte = source.take(1)[0]
    return (raw, planes, table, affine, product, tables)[byte & 7](source, kind, shape, byte).tobytes()


def values(kind: int, data: bytes) -> np.ndarray:
    """The numbers of elements, as floats or integers of 64 bits."""
    held = np.frombuffer(data, "<" + TYPES[kind])
    held = (held.astype("u4") << 16).view("f4") if kind == BF16 else held
    return held.astype("f8" if held.dtype.kind == "f" else "i8")


def elements_of(kind: int, numbers: np.ndarray) -> np.ndarray:
    """Numbers as elements of a type, rounded to the nearest, ties to even."""
    if kind != BF16:
        return numbers.astype("f4" if TYPES[kind] == "f2" else numbers.dtype).astype("<" + TYPES[kind])
    bits = numbers.astype("f4").view("u4").astype("u8")
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype("<u2")


def rounded(kind: int, numbers: np.ndarray) -> np.ndarray:
    return values(kind, elements_of(kind, numbers).tobytes()).reshape(numbers.shape)


def raw(source: Bytes, kind: int, shape: tuple[int, ...], byte: int) -> np.ndarray:
    stored = NARROWER[byte >> 4] if 0 < byte >> 4 < 15 else kind
    size = prod(shape) * np.dtype(TYPES[stored]).itemsize
    data = bytes(size) if byte >> 4 == 15 else source.take(size)
    return np.frombuffer(data, "u1") if stored == kind else elements_of(kind, values(stored, data))


def planes(source: Bytes, kind: int, shape: tuple[int, ...], byte: int) -> np.ndarray:
    size = np.dtype(TYPES[kind]).itemsize
    held = np.stack([symbols(source, prod(shape), 256) for _ in range(size)], 1).astype("u1").reshape(-1)
    words = held.view(f"<u{size}")
    return words >> 1 | words << (8 * size - 1) if kind in (0, 1, 2, 3, 15, 16) else words


def table(source: Bytes, kind: int, shape: tuple[int, ...], byte: int) -> np.ndarray:
    _, (count,), held = tensor(source)
    return np.frombuffer(held, f"V{len(held) // count}")[symbols(source, prod(shape), count)]


def affine(source: Bytes, kind: int, shape: tuple[int, ...], byte: int) -> np.ndarray:
    axis, block = (source.take(1)[0] & 31) - 1, source.varint() if byte & 32 else 0
    zigzag, size = source.varint(), source.varint()
    (scale_kind, _, scale), (zero_kind, _, zero) = tensor(source), tensor(source)
    axis, shape = (0, (prod(shape) // block, block)) if block else (axis, shape)
    along = [-1 if d == axis else 1 for d in range(len(shape))]
    low = zigzag >> 1 if zigzag % 2 == 0 else -(zigzag >> 1) - 1
    whole = (np.array(symbols(source, prod(shape), size), "i8") + low).reshape(shape)
    return signed(source, on_grid(kind, whole, (scale_kind, scale), (zero_kind, zero), along), byte)


def on_grid(
    kind: int, whole: np.ndarray, held: tuple[int, bytes], zeros: tuple[int, bytes], along: list[int]
) -> np.ndarray:
    (scale_kind, scale), (zero_kind, zero) = held, zeros
    offset = values(zero_kind, zero).reshape(along)
    gap = whole - offset if offset.dtype == "i8" else rounded(zero_kind, rounded(zero_kind, whole) - offset)
    gap = gap if TYPES[zero_kind] == "f8" else rounded(scale_kind, gap)
    return elements_of(kind, (gap * values(scale_kind, scale).reshape(along)).reshape(-1))


def product(source: Bytes, kind: int, shape: tuple[int, ...], byte: int) -> np.ndarray:
    axis = source.take(1)[0] if byte & 32 else None
    _, (*stages, blocks, count, width), held = tensor(source)
    stage, rows = stages[0] if stages else 1, prod(shape) // (blocks * width)
    chosen = np.reshape(symbols(source, stage * rows * blocks, count), (stage, rows, blocks))
    vectors = np.frombuffer(held, "<" + TYPES[kind]).reshape(stage, blocks, count, width)
    total = vectors[0][np.arange(blocks), chosen[0]]
    for own, books in zip(chosen[1:], vectors[1:], strict=True):
        total = total + books[np.arange(blocks), own]
    if axis is not None:
        total = np.moveaxis(total.reshape(*shape[:axis], *shape[axis + 1 :], shape[axis]), -1, axis)
    return signed(source, total.reshape(-1).copy(), byte)


def tables(source: Bytes, kind: int, shape: tuple[int, ...], byte: int) -> np.ndarray:
    axis, (_, (rows, count), held) = source.take(1)[0], tensor(source)
    chosen = np.reshape(symbols(source, prod(shape), count), shape)
    row = np.arange(rows).reshape([-1 if d == axis else 1 for d in range(len(shape))])
    return signed(source, np.frombuffer(held, "<" + TYPES[kind]).reshape(rows, count)[row, chosen].reshape(-1), byte)


def signed(source: Bytes, elements: np.ndarray, byte: int) -> np.ndarray:
    if byte & 16:
        bits, top = elements.view(f"<u{elements.itemsize}"), 1 << 8 * elements.itemsize - 1
        zeros = np.flatnonzero((bits & (top - 1)) == 0)
        bits[zeros] = np.array(symbols(source, len(zeros), 2), bits.dtype) * bits.dtype.type(top)
    return elements


def symbols(source: Bytes, count: int, size: int) -> list[int]:
    head = source.take(1)[0]
    if head & 3 == 0:
        if size <= 1 or not count:
            return [0] * count
        coders = (fixed, huffman, range_code, ans, adaptive, mixed, interleaved, multiset)
        return coders[head >> 2](source, count, size)
    if head & 3 == 3:
        sizes = [(source.varint(), source.varint()) for _ in range(source.varint())]
        return [one for some, length in sizes for one in symbols(Bytes(source.take(length)), some, size)]
    background = source.varint()
    if head & 3 == 2:
        mask = symbols(source, count, 2)
        held = iter(symbols(source, sum(mask), size))
        return [next(held) if kept else background for kept in mask]
    entries = source.varint()
    gaps, held = symbols(source, entries, 1 << (head >> 2)), iter(symbols(source, entries, size))
    out = [symbol for gap in gaps for symbol in (*[background] * gap, next(held))]
    return out + [background] * (count - len(out))


def bit_string(data: bytes) -> str:
    return "".join(f"{byte:08b}" for byte in data)


def fixed(source: Bytes, count: int, size: int) -> list[int]:
    width = (size - 1).bit_length()
    bits = bit_string(source.take(-(-count * width // 8)))
    return [int(bits[at : at + width], 2) for at in range(0, count * width, width)]


def integers(source: Bytes, count: int) -> list[int]:
    parameters, at, out = source.take(1)[0], 0, list[int]()
    bits, k = bit_string(source.data[source.at :]), parameters & 15
    for _ in range(count):
        start, at = at, 2 * bits.index("1", at) - at + k + 1
        out.append(int(bits[start:at], 2) - (1 << k))
    source.take(-(-at // 8))
    steps = [v >> 1 if v % 2 == 0 else -(v >> 1) - 1 for v in out]
    return np.cumsum(steps).tolist() if parameters & 16 else out


def huffman(source: Bytes, count: int, size: int) -> list[int]:
    used = sorted((length, symbol) for symbol, length in enumerate(integers(source, size)) if length)
    words, word, last = dict[str, int](), -1, used[0][0]
    for length, symbol in used:
        word, last = (word + 1) << (length - last), length
        words[f"{word:0{length}b}"] = symbol
    bits, at, out = bit_string(source.take(source.varint())) if len(used) > 1 else "0" * count, 0, list[int]()
    for _ in range(count):
        start, at = at, next(end for end in range(at + 1, at + 25) if bits[at:end] in words)
        out.append(words[bits[start:at]])
    return out


def coded(source: Bytes, size: int, *, front: bool) -> tuple[list[int], list[int]]:
    """Where each symbol starts among 2**24 and that number, and the words of the code."""
    sums = np.cumsum([0, *integers(source, size)])
    starts = [(int(c) * ((1 << 24) - size) >> 22) + i for i, c in enumerate((sums[:-1] << 22) // sums[-1])]
    data = source.take(source.varint())
    last = len(data) - len(data) % 4 if front else len(data)
    padded = data[:last] + bytes(-len(data) % 4) + data[last:]
    return [*starts, 1 << 24], np.frombuffer(padded, "<u4").tolist()


def range_code(source: Bytes, count: int, size: int) -> list[int]:
    starts, words = coded(source, size, front=True)
    words = [*words, 0, 0, *[0] * count]
    point, at, lower, span, out = words[0] << 32 | words[1], 2, 0, ALL, list[int]()
    for _ in range(count):
        unit = span >> 24
        symbol = bisect_right(starts, (point - lower & ALL) // unit) - 1
        out.append(symbol)
        lower, span = lower + unit * starts[symbol] & ALL, unit * (starts[symbol + 1] - starts[symbol])
        if span < 1 << 32:
            lower, span, point, at = lower << 32 & ALL, span << 32, point << 32 & ALL | words[at], at + 1
    return out


def ans(source: Bytes, count: int, size: int) -> list[int]:
    starts, words = coded(source, size, front=False)
    state, words, out = sum(word << 32 * i for i, word in enumerate(words[-2:])), words[:-2], list[int]()
    for _ in range(count):
        slot = state & ((1 << 24) - 1)
        symbol = bisect_right(starts, slot) - 1
        out.append(symbol)
        state = (state >> 24) * (starts[symbol + 1] - starts[symbol]) + slot - starts[symbol]
        if state < 1 << 32 and words:
            state = state << 32 | words.pop()
    return out


def interleaved(source: Bytes, count: int, size: int) -> list[int]:
    first = source.take(1)[0]
    bits, lanes = first & 31, 1 << (first >> 5)
    starts = np.cumsum([0, *integers(source, size)]).tolist()
    number = source.varint()
    states = np.frombuffer(source.take(4 * lanes), "<u4").tolist()
    words, out = iter(np.frombuffer(source.take(2 * number), "<u2").tolist()), list[int]()
    for i in range(count):
        state = states[i % lanes]
        slot = state & ((1 << bits) - 1)
        symbol = bisect_right(starts, slot) - 1
        out.append(symbol)
        state = (starts[symbol + 1] - starts[symbol]) * (state >> bits) + slot - starts[symbol]
        states[i % lanes] = state << 16 | next(words) if state < 1 << 16 else state
    assert states == [1 << 16] * lanes and next(words, None) is None  # noqa: PT018
    return out


def adaptive(source: Bytes, count: int, size: int) -> list[int]:
    centre, width, rates = source.varint(), source.varint(), source.take(1)[0]
    data, held = iter(source.take(source.varint())), dict[int, list[int]]()
    code, span, out = int.from_bytes([next(data, 0) for _ in range(4)], "big"), (1 << 32) - 1, list[int]()

    def bit(context: int) -> int:
        nonlocal code, span
        state = held.pop(context, [1 << 15, 1 << 15, 0])
        bound = (span >> 16) * min(max((state[0] + state[1]) >> 1, 48), (1 << 16) - 48)
        one = int(code < bound)
        code, span = (code, bound) if one else (code - bound, span - bound)
        while span < 1 << 24:
            code, span = code << 8 | next(data, 0), span << 8
        for i, rate in enumerate((rates & 15, rates >> 4)):
            step = min(rate, state[2] + 1)
            state[i] += ((1 << 16) - state[i]) >> step if one else -(state[i] >> step)
        if context >= 0:
            held[context] = [*state[:2], min(state[2] + 1, 16)]
        return one

    for i in range(count):
        left, beyond = (out[i - 1] if i % width >= 1 else 0), (out[i - 2] if i % width >= 2 else 0)
        above, value, negative = (out[i - width] if i >= width else 0), 0, 0
        if bit(2 * (3 * min(abs(left), 2) + min(abs(above), 2)) + (beyond != 0)):
            negative = bit(18 + 3 * (1 + int(np.sign(left))) + 1 + int(np.sign(above)))
            near, value = abs(left) + abs(above), 1
            first = 27 + 28 * (0 if near <= 2 else 1 if near <= 6 else 2) + 14 * negative
            while value < 15 and bit(first + value - 1):
                value += 1
            if value == 15:
                length = next(n for n in range(19) if not bit(111 + n))
                value = 14 + int("1" + "".join(str(bit(-1)) for _ in range(length)), 2)
        out.append(-value if negative else value)
    return [value + centre for value in out]


LOWER = (
    1,
    2,
    3,
    5,
    8,
    13,
    22,
    36,
    60,
    98,
    162,
    267,
    440,
    724,
    1179,
    1921,
    3108,
    4971,
    7812,
    11955,
    17625,
    24743,
    32768,
)
KNOTS = (*LOWER, *((1 << 16) - k for k in LOWER[-2::-1]))
SQUASH = [(KNOTS[x >> 7] * (128 - x % 128) + KNOTS[(x >> 7) + 1] * (x % 128)) >> 7 for x in range(1, 5632)]
STRETCH = [min(bisect_right(SQUASH, q), 5630) - 2815 for q in range(1 << 16)]
LOGS = (-1242, -1065, -887, -783, -710, -653, -606, -566, -532, -502, -475, -451, -429, -408, -389, -371)
NEXT = (["00"], ["01", "23", "10", "32"], ["02", "75", "13", "64", "20", "57", "31", "46"])


def lim(x: int, bound: int) -> int:
    return max(-bound, min(bound, x))


def log_of(at: int) -> int:
    return LOGS[at] if at < 16 else LOGS[8 + at % 8] + 177 * (at // 8 - 1)


def bucket(x: int, steps: int) -> int:
    n = 0
    while x >= 2 * steps:
        x, n = x >> 1, n + 1
    return min(n * steps + x, 63)


class Mixture:
    """Range decoder, cells and weights of a context-mixing code."""

    def __init__(self, data: bytes) -> None:
        self.data, self.pace, self.near = iter(data), 0, [0] * 12
        self.code, self.span = int.from_bytes([next(self.data, 0) for _ in range(4)], "big"), (1 << 32) - 1
        self.cells, self.weights = dict[tuple[int, ...], list[int]](), dict[tuple[int, ...], list[int]]()

    def taken(self, chance: int) -> int:
        bound = (self.span >> 16) * chance
        one = int(self.code < bound)
        self.code, self.span = (self.code, bound) if one else (self.code - bound, self.span - bound)
        while self.span < 1 << 24:
            self.code, self.span = self.code << 8 | next(self.data, 0), self.span << 8
        return one

    def bit(
        self,
        bin: int,
        cells: list[tuple[int, ...]],
        logits: list[int],
        sets: tuple[tuple[int, ...], ...],
        near: list[int],
    ) -> int:
        """A bin of these cells (model and bin apart) and sets of weights; `near` are signed neighbours."""
        held = []
        for model, (cell, logit) in enumerate(zip(cells, logits, strict=True)):
            held.append(self.cells.setdefault((model, bin, *cell), [64 * SQUASH[lim(logit, 1536) + 2815], 3]))
        said = [*(STRETCH[chance >> 6] for chance, _ in held), 256]
        own = [self.weights.setdefault((i, bin, *one), [*[8400] * 8, 0, 0]) for i, one in enumerate(sets)]
        beside = sum(a * b for a, b in zip(near, self.near, strict=False))
        sums = [lim(sum(w * x for w, x in zip(one, said, strict=False)) + beside >> 16, 2815) for one in own]
        bit = self.taken(SQUASH[(sum(sums) >> 1) + 2815])
        errors = []
        for one, total in zip(own, sums, strict=True):
            error = ((bit << 16) - SQUASH[total + 2815]) * (self.pace + 95200 // (700 + one[9])) >> 4
            moved = [lim(w + ((x * error + (1 << 17)) >> 18), 1 << 20) for w, x in zip(one, said, strict=False)]
            one[:] = [*moved, min(one[9] + 1, 65535)]
            errors.append(error)
        both = sum(errors) >> 1
        for at, x in enumerate(near):
            self.near[at] = lim(self.near[at] + ((24 * x * both + (1 << 19)) >> 20), 1 << 20)
        for cell in held:
            moved = cell[0] + (((bit << 22) - cell[0]) * (655360 // (10 * cell[1] + 16)) >> 16)
            cell[:] = [min(max(moved, 64), (1 << 22) - 64), min(cell[1] + 1, 1000)]
        return bit


def mixed(source: Bytes, count: int, size: int) -> list[int]:
    centre, width, kernel, line = source.varint(), source.varint(), source.varint(), source.varint()
    first, second = source.take(2)
    told = (width, kernel, line, first & 31, first >> 5, second >> 6, second & 63)
    return [centre + value for value in modelled(Mixture(source.take(source.varint())), count, *told)]


def modelled(  # noqa: PLR0915 - as long as the section of the page that it reads like
    mixture: Mixture, count: int, width: int, kernel: int, line: int, shift: int, trellis: int, pace: int, level: int
) -> list[int]:
    table, mixture.pace, mixture.near = NEXT[trellis], (6, 12, 24, 48)[pace], [20000 * (line > 1)] * 2 + [0] * 10
    mean = 4 * (level if level < 16 else (8 + level % 8) << (level // 8 - 1))
    points, sizes, state, fast = list[int](), list[int](), 0, mean
    sums: dict[object, int] = {}
    for i in range(count):
        row, x = divmod(i, width)
        (which, place), odd = divmod(x, kernel), state % 2
        if x == 0:
            sums["row"] = 0
        column = [sums.get(("column", x + d), 0) for d in (-1, 0, 1)]
        whole = max((sums.get("all", 0) + 32 * mean) // (i + 32), 4)
        along, down = (sums["row"] + 4 * whole) // (x + 4), (column[1] + whole) // (row + 1)
        beside = (column[0] + 2 * column[1] + column[2] + 2 * whole) // (4 * row + 2)
        inputs = (sums.get(("input", which), 0) + 2 * whole) // (row * kernel + place + 2) if kernel > 1 else beside
        places = (sums.get(("place", place), 0) + 2 * whole) // (row * (width // kernel) + which + 2)
        both = along * down // whole

        def near(held: list[int], steps: int, there: bool = True, at: int = i) -> int:
            return held[at - steps] if there else 0

        across, deep = place % line, place // line
        two = line > 1
        beyond = near(sizes, kernel, x >= kernel)
        if two:
            left, upper = near(sizes, 1, across > 0), near(sizes, line, deep > 0)
            corner = near(sizes, line + 1, across > 0 and deep > 0)
            close = (3 * ((4 * left + 4 * upper + 2 * corner + 2 * beyond) * 128 // 12) + both) // 4
        else:
            left, upper = near(sizes, 1, x > 0), near(sizes, width, row > 0)
            more = near(sizes, 2, x > 1) + near(sizes, 2 * width, row > 1)
            close = (256 * (left + beyond + upper) + 128 * more + 4 * both) // 12
        three = [min((one + 1) // 2, 3) for one in (left, upper, beyond)]
        pair = [min(bucket(one >> 2, 1), 7) for one in (along, down)]
        means = (along, down, fast, both, along * inputs // whole * places // whole, along, close, both)
        found = [bucket(one >> 2, 8) for one in means]
        contexts = [*found[:5], 16 * three[0] + 4 * three[1] + three[2], found[6], 8 * pair[0] + pair[1]]
        cells = [(one, state if model in (0, 3, 5, 7) else odd) for model, one in enumerate(contexts)]
        sets = ((odd,), (odd, min(bucket(both >> 2, 2), 15)))

        def bit(bin: int, lift: int, cells: Any = cells, found: Any = found, sets: Any = sets) -> int:
            return mixture.bit(bin, cells, [log_of(one) + lift for one in found], sets, [])

        value = 0
        while value < 15 and bit(value, 102 + 179 * odd if value == 0 else -90):
            value += 1
        if value == 15:
            length = next(n for n in range(19) if not bit(16 + n, 0))
            value = 14 + int("1" + "".join(str(mixture.taken(1 << 15)) for _ in range(length)), 2)
        if value:
            value -= 1
            for _ in range(shift):
                value = 2 * value | mixture.taken(1 << 15)
            value += 1
            signed = [
                near(points, 1, across > 0 if two else x > 0),
                near(points, line, deep > 0) if two else near(points, 2, x > 1),
                near(points, line + 1, two and deep > 0 and across > 0),
                near(points, line - 1, two and deep > 0 and across + 1 < line),
                near(points, kernel, x >= kernel),
                *(near(points, n * width, row >= n) for n in (1, 2, 3)),
                near(points, 2, two and across > 1),
                near(points, 2 * line, two and deep > 1),
                near(points, 2 * kernel, x >= 2 * kernel),
                0,
            ]
            g = [1 + int(np.sign(one)) for one in signed]
            if two:
                some = [3 * g[0] + g[1], 3 * g[4] + g[5], 9 * g[0] + 3 * g[1] + g[2], 3 * g[1] + g[4]]
                some.append(9 * g[0] + 3 * g[1] + g[4])
            else:
                some = [3 * g[0] + g[1], 3 * g[4] + g[5], 3 * g[5] + g[6], 3 * g[0] + g[5], 9 * g[0] + 3 * g[4] + g[5]]
            some += [0, 9 * g[5] + 3 * g[6] + 1 + int(np.sign(near(points, 1, x > 0))), min(which, 60)]
            beside_it = [-lim(128 * one, 384) for one in signed]
            negative = mixture.bit(15, [(one, 0) for one in some], [0] * 8, ((0,), (0, min(value - 1, 3))), beside_it)
            value = -value if negative else value
        points.append(2 * value - odd * int(np.sign(value)) if trellis else value)
        sizes.append(min((2 * abs(value) - (odd if value else 0)) >> shift, 1 << 14))
        grown = 128 * sizes[-1]
        for key in ("all", "row", ("column", x), ("input", which), ("place", place)):
            sums[key] = sums.get(key, 0) + grown
        fast += (grown - fast) >> 2 if grown > fast else -((fast - grown) >> 2)
        state = int(table[state][value % 2])
    return points


def multiset(source: Bytes, count: int, size: int) -> list[int]:
    width, several = source.varint(), source.varint()
    last = {sum(lengths) - 1 for lengths in prefixes([source.varint() for _ in range(several - 1)])}
    last |= {count // width - 1} if several else set(range(count // width))
    coder, bits = Mixture(source.take(source.varint())), (size - 1).bit_length()
    rows, counts = [""] * (count // width), dict[str, list[int]]()
    for place in range(width * bits):
        start = 0
        for end in sorted(last):
            own = counts.setdefault(rows[start][place - place % bits :], [0, 0])
            weights = bernoulli(end + 1 - start, 2 * own[0] + 1, 2 * own[1] + 1)
            low, high = 0, end + 1 - start
            while low < high:
                middle = (low + high) >> 1
                chance = (sum(weights[low : middle + 1]) << 16) // sum(weights[low : high + 1])
                low, high = (low, middle) if coder.taken(lim(chance, 65535) or 1) else (middle + 1, high)
            rows[start : end + 1] = [row + "01"[i >= low] for i, row in enumerate(rows[start : end + 1])]
            own[:] = [own[0] + low, own[1] + end + 1 - start - low]
            while sum(own) > 1 << 20:
                own[:] = [own[0] >> 1, own[1] >> 1]
            last |= {start + low - 1} if low else set()
            start = end + 1
    return [int(row[at : at + bits], 2) for row in rows for at in range(0, width * bits, bits)]


def prefixes(lengths: list[int]) -> list[list[int]]:
    return [lengths[: i + 1] for i in range(len(lengths))]


def bernoulli(n: int, a: int, b: int) -> list[int]:
    peak = 0 if a == 1 else n if b == 1 else min(n * (a - 2) // (a + b - 4), n)
    weights = [1 << 20] * (n + 1)
    for k in range(peak, n):
        weights[k + 1] = max(weights[k] * (n - k) * (a + 2 * k) // ((k + 1) * (b + 2 * (n - k - 1))), 1)
    for k in range(peak, 0, -1):
        weights[k - 1] = max(weights[k] * k * (b + 2 * (n - k)) // ((n - k + 1) * (a + 2 * (k - 1))), 1)
    return weights


# --- compact files ----------------------------------------------------------------------------------------------------

SCALES = (128, 140, 152, 166, 181, 197, 215, 235)


class Compact(Mixture):
    """The one stream of a compact file, and what its tensors have to do with one another."""

    def __init__(self, stream: bytes, front: bytes, shapes: list[tuple[int, ...]]) -> None:
        super().__init__(stream)
        self.front, self.shapes = Bytes(front), shapes
        self.held, self.last, self.found = dict[tuple[int, bool], list[int]](), dict[bool, bytes](), list[Tensor]()

    def yes(self, question: int, vector: bool = False) -> int:
        cell = self.held.setdefault((question, vector), [1 << 13, 2])
        one = self.taken(cell[0])
        moved = cell[0] + (((one << 16) - cell[0]) * (655360 // (10 * cell[1] + 16)) >> 16)
        cell[:] = [min(max(moved, 512), (1 << 16) - 512), min(cell[1] + 1, 30)]
        return one

    def bits(self, count: int) -> int:
        return int("0" + "".join(str(self.taken(1 << 15)) for _ in range(count)), 2)

    def number(self) -> int:
        zeros = next(n for n in range(49) if self.taken(1 << 15))
        return (1 << zeros + 3 | self.bits(zeros + 3)) - 8

    def next(self) -> Tensor:
        apart = self.yes(0)
        if apart and self.yes(1):
            return self.found[self.number()]
        kind = self.bits(5) if self.yes(2) else 0
        known = self.shapes[len(self.found)] if len(self.found) < len(self.shapes) else None
        shape = tuple(self.number() for _ in range(self.bits(6))) if known is None else known
        return kind, shape, body(self.front, kind, shape) if apart else self.grid(kind, shape)

    def grid(self, kind: int, shape: tuple[int, ...]) -> bytes:
        vector, seen, along = len(shape) < 2, shape, [1] * len(shape)
        _ = self.bits(3) if self.yes(7, vector) else 1
        scale, zero, centre = (kind, b""), (7, bytes(4)), 0
        if self.yes(3, vector):
            byte = self.front.take(1)[0]
            block = self.front.varint() if byte & 32 else 0
            zigzag, (scale_kind, _, held), (zero_kind, _, zeros) = (
                self.front.varint(),
                tensor(self.front),
                tensor(self.front),
            )
            centre, scale, zero = (
                zigzag >> 1 if zigzag % 2 == 0 else -(zigzag >> 1) - 1,
                (scale_kind, held),
                (zero_kind, zeros),
            )
            axis, seen = (0, (prod(shape) // block, block)) if block else ((byte & 31) - 1, shape)
            along = [-1 if d == axis else 1 for d in range(len(seen))]
        else:
            self.last[vector] = (
                self.scale(kind, vector) if self.yes(4, vector) else self.last.get(vector) or self.last[not vector]
            )
            scale = (kind, self.last[vector])
        trellis = 0 if not self.yes(9, vector) else 1 if self.yes(10, vector) else 2
        width, kernel = (prod(shape), 1) if vector else (prod(shape[1:]), prod(shape[2:]))
        line = shape[-1] if len(shape) > 3 else 1
        if len(shape) == 2 and self.yes(8, vector):
            kernel, line = self.number(), self.number()
        shift = self.bits(5) if self.yes(11, vector) else 0
        pace, level = self.bits(2) if self.yes(12, vector) else 1, self.bits(6)
        whole = np.array(modelled(self, prod(shape), width, kernel, line, shift, trellis, pace, level), "i8") + centre
        return on_grid(kind, whole.reshape(seen), scale, zero, along).tobytes()

    def scale(self, kind: int, vector: bool) -> bytes:
        if not self.yes(5, vector):
            n = self.bits(8)
            return elements_of(kind, np.array([SCALES[n % 8] * 2.0 ** (n // 8 - 31)])).tobytes()
        stored = kind if self.yes(6, vector) else BF16
        size = np.dtype(TYPES[stored]).itemsize
        held = self.bits(8 * size).to_bytes(size, "little")
        return elements_of(kind, values(stored, held)).tobytes()


def compact(data: bytes, shapes: list[tuple[int, ...]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    flags, source, end = data[0], Bytes(data, 1), len(data) - (2 if len(data) < 4096 else 4)
    assert flags >> 3 == 28
    told = source.take(source.varint()) if flags & 1 else b""
    description = json.loads(zlib.decompressobj(-15, WORDS).decompress(told) or "{}")
    front = source.take(source.varint()) if flags & 2 else b""
    known = b"" if flags & 4 else b"".join(leb128(n) for shape in shapes for n in (len(shape), *shape))
    assert zlib.crc32(data[:end] + known).to_bytes(4, "little")[: len(data) - end] == data[end:]
    forms = [form for held in description.get("activations", {}).values() for form in held.values()]
    stream = Compact(data[source.at : end], front, [] if flags & 4 else shapes)
    for _ in range(len(shapes) + sum(len(form["tensors"]) for form in forms)):
        stream.found.append(stream.next())
    return description, {str(i): one for i, one in enumerate(stream.found)}


def leb128(value: int) -> bytes:
    return bytes([value & 127 | 128]) + leb128(value >> 7) if value > 127 else bytes([value])
