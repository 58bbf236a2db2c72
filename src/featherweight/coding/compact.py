"""The compact layout of a bare file: all integers of a model in one context-mixing stream, heads of a few bits in it.

Shapes are not written where they are those of the model that the file is loaded into; a scale from a short list takes a
byte. What the stream cannot hold stands in front of it, as the bodies of ordinary records. See docs/format.md.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featherweight.coding.bits import ALL, Ints, Reader, Wanted, varint, zigzag
from featherweight.coding.coders.context_mixing import (
    PACES,
    USUAL,
    fold_of,
    mean_of,
    nearest_level,
    paces_for,
    shift_of,
    trellis_of,
)
from featherweight.coding.packing import head_bytes, store
from featherweight.coding.records import (
    AFFINE,
    BLOCKS,
    DTYPES,
    FLOATS,
    SYMBOLS,
    Row,
    account,
    counted,
    counts,
    from_bytes,
    grid_fits,
    same_bits,
)
from featherweight.coding.streams import FIXED, SYMBOL
from featherweight.coding.unpacking import LARGEST_TENSOR, Head, Packed, read_body, read_tensor
from featherweight.core.forms import Affine, Codes
from featherweight.errors import FormatError

MARK = 0xE0  # the first three bits of the first byte; then two for the version, three for what follows
VERSION = 1
DESCRIBED, FRONT, SHAPED = 1, 2, 4
LONG = 4096  # bytes from which a file ends with a whole CRC-32, not with its lower half
FURTHEST = 1 << 17  # steps from the centre that the stream holds
STEPS = (128, 140, 152, 166, 181, 197, 215, 235)  # 128 * 2^(i / 8), exact in every type of weights
EXPONENT = 24  # the least step of the short list is 2^-24, the largest below 2^8
SHORTEST = 40  # integers from which other paces are tried
DEARER = 4  # bits that another pace takes
Shape = tuple[int, ...]
Place = tuple[Tensor, Codes | None] | int  # a tensor of the model, or the number of an earlier one that it is


def short_scale(value: float) -> float:
    """The nearest step that takes one byte in a compact file: eight to an octave, from 2^-24 to 2^8.

    >>> short_scale(0.066), short_scale(0.1)
    (0.068359375, 0.09619140625)
    """
    value = min(max(value, _step(0)), _step(255))
    near = round(8 * (math.log2(value) + EXPONENT))
    return min((_step(n) for n in range(max(near - 1, 0), min(near + 2, 256))), key=lambda step: abs(step - value))


def _step(number: int) -> float:
    return math.ldexp(STEPS[number % 8], number // 8 - EXPONENT - 7)


# --- the two ends of the stream ---------------------------------------------------------------------------------------

# Questions about a tensor. Each is learned on its own for vectors and for all others.
APART, TIED, TYPED, ODD_GRID, NEW_SCALE, LONG_SCALE, WHOLE_SCALE, WIDE, FOLDED, TRELLIS, FOUR, SHIFTED, PACED = range(
    13
)


class Questions:
    """Chances of yes, of 2^16: an eighth at first."""

    def __init__(self) -> None:
        self.chance, self.age = [1 << 13] * 32, [2] * 32

    def learn(self, at: int, bit: int) -> None:
        moved = self.chance[at] + (((bit << 16) - self.chance[at]) * (655360 // (10 * self.age[at] + 16)) >> 16)
        self.chance[at], self.age[at] = min(max(moved, 512), (1 << 16) - 512), min(self.age[at] + 1, 30)


class Writer:
    """A range coder with all that was learned on the way."""

    def __init__(self) -> None:
        from featherweight.coding import context_kernels as coders
        from featherweight.coding import mixing_kernels as kernels

        self.coders, self.kernels = coders, kernels
        self.questions, self.mixer = Questions(), kernels.fresh()
        self.coder, self.out = kernels.started(), np.zeros(256, dtype=np.uint8)

    def _bit(self, bit: int, chance: int) -> None:
        self.out = self.coders._room(self.coder, self.out)
        self.coders._put(self.coder, self.out, bit, chance)

    def ask(self, question: int, vector: bool, answer: object) -> bool:
        at, bit = 2 * question + vector, 1 if answer else 0
        self._bit(bit, self.questions.chance[at])
        self.questions.learn(at, bit)
        return bool(answer)

    def bits(self, value: int, count: int) -> None:
        for k in range(count - 1, -1, -1):
            self._bit(value >> k & 1, 1 << 15)

    def number(self, value: int) -> None:
        """Exp-Golomb code of order 3 of a number below 2^48."""
        length = (value + 8).bit_length()
        self.bits(0, length - 4)
        self.bits(value + 8, length)

    def values(self, values: Ints, head: tuple[int, ...]) -> None:
        self.out = self.kernels.put_values(self.coder, self.out, self.mixer, values, head)

    @property
    def position(self) -> int:
        """Whole bytes so far; a reader has looked at four more."""
        return int(self.coder[4] + self.coder[3] + (self.coder[2] >= 0))

    @property
    def length(self) -> float:
        """Bits so far."""
        return 8 * self.position + 32 - math.log2(float(self.coder[1]))

    def kept(self) -> tuple[Any, ...]:
        """All that is learned, to go back to."""
        mixer = type(self.mixer)(*(part.copy() for part in self.mixer))
        return self.coder.copy(), self.out.copy(), mixer

    def back(self, kept: tuple[Any, ...]) -> None:
        self.coder, self.out = kept[0].copy(), kept[1].copy()
        self.mixer = type(self.mixer)(*(part.copy() for part in kept[2]))

    def ended(self) -> bytes:
        data = self.coders._ended(self.coder, self.out).tobytes()
        return bytes(data[: max(len(data) - 4, 0)] + data[-4:].rstrip(b"\0"))  # what is not there reads as zero


class Source:
    """What a `Writer` wrote."""

    def __init__(self, data: bytes, *, weigh: bool) -> None:
        from featherweight.coding import context_kernels as coders
        from featherweight.coding import mixing_kernels as kernels

        if data[:4] == b"\xff" * 4:  # such a code lies beyond the first range, and would grow without end
            raise FormatError("the file is corrupt: its stream begins with an impossible code")
        self.coders, self.kernels = coders, kernels
        self.questions, self.mixer = Questions(), kernels.fresh()
        self.data = np.frombuffer(data, dtype=np.uint8)
        self.coder = coders.ready(weigh)
        kernels.open_coder(self.coder, self.data)

    def _bit(self, chance: int) -> int:
        if self.position > len(self.data):
            raise FormatError("the file is truncated or corrupt: its stream ends too early")
        return int(self.coders._get(self.coder, self.data, chance))

    def ask(self, question: int, vector: bool) -> bool:
        at = 2 * question + vector
        bit = self._bit(self.questions.chance[at])
        self.questions.learn(at, bit)
        return bool(bit)

    def bits(self, count: int) -> int:
        value = 0
        for _ in range(count):
            value = value << 1 | self._bit(1 << 15)
        return value

    def number(self) -> int:
        more = 0
        while not self._bit(1 << 15):
            more += 1
            if more > 45:
                raise FormatError("the file is corrupt: a number in its stream does not end")
        return (1 << (more + 3) | self.bits(more + 3)) - 8

    def values(self, count: int, head: tuple[int, ...]) -> Ints:
        values, used = self.kernels.get_values(self.coder, self.data, self.mixer, count, head)
        if used < 0:
            raise FormatError("the file is corrupt: its stream ends too early, or holds an impossible number")
        return np.asarray(values, dtype=np.int64)

    @property
    def position(self) -> int:
        return int(self.coder[2]) - 4

    @property
    def ideal(self) -> float:
        """Bytes that the model would ideally have taken so far; 0 where nobody asked."""
        return float(self.coder[3]) / (8 << 24) if len(self.coder) > 3 else 0.0


def _rows(shape: Shape) -> tuple[int, int, int]:
    """The length of a row (all of one output), of a kernel in it (of one input), of a line of that."""
    line = shape[-1] if len(shape) > 3 else 1
    return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape), math.prod(shape[2:]), line


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """The bytes of a compact file, and an account of each tensor that has bytes of its own."""

    data: bytes
    rows: list[Row | None]


def pack(described: bytes, places: Sequence[Place], own: int, coders: tuple[int, ...], *, shaped: bool) -> Written:
    """A whole file.

    Args:
        places: the tensors of the model and of its forms, in the order of the file.
        own: how many of them are the model's: a reader knows their shapes, unless `shaped`.
    """
    writer, front, last = Writer(), bytearray(), dict[bool, Tensor]()
    rows: list[Row | None] = []
    for number, place in enumerate(places):
        if isinstance(place, int):
            _put_tie(writer, place, number)
            rows.append(None)
            continue
        rows.append(_put_tensor(writer, front, *place, coders, shaped or number >= own, last))
    flags = (DESCRIBED if described else 0) | (FRONT if front else 0) | (SHAPED if shaped else 0)
    body = bytes([MARK | VERSION - 1 << 3 | flags])
    body += varint(len(described)) + described if described else b""
    body += varint(len(front)) + bytes(front) if front else b""
    known = [] if shaped else [_shape_of(places, number) for number in range(own)]
    body += writer.ended()
    return Written(body + checksum(body, known, len(body) + 2 < LONG), rows)


def _shape_of(places: Sequence[Place], number: int) -> Shape:
    place = places[number]
    return _shape_of(places, place) if isinstance(place, int) else tuple(place[0].shape)


def checksum(body: bytes, shapes: Sequence[Shape], short: bool) -> bytes:
    """The sum at the end of a file, over its bytes and over the shapes that it does not hold."""
    told = b"".join(varint(n) for shape in shapes for n in (len(shape), *shape))
    return zlib.crc32(body + told).to_bytes(4, "little")[: 2 if short else 4]


def _put_tie(writer: Writer, earlier: int, number: int) -> None:
    writer.ask(APART, False, True)
    writer.ask(TIED, False, True)
    writer.number(earlier)


def _put_tensor(
    writer: Writer,
    front: bytearray,
    tensor: Tensor,
    codes: Codes | None,
    coders: tuple[int, ...],
    shaped: bool,
    last: dict[bool, Tensor],
) -> Row:
    tensor = tensor.detach().cpu()
    before, start, vector = len(front), writer.position, tensor.dim() < 2
    fits = codes is not None and _fits(tensor, codes)
    writer.ask(APART, False, not fits)
    if not fits:
        writer.ask(TIED, False, False)
    if writer.ask(TYPED, False, tensor.dtype != torch.float32):
        writer.bits(DTYPES.index(tensor.dtype), 5)
    if shaped:
        writer.bits(tensor.dim(), 6)
        for size in tensor.shape:
            writer.number(size)
    if not fits or codes is None:
        stored = store(tensor, codes, coders)
        head = len(head_bytes(tensor)) - 1
        front += stored.data[head:]
        row, total = stored.row, len(stored.data) - head
        more = writer.position - start
        return replace(row, bytes=total + more, side_bytes=row.side_bytes - head + more)
    symbols = codes.symbols.detach().cpu().reshape(-1).long().numpy()
    centre = _put_rule(writer, front, codes, vector, last)
    side = len(front) - before + writer.position - start
    _put_values(writer, symbols - centre, tuple(tensor.shape), vector)
    total, size = len(front) - before + writer.position - start, int(symbols.max() - symbols.min()) + 1
    row = account((tuple(tensor.shape), tensor.dtype), AFFINE, "context_mixing", total, side)
    return counted(row, [counts(symbols - symbols.min(), size)], size)


def _fits(tensor: Tensor, codes: Codes) -> bool:
    """Whether the stream holds a tensor: integers on a grid, not too far from its zero, that give every bit of it."""
    rule, symbols = codes.rule, codes.symbols.detach().cpu()
    if not isinstance(rule, Affine) or symbols.dtype not in SYMBOLS or not tensor.numel() or symbols.numel() == 0:
        return False
    held = Affine(rule.scale.detach().cpu(), rule.zero_point.detach().cpu(), rule.axis, rule.block)
    if not grid_fits((tuple(tensor.shape), tensor.dtype), held):
        return False
    low, high = int(symbols.min()), int(symbols.max())
    centre = _centre(symbols, held)
    if max(high - centre, centre - low) > FURTHEST:
        return False
    return same_bits(codes.decode().detach().cpu(), tensor)


def _centre(symbols: Tensor, rule: Affine) -> int:
    """The integer that stands for zero, if all zero points are that one; else the one in the middle."""
    zero = rule.zero_point
    if zero.numel() and bool((zero == zero.reshape(-1)[0]).all()) and float(zero.reshape(-1)[0]).is_integer():
        whole = int(zero.reshape(-1)[0])
        if abs(whole) < FURTHEST:
            return whole
    return int(symbols.long().median())


def _plain(codes: Codes) -> bool:
    rule = codes.rule
    assert isinstance(rule, Affine)
    single = rule.axis is None and rule.block is None and rule.scale.dim() == rule.zero_point.dim() == 0
    return single and rule.zero_point.dtype == torch.int32 and int(rule.zero_point) == 0


def _put_rule(writer: Writer, front: bytearray, codes: Codes, vector: bool, last: dict[bool, Tensor]) -> int:
    """Writes how integers become weights; the integer that they are counted from."""
    rule = codes.rule
    assert isinstance(rule, Affine)
    scale, zero = rule.scale.detach().cpu(), rule.zero_point.detach().cpu()
    if writer.ask(WIDE, vector, codes.symbols.dtype != torch.int8):
        writer.bits(SYMBOLS.index(codes.symbols.dtype), 3)
    if writer.ask(ODD_GRID, vector, not _plain(codes)):
        centre = _centre(codes.symbols.detach().cpu(), Affine(scale, zero))
        front += bytes([(BLOCKS if rule.block else 0) | (0 if rule.axis is None else rule.axis + 1)])
        front += (varint(rule.block) if rule.block else b"") + varint(zigzag(centre))
        front += store(scale, None, (FIXED,)).data + store(zero, None, (FIXED,)).data
        return centre
    before = last.get(vector, last.get(not vector))
    last[vector] = scale
    if not writer.ask(NEW_SCALE, vector, before is None or not same_bits(before, scale)):
        return 0
    number = _number(scale)
    if not writer.ask(LONG_SCALE, vector, number is None):
        writer.bits(number or 0, 8)
    elif not writer.ask(WHOLE_SCALE, vector, not same_bits(scale.bfloat16().to(scale.dtype), scale)):
        writer.bits(_pattern(scale.bfloat16()), 16)
    else:
        writer.bits(_pattern(scale), 8 * scale.element_size())
    return 0


def _number(scale: Tensor) -> int | None:
    """The number of a step in the short list, None if it is none of them."""
    value = float(scale)
    if not 0 < value < 256:
        return None
    number = round(8 * (math.log2(value) + EXPONENT))
    return number if 0 <= number < 256 and _step(number) == value else None


def _pattern(scale: Tensor) -> int:
    return int.from_bytes(scale.reshape(1).view(torch.uint8).numpy().tobytes(), "little")


def _put_values(writer: Writer, whole: Ints, shape: Shape, vector: bool) -> None:
    from featherweight.coding.mixing_kernels import levels

    trellis = trellis_of(whole)
    if writer.ask(TRELLIS, vector, trellis):
        writer.ask(FOUR, vector, trellis == 1)
    values = levels(whole, trellis)[0] if trellis else whole
    width, kernel, line = _rows(shape)
    if len(shape) == 2:
        kernel, line = fold_of(values, width, trellis)
        if writer.ask(FOLDED, vector, kernel > 1):
            writer.number(kernel)
            writer.number(line)
    shift, mean = shift_of(values)
    level = nearest_level(2 * mean / (1 << shift))
    head = (width, kernel, line, trellis, shift, mean_of(level))
    pace = _pace(writer, values, head, paces_for(len(values), mean) if len(values) > SHORTEST else (USUAL,))
    if writer.ask(SHIFTED, vector, shift):
        writer.bits(shift, 5)
    if writer.ask(PACED, vector, pace != USUAL):
        writer.bits(pace, 2)
    writer.bits(level, 6)
    writer.values(values, (*head, PACES[pace]))


def _pace(writer: Writer, values: Ints, head: tuple[int, ...], numbers: Sequence[int]) -> int:
    """The number of the pace that is shortest; of a single one nothing is tried, which takes as long as to write."""
    if len(numbers) == 1:
        return numbers[0]
    kept, lengths = writer.kept(), dict[int, float]()
    for number in numbers:
        writer.values(values, (*head, PACES[number]))
        lengths[number] = writer.length + (0 if number == USUAL else DEARER)
        writer.back(kept)
    return min(lengths, key=lambda number: lengths[number])


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """A compact file, cut up; nothing of it is believed yet."""

    described: bytes
    front: bytes
    stream: bytes
    body: bytes
    sum: bytes
    shaped: bool


def is_compact(data: bytes) -> bool:
    """Whether the first byte is one that such a file has."""
    return bool(data) and data[0] & MARK == MARK


def cut(data: bytes) -> Parts:
    """The parts of a file.

    Raises:
        FormatError: it is too short, or of a newer version.
    """
    short = len(data) < LONG
    if len(data) < 3 + 2 * (not short):
        raise FormatError("the file is truncated")
    found, flags = (data[0] >> 3 & 3) + 1, data[0] & 7
    if found != VERSION:
        raise FormatError(
            f"this is not a .fw file, or one of version {found}, and this program reads version {VERSION}: "
            "pass one that fw.save wrote, or update featherweight"
        )
    body = data[: -2 if short else -4]
    reader = Reader(body, 0)
    reader.byte()
    described = reader.take(reader.varint()) if flags & DESCRIBED else b""
    front = reader.take(reader.varint()) if flags & FRONT else b""
    stream = reader.take(reader.left)
    return Parts(described, front, stream, body, data[len(body) :], bool(flags & SHAPED))


def records(parts: Parts, shapes: Sequence[Shape | None], limit: int, wanted: Wanted = ALL) -> list[Packed | int]:
    """The tensors of a file, in order.

    Args:
        shapes: of each tensor, None where only the file tells it.
        limit: bytes that may be allocated.
        wanted: what to find.

    Raises:
        FormatError: the bytes are none that a writer makes, or the shapes not those that it knew.
    """
    if checksum(parts.body, [shape for shape in shapes if shape is not None], len(parts.sum) == 2) != parts.sum:
        raise FormatError(
            "the file is truncated or corrupt, or the model that it is loaded into is of another class or "
            "configuration than was saved: its checksum, which counts the shapes of tensors in, does not match"
        )
    source, front = Source(parts.stream, weigh=wanted.weigh), Reader(parts.front, limit, wanted)
    last = dict[bool, Tensor]()
    found: list[Packed | int] = []
    for shape in shapes:
        found.append(_get_tensor(source, front, shape, found, last))
    if front.left or not source.position <= len(parts.stream) <= source.position + 4:
        raise FormatError("the file is corrupt: it holds bytes that belong to no tensor, or its stream ends too early")
    return found


def _get_tensor(
    source: Source, front: Reader, shape: Shape | None, found: list[Packed | int], last: dict[bool, Tensor]
) -> Packed | int:
    before, start = front.position, source.position
    apart = source.ask(APART, False)
    if apart and source.ask(TIED, False):
        return _get_tie(source, found)
    number = source.bits(5) if source.ask(TYPED, False) else 0
    if number >= len(DTYPES):
        raise FormatError(f"the file is corrupt or newer: a tensor has the type {number}")
    shape, dtype = _get_shape(source) if shape is None else shape, DTYPES[number]
    front.spend(math.prod(shape) * max(dtype.itemsize, 4))
    if apart:
        packed = read_body(front, (shape, dtype), before)
        row, more = packed.row, source.position - start
        return replace(packed, row=replace(row, bytes=row.bytes + more, side_bytes=row.side_bytes + more))
    return _get_integers(source, front, (shape, dtype), last, (before, start))


def _get_tie(source: Source, found: list[Packed | int]) -> int:
    number = source.number()
    if number >= len(found) or isinstance(found[number], int):
        raise FormatError(f"the file is corrupt: a tensor repeats number {number}, which is none before it")
    return number


def _get_shape(source: Source) -> Shape:
    dims = source.bits(6)
    shape = tuple(source.number() for _ in range(dims)) if dims <= 32 else ()
    if dims > 32 or math.prod(max(size, 1) for size in shape) >= LARGEST_TENSOR:
        raise FormatError(f"the file is corrupt: a tensor has {dims} dimensions, or too many elements")
    return shape


def _get_integers(
    source: Source, front: Reader, head: Head, last: dict[bool, Tensor], starts: tuple[int, int]
) -> Packed:
    shape, dtype = head
    vector, count = len(shape) < 2, math.prod(shape)
    wide = source.bits(3) if source.ask(WIDE, vector) else SYMBOLS.index(torch.int8)
    if wide >= len(SYMBOLS) or dtype not in FLOATS or not count:
        raise FormatError("the file is corrupt: an integer grid has an impossible type, or no weights")
    rule, centre = _get_rule(source, front, head, vector, last)
    side = front.position - starts[0] + source.position - starts[1]
    front.spend(count * SYMBOL)
    ideal = source.ideal
    whole = _get_values(source, shape, vector) + centre
    limits, low, high = torch.iinfo(SYMBOLS[wide]), int(whole.min()), int(whole.max())
    if not limits.min <= low <= high <= limits.max:
        raise FormatError(f"the file is corrupt: integers from {low} to {high} are no {SYMBOLS[wide]}")
    codes = Codes(torch.from_numpy(whole).to(SYMBOLS[wide]).view(shape), rule, shape)
    total = front.position - starts[0] + source.position - starts[1]
    row = account(head, AFFINE, "context_mixing", total, side)
    row = counted(row, [counts(whole - low, high - low + 1)], high - low + 1)
    spare = total - side - (source.ideal - ideal) if source.ideal else 0.0
    wanted, weight = front.wanted, codes.decode()
    weight = weight if wanted.dtype is None else weight.to(wanted.dtype)
    return Packed(weight, codes if wanted.codes else None, row, total - side, spare)


def _get_rule(source: Source, front: Reader, head: Head, vector: bool, last: dict[bool, Tensor]) -> tuple[Affine, int]:
    if source.ask(ODD_GRID, vector):
        kind = front.byte()
        axis = (kind & 31) - 1 if kind & 31 else None
        block = front.varint() if kind & BLOCKS else None
        centre = front.signed()
        rule = Affine(read_tensor(front, 1).tensor, read_tensor(front, 1).tensor, axis, block)
        if kind & ~(31 | BLOCKS) or not grid_fits(head, rule) or abs(centre) >= 1 << 62:
            raise FormatError("the file is corrupt: a scale or zero point does not fit the tensor of its integer grid")
        return rule, centre
    before, dtype = last.get(vector, last.get(not vector)), head[1]
    if source.ask(NEW_SCALE, vector):
        last[vector] = _get_scale(source, vector, dtype)
    elif before is None:
        raise FormatError("the file is corrupt: a scale is the one before, and there is none")
    else:
        last[vector] = before
    if last[vector].dtype != dtype:
        raise FormatError("the file is corrupt: a scale is of another type than its tensor")
    return Affine(last[vector], torch.zeros((), dtype=torch.int32)), 0


def _get_scale(source: Source, vector: bool, dtype: torch.dtype) -> Tensor:
    if not source.ask(LONG_SCALE, vector):
        return torch.tensor(_step(source.bits(8)), dtype=dtype)
    stored = dtype if source.ask(WHOLE_SCALE, vector) else torch.bfloat16
    data = source.bits(8 * stored.itemsize).to_bytes(stored.itemsize, "little")
    return from_bytes(np.frombuffer(data, dtype=np.uint8), stored, ()).to(dtype)


def _get_values(source: Source, shape: Shape, vector: bool) -> Ints:
    trellis = (1 if source.ask(FOUR, vector) else 2) if source.ask(TRELLIS, vector) else 0
    width, kernel, line = _rows(shape)
    if len(shape) == 2 and source.ask(FOLDED, vector):
        kernel, line = source.number(), source.number()
        if not 0 < line <= kernel <= width or width % kernel or kernel % line:
            raise FormatError("the file is corrupt: rows of a matrix are no whole kernels")
    shift = source.bits(5) if source.ask(SHIFTED, vector) else 0
    if shift > 16:
        raise FormatError(f"the file is corrupt: its stream leaves out {shift} bits of integers")
    pace = PACES[source.bits(2) if source.ask(PACED, vector) else USUAL]
    head = (width, kernel, line, trellis, shift, mean_of(source.bits(6)), pace)
    return source.values(math.prod(shape), head)
