"""Reads one tensor back. Every declared size is checked against what is left, and against an allowance, before use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from featherweight.coding.bits import ALL, Ints, Reader, Wanted
from featherweight.coding.records import (
    ADDED,
    AFFINE,
    BLOCKS,
    COLUMNS,
    DECLARED,
    DTYPES,
    FLOATS,
    NARROWER,
    PATTERNS,
    PLANES,
    PRODUCT,
    RAW,
    SIGNS,
    SYMBOLS,
    TABLE,
    TABLES,
    ZEROS,
    Row,
    account,
    bytes_of,
    counted,
    counts,
    from_bytes,
    grid_fits,
    patterns_of,
    tables_fit,
)
from featherweight.coding.streams import LARGEST, WIDEST, unpack_all, unpack_into, unpack_symbols
from featherweight.core.forms import Affine, Codes, Product, Table
from featherweight.errors import FormatError

FREE = 16 << 20  # bytes that a file may describe, however short it is
PER_BYTE = 256  # bytes that each byte of a file may describe beyond that
PIECE = 1 << 14  # elements that are worked on at a time where it takes copies
EXACT = 1 << 24  # integers up to here are float32
LARGEST_TENSOR = 1 << 48  # elements: what lies beyond cannot be counted safely
Head = tuple[tuple[int, ...], torch.dtype]
NO_ROW = Row("", (), "", "", "", 0, 0, 0, 0.0)  # where nobody asks for an account


@dataclass(frozen=True)
class Packed:
    """A tensor as read: its values, the codes that were declared behind it, and an account of its bytes.

    `coded` of its bytes are code words; `spare` of these more than adaptive models ideally
    take: 0 where there were none or nobody asked.
    """

    tensor: Tensor
    codes: Codes | None
    row: Row
    coded: int = 0
    spare: float = 0.0


@dataclass(frozen=True)
class Body:
    """What follows the head of a record; `side` is the number of its bytes that are no symbols."""

    tensor: Tensor
    side: int
    coder: str = "none"
    streams: list[Ints] | None = None  # of each stream, how often its symbols occur
    size: int = 0
    codes: Codes | None = None


def unpack_tensor(data: bytes, *, limit: int | None = None) -> Tensor:
    """The tensor whose bytes `pack_tensor` made.

    Args:
        limit: bytes that may be allocated; 16 MiB and 256 times the length of the data unless said.

    Raises:
        FormatError: the bytes are none that `pack_tensor` makes.
    """
    reader = Reader(data, allowance(len(data)) if limit is None else limit)
    tensor = read_tensor(reader).tensor
    if reader.left:
        raise FormatError(f"the tensor is followed by {reader.left} bytes that do not belong to it")
    return tensor


def allowance(length: int) -> int:
    """The bytes of tensors that a file of this length may describe."""
    return FREE + PER_BYTE * length


def read_tensor(reader: Reader, depth: int = 0) -> Packed:
    """The next tensor of a reader, with its codes and an account of its bytes.

    Raises:
        FormatError: the bytes are none that a writer makes.
    """
    start = reader.position
    return read_body(reader, _read_head(reader), start, depth)


def read_body(reader: Reader, head: Head, start: int, depth: int = 0) -> Packed:
    """What follows the head of a record that began at `start`: a tensor of that shape and type.

    Raises:
        FormatError: the bytes are none that a writer makes.
    """
    coded, spare = reader.coded, reader.spare
    kind = reader.byte()
    layout = kind & 7
    if layout not in BODIES or (depth and layout in (AFFINE, PRODUCT, TABLES)) or depth > 2:
        raise FormatError(f"the file is corrupt or newer: a tensor has the unknown layout {layout}")
    side = reader.position - start
    body = BODIES[layout](reader, head, kind, depth)
    row = NO_ROW
    if reader.weigh:
        row = account(head, layout, body.coder, reader.position - start, side + body.side)
        row = row if body.streams is None else counted(row, body.streams, body.size)
    tensor, codes = body.tensor, body.codes if kind & DECLARED and reader.wanted.codes else None
    if not depth and reader.wanted.dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(reader.wanted.dtype)
    packed = Packed(tensor, codes, row, reader.coded - coded, reader.spare - spare)
    if depth:  # to the tensor that it belongs to, all of it is side information
        reader.coded, reader.spare = coded, spare
    return packed


def _read_head(reader: Reader) -> Head:
    first = reader.byte()
    number, dims = first & 31, first >> 5
    dims = reader.varint() if dims == 7 else dims
    if number >= len(DTYPES) or dims > 32:
        raise FormatError(f"the file is corrupt or newer: a tensor has type {number} and {dims} dimensions")
    shape = tuple([reader.varint() for _ in range(dims)])
    if prod([size or 1 for size in shape]) >= LARGEST_TENSOR:  # a size of zero must not hide the others
        raise FormatError(f"the file is corrupt: a tensor has the shape {shape[:4]}{'...' if dims > 4 else ''}")
    reader.spend(prod(shape) * max(DTYPES[number].itemsize, 4))
    return shape, DTYPES[number]


def _read_raw(reader: Reader, head: Head, kind: int, depth: int) -> Body:
    (shape, dtype), number = head, kind >> 4
    if number == ZEROS:
        return Body(torch.zeros(shape, dtype=dtype), 0)
    if number > len(NARROWER):
        raise FormatError(f"the file is corrupt or newer: a tensor is stored as the unknown type {number}")
    stored = NARROWER[number - 1] if number else dtype
    data = reader.code(prod(shape) * stored.itemsize)
    if not data or stored == torch.bool:
        return Body(from_bytes(np.frombuffer(data, dtype=np.uint8), stored, shape).to(dtype), 0)
    return Body(torch.frombuffer(bytearray(data), dtype=stored).view(shape).to(dtype), 0)


def _read_planes(reader: Reader, head: Head, kind: int, depth: int) -> Body:
    shape, dtype = head
    size = dtype.itemsize
    if size not in PATTERNS or dtype == torch.bool or dtype.is_complex:
        raise FormatError(f"the file is corrupt: a tensor of type {dtype} is stored in planes of bytes")
    tensor = torch.empty(shape, dtype=dtype)
    raw = bytes_of(tensor).reshape(-1, size)
    for place in range(size):

        def take(start: int, plane: Ints, place: int = place) -> None:
            raw[start : start + len(plane), place] = plane

        unpack_into(reader, len(raw), 256, take)
    streams = [counts(raw[:, place].astype(np.int64), 256) for place in range(size)] if reader.weigh else None
    if dtype.is_floating_point:
        bits = raw.reshape(-1).view(PATTERNS[size])
        one, rest = bits.dtype.type(1), bits.dtype.type(8 * size - 1)
        for start in range(0, len(bits), PIECE):
            some = bits[start : start + PIECE]
            some[:] = some >> one | some << rest
    return Body(tensor, 0, "per byte", streams, 256)


def _read_table(reader: Reader, head: Head, kind: int, depth: int) -> Body:
    shape, dtype = head
    start = reader.position
    values = read_tensor(reader, depth + 1).tensor
    if values.dtype != dtype or values.dim() != 1 or not 0 < len(values) <= WIDEST:
        raise FormatError("the file is corrupt: a table of values has another type or shape than its tensor")
    side = reader.position - start
    made = Weights(
        reader, head, Table(values), kind, torch.int32, (0, len(values)), wanted=ALL if depth else reader.wanted
    )
    coder = unpack_into(reader, prod(shape), len(values), made.take)
    return Body(made.weight, side, coder, made.streams(len(values)), len(values), made.codes())


class Weights:
    """A weight that symbols are turned into block by block, and the integers behind it if these are to be kept."""

    def __init__(
        self,
        reader: Reader,
        head: Head,
        rule: Table | Affine,
        kind: int,
        integers: torch.dtype,
        alphabet: tuple[int, int],
        *,
        wanted: Wanted,
    ) -> None:
        self.shape, dtype = head
        self.rule, (self.low, self.size) = rule, alphabet
        self.whole = torch.empty(self.shape, dtype=integers) if kind & DECLARED and wanted.codes else None
        needed = wanted.weights or self.whole is None or kind & SIGNS  # signs are counted by the zeros
        own = dtype if kind & SIGNS or dtype not in FLOATS else wanted.dtype or dtype
        self.weight = torch.empty(self.shape, dtype=own, device="cpu" if needed else "meta")
        self.table = self._table(dtype, self.size) if needed else None
        self.table = self.table if self.table is None else self.table.to(own)
        self.run = self._run()
        self.weigh, self.seen = reader.weigh, list[Ints]()

    def _table(self, dtype: torch.dtype, size: int) -> Tensor | None:
        """The weight for each symbol, and, where there are several, for each scale; None where that is too many."""
        if isinstance(self.rule, Table):
            return self.rule.values
        scale, zero = self.rule.scale, self.rule.zero_point
        rows = max(scale.numel(), zero.numel())
        if rows * size > max(256, self.weight.numel() // (1 if rows == 1 else 8)):
            return None
        first = self.low - int(zero) if rows == 1 and not zero.is_floating_point() else EXACT
        if dtype == torch.float32 and -EXACT <= first <= first + size <= EXACT:  # the same in fewer steps
            return torch.arange(first, first + size, dtype=dtype) * scale
        whole = torch.arange(self.low, self.low + size).expand(rows, size)
        scale, zero = (v if v.numel() > 1 else v.view(()) for v in (scale, zero))
        return Affine(scale, zero, 0).decode(whole, (rows, size)).view(-1)

    def _run(self) -> int:
        """How many weights in a row have one scale."""
        if isinstance(self.rule, Table) or (self.rule.block is None and self.rule.axis is None):
            return max(self.weight.numel(), 1)
        return self.rule.block or max(prod(self.shape[(self.rule.axis or 0) + 1 :]), 1)

    def take(self, start: int, symbols: Ints) -> None:
        if self.weigh:
            self.seen.append(symbols)
        if self.whole is not None:
            kept = self.whole.view(-1)[start : start + len(symbols)]
            kept.copy_(torch.from_numpy(symbols))
            if self.low:
                kept += self.low
        if self.weight.is_meta:
            return
        flat = self.weight.view(-1)[start : start + len(symbols)]
        if self.table is not None and self.table.element_size() <= 8 and symbols.dtype.itemsize <= 2:
            from featherweight.coding.rans_kernels import spread  # such symbols come from a coder that is compiled too

            spread(symbols, patterns_of(self.table), patterns_of(flat), start, self.run, self.size)
            return
        for at in range(0, len(symbols), PIECE):
            some = torch.from_numpy(symbols[at : at + PIECE].astype(np.int64))
            flat[at : at + PIECE] = self._weights(start + at, some)

    def _weights(self, start: int, symbols: Tensor) -> Tensor:
        """The weights of some symbols, each at the scale and zero point of its place."""
        rule = self.rule
        if isinstance(rule, Table):
            return rule.values[symbols]
        rows = max(rule.scale.numel(), rule.zero_point.numel())
        if self.table is not None and rows == 1:
            return self.table[symbols]
        place = torch.arange(start, start + len(symbols)) // self.run % rows
        if self.table is not None:
            return self.table[place * self.size + symbols]
        scale, zero = (v[place] if v.numel() > 1 else v.view(()) for v in (rule.scale, rule.zero_point))
        return Affine(scale, zero, 0).decode(symbols + self.low, (len(symbols),))

    def streams(self, size: int) -> list[Ints] | None:
        return [counts(np.concatenate(self.seen).astype(np.int64), size)] if self.weigh else None

    def codes(self) -> Codes | None:
        return None if self.whole is None else Codes(self.whole, self.rule, self.shape)


def _read_affine(reader: Reader, head: Head, kind: int, depth: int) -> Body:
    (shape, _), start = head, reader.position
    first = reader.byte()
    axis = (first & 31) - 1 if first & 31 else None
    block = reader.varint() if kind & BLOCKS else None
    low, size = reader.signed(), reader.varint()
    scale, zero = read_tensor(reader, depth + 1).tensor, read_tensor(reader, depth + 1).tensor
    rule = Affine(scale, zero, axis, block)
    if not grid_fits(head, rule):
        raise FormatError("the file is corrupt: a scale or zero point does not fit the tensor of its integer grid")
    if first >> 5 >= len(SYMBOLS) or not 0 < size <= LARGEST:
        raise FormatError(f"the file is corrupt: an integer grid has type {first >> 5} and {size} symbols")
    integers = SYMBOLS[first >> 5]
    limits = torch.iinfo(integers)
    if not limits.min <= low <= low + size - 1 <= limits.max:
        raise FormatError(f"the file is corrupt: integers from {low} to {low + size - 1} are no {integers}")
    side = reader.position - start
    made = Weights(reader, head, rule, kind, integers, (low, size), wanted=reader.wanted)
    coder = unpack_into(reader, prod(shape), size, made.take)
    return _signed(reader, head, kind, Body(made.weight, side, coder, made.streams(size), size, made.codes()))


def _read_product(reader: Reader, head: Head, kind: int, depth: int) -> Body:
    (shape, dtype), start = head, reader.position
    axis = reader.byte() if kind & COLUMNS else None
    books = read_tensor(reader, depth + 1).tensor
    rows = Product(books, axis).rows(shape) if (axis or 0) < len(shape) else 0
    fits = books.dim() in (3, 4) and books.dtype == dtype and (books.dim() == 3 or dtype in ADDED)
    if not fits or not books.numel() or not rows or rows * books.shape[-3] * books.shape[-1] != prod(shape):
        raise FormatError("the file is corrupt: product codebooks do not fit their tensor")
    if books.shape[-2] > WIDEST:
        raise FormatError(f"the file is corrupt: a product codebook holds {books.shape[-2]} vectors")
    side = reader.position - start
    seen = (*books.shape[:-3], rows, books.shape[-3])
    copies = len(seen) - 2 + (axis is not None)
    reader.spend(copies * prod(seen) * books.shape[-1] * dtype.itemsize)  # stages are added one by one
    symbols, coder = unpack_all(reader, prod(seen), books.shape[-2])
    streams = [counts(symbols, books.shape[-2])] if reader.weigh else None
    codes = Codes(torch.from_numpy(symbols.astype(np.int32)).view(seen), Product(books, axis), shape)
    del symbols
    kept = codes if kind & DECLARED else None
    return _signed(reader, head, kind, Body(codes.decode(), side, coder, streams, books.shape[-2], kept))


def _read_tables(reader: Reader, head: Head, kind: int, depth: int) -> Body:
    (shape, _), start = head, reader.position
    axis, values = reader.byte(), read_tensor(reader, depth + 1).tensor
    if not tables_fit(head, values, axis):
        raise FormatError("the file is corrupt: tables of values have another type or shape than their tensor")
    side, size = reader.position - start, values.shape[1]
    symbols, coder = unpack_all(reader, prod(shape), size)
    codes = Codes(torch.from_numpy(symbols.astype(np.int32)).view(shape), Table(values, axis), shape)
    streams = [counts(symbols, size)] if reader.weigh else None
    kept = codes if kind & DECLARED else None
    return _signed(reader, head, kind, Body(codes.decode(), side, coder, streams, size, kept))


def _signed(reader: Reader, head: Head, kind: int, body: Body) -> Body:
    """The body with the signs of its zeros corrected, if the record says that they must be."""
    tensor = body.tensor.contiguous()
    if tuple(tensor.shape) != head[0] or tensor.dtype not in (head[1], reader.wanted.dtype):
        raise FormatError("the file is corrupt: codes decode to another shape or type than their tensor")
    if not kind & SIGNS:
        return body if tensor is body.tensor else replace(body, tensor=tensor)
    if tensor.dtype not in FLOATS:
        raise FormatError(f"the file is corrupt: a tensor of type {tensor.dtype} has signs of zeros")
    start, zeros = reader.position, tensor == 0
    coded, spare = reader.coded, reader.spare
    negative = unpack_symbols(reader, int(zeros.sum()), 2)[0]
    reader.coded, reader.spare = coded, spare  # side information
    signed = torch.zeros(len(negative), dtype=tensor.dtype)
    signed[torch.from_numpy(negative == 1)] = -0.0
    tensor[zeros] = signed
    return replace(body, tensor=tensor, side=body.side + reader.position - start)


BODIES = {
    RAW: _read_raw,
    PLANES: _read_planes,
    TABLE: _read_table,
    AFFINE: _read_affine,
    PRODUCT: _read_product,
    TABLES: _read_tables,
}
