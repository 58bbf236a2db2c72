"""Writes one tensor, losslessly: declared codes first, values second; every side table is counted."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from featherweight.coding.bits import Ints, varint, zigzag
from featherweight.coding.records import (
    ADDED,
    AFFINE,
    BLOCKS,
    COLUMNS,
    DECLARED,
    DTYPES,
    NARROWER,
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
    grid_fits,
    patterns_of,
    same_bits,
    tables_fit,
)
from featherweight.coding.streams import FAST, FIXED, LARGEST, WIDEST, allowed, described, pack_symbols
from featherweight.core.forms import Affine, Codes, Product, Table, along
from featherweight.errors import BadData

FEW = 64  # elements below which planes of bytes cannot pay
MANY = 1 << 12  # and below which they do not pay for the time that it takes to read them


@dataclass(frozen=True)
class Stored:
    """A tensor as written: the bytes, and an account of them."""

    data: bytes
    row: Row


def pack_tensor(tensor: Tensor, codes: Codes | None = None, *, coder: str | None = None) -> bytes:
    """The bytes of one tensor: `unpack_tensor` gives back every bit of it.

    Args:
        codes: the integers behind it; used if they decode to the tensor, else the values are looked at.
        coder: "huffman", "range_coder" ("range"), "rans" ("ans"), "sparse_index" (fixed widths), "deepcabac" ("cabac"),
            "context_mixing" ("cm"), "smallest" (all of these), "fast" (interleaved ANS);
            None for the shortest of the first four.

    Raises:
        UnknownName: there is no such coder.
        BadData: a tensor that cannot be stored (sparse, or of a type that the format has no number for).
    """
    return store(tensor, codes, allowed(coder)).data


def store(tensor: Tensor, codes: Codes | None, coders: tuple[int, ...]) -> Stored:
    """`pack_tensor`, with an account of the bytes."""
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        raise BadData(
            f"a {tensor.layout} tensor of type {tensor.dtype} cannot be stored: convert it to an ordinary one"
        )
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if codes is not None and tensor.numel():
        declared = _declared(tensor, codes, coders)
        if declared is not None:
            return declared
    options = [_raw(tensor), _planes(tensor, coders), _table(tensor, coders)]
    return min((found for found in options if found is not None), key=lambda found: len(found.data))


def _declared(tensor: Tensor, codes: Codes, coders: tuple[int, ...]) -> Stored | None:
    decoded = codes.decode().detach().cpu()
    if decoded.dtype != tensor.dtype or decoded.shape != tensor.shape or not torch.equal(decoded, tensor):
        return None
    if isinstance(codes.rule, Affine):
        return _affine(tensor, codes.symbols, codes.rule, decoded, coders)
    if isinstance(codes.rule, Product):
        return _product(tensor, codes.symbols, codes.rule, decoded, coders)
    if codes.rule.axis is not None:
        return _tables(tensor, codes.symbols, codes.rule, decoded, coders)
    return _table(tensor, coders, DECLARED)


def head_bytes(tensor: Tensor, kind: int = 0) -> bytes:
    """Type, shape and layout of a record, the last byte of it."""
    dims = tensor.dim()
    sizes = (varint(dims) if dims >= 7 else b"") + b"".join(varint(size) for size in tensor.shape)
    return bytes([DTYPES.index(tensor.dtype) | min(dims, 7) << 5]) + sizes + bytes([kind])


def _of(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _raw(tensor: Tensor) -> Stored:
    """Elements as they are, or in the narrowest type that holds each of them exactly."""
    number, data = _narrowest(tensor)
    head = head_bytes(tensor, RAW | number << 4)
    return Stored(head + data, account(_of(tensor), RAW, "none", len(head) + len(data), len(head)))


def _narrowest(tensor: Tensor) -> tuple[int, bytes]:
    own = bytes_of(tensor)
    if not own.any():
        return ZEROS, b""
    best, number = own, 0
    for candidate, dtype in enumerate(NARROWER, 1):
        if dtype.itemsize * tensor.numel() < len(best) and _may_narrow(tensor.dtype, dtype):
            narrow = tensor.to(dtype)
            if same_bits(narrow.to(tensor.dtype), tensor):
                best, number = bytes_of(narrow), candidate
    return number, best.tobytes()


def _may_narrow(own: torch.dtype, narrower: torch.dtype) -> bool:
    return not own.is_complex and own != torch.bool and (own.is_floating_point or not narrower.is_floating_point)


def _planes(tensor: Tensor, coders: tuple[int, ...]) -> Stored | None:
    """Each byte of the elements as a stream of its own; floats are turned left by a bit: whole exponents."""
    least = MANY if FAST in coders else FEW
    if coders == (FIXED,) or tensor.numel() < least or tensor.dtype == torch.bool or tensor.is_complex():
        return None
    planes = list(byte_planes(tensor))
    head = head_bytes(tensor, PLANES)
    data = head + b"".join(pack_symbols(plane, 256, coders, _widths(tensor)) for plane in planes)
    return Stored(
        data,
        counted(account(_of(tensor), PLANES, "per byte", len(data), len(head)), [counts(p, 256) for p in planes], 256),
    )


def byte_planes(tensor: Tensor) -> Ints:
    """The bytes of all elements, shape (bytes per element, elements), least significant first."""
    size, bits = tensor.element_size(), patterns_of(tensor)
    if tensor.is_floating_point():
        one, rest = bits.dtype.type(1), bits.dtype.type(8 * size - 1)
        bits = bits << one | bits >> rest
    return bits.view(np.uint8).reshape(-1, size).T.astype(np.int64)


def _table(tensor: Tensor, coders: tuple[int, ...], declared: int = 0) -> Stored | None:
    """A table of the distinct values, smallest first, and a symbol per element. `-0.0` is a value of its own."""
    patterns = patterns_of(tensor)
    if len(patterns) != tensor.numel() or not len(patterns):
        return None
    sample = patterns[: 1 << 15]
    if not declared and len(sample) > 16 and len(np.unique(sample)) * 2 > len(sample):
        return None  # mostly different values: a table would be as long as the tensor
    distinct, first, symbols = np.unique(patterns, return_index=True, return_inverse=True)
    if len(distinct) > WIDEST:
        return None
    values = tensor.reshape(-1)[torch.from_numpy(first)]
    order = _ascending(values)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    side = head_bytes(tensor, TABLE | declared) + _raw(values[torch.from_numpy(order)]).data
    return _finish(tensor, TABLE, side, rank[symbols.reshape(-1)], len(order), coders)


def _ascending(values: Tensor) -> Ints:
    """An order by value, then by bit pattern; complex numbers by bit pattern alone."""
    if values.is_complex():
        return np.arange(len(values))
    numbers = (values.double() if values.is_floating_point() else values.long()).numpy()
    return np.lexsort((patterns_of(values), ~np.signbit(numbers), numbers))


def _finish(
    tensor: Tensor,
    layout: int,
    side: bytes,
    symbols: Ints,
    size: int,
    coders: tuple[int, ...],
    tail: bytes = b"",
    *,
    zero: int | None = None,
) -> Stored:
    stream = pack_symbols(symbols, size, coders, _widths(tensor), zero)
    total = len(side) + len(stream) + len(tail)
    row = account(_of(tensor), layout, described(stream, size), total, len(side) + len(tail))
    return Stored(side + stream + tail, counted(row, [counts(symbols, size)], size))


def _affine(tensor: Tensor, symbols: Tensor, rule: Affine, decoded: Tensor, coders: tuple[int, ...]) -> Stored | None:
    """Integers, and the scale and zero point that turn them into weights."""
    integers = symbols.detach().cpu().reshape(-1)
    scale, zero = rule.scale.detach().cpu(), rule.zero_point.detach().cpu()
    if integers.dtype not in SYMBOLS or not grid_fits(_of(tensor), rule):
        return None
    low, high = int(integers.min()), int(integers.max())
    if high - low >= LARGEST:
        return None
    signs = _signs(decoded, tensor, coders)
    side = (
        head_bytes(tensor, AFFINE | DECLARED | (SIGNS if signs else 0) | (BLOCKS if rule.block else 0))
        + bytes([(0 if rule.axis is None else rule.axis + 1) | SYMBOLS.index(integers.dtype) << 5])
        + (varint(rule.block) if rule.block else b"")
        + varint(zigzag(low))
        + varint(high - low + 1)
        + store(scale, None, (FIXED,)).data
        + store(zero, None, (FIXED,)).data
    )
    return _finish(tensor, AFFINE, side, integers.long().numpy() - low, high - low + 1, coders, signs, zero=-low)


def _product(tensor: Tensor, symbols: Tensor, rule: Product, decoded: Tensor, coders: tuple[int, ...]) -> Stored | None:
    """Product codebooks: the vectors, and one symbol per block of each row, stage after stage."""
    books = rule.codebooks.detach().cpu()
    if books.shape[-2] > WIDEST or books.dtype not in DTYPES or (books.dim() == 4 and books.dtype not in ADDED):
        return None
    signs = _signs(decoded, tensor, coders)
    along_axis = rule.axis is not None
    head = head_bytes(tensor, PRODUCT | DECLARED | (SIGNS if signs else 0) | (COLUMNS if along_axis else 0))
    side = head + (bytes([rule.axis or 0]) if along_axis else b"") + store(books, None, coders).data
    flat = symbols.detach().cpu().reshape(-1).long().numpy()
    return _finish(tensor, PRODUCT, side, flat, books.shape[-2], coders, signs)


def _tables(tensor: Tensor, symbols: Tensor, rule: Table, decoded: Tensor, coders: tuple[int, ...]) -> Stored | None:
    """A table of values for each index of an axis; symbols count in the order of the values, smallest first."""
    axis, values = rule.axis, rule.values.detach().cpu()
    if axis is None or not tables_fit(_of(tensor), values, axis):
        return None
    order = values.double().argsort(dim=1, stable=True)
    ranks = order.argsort(1)
    spread = along(torch.arange(len(values)), axis, tensor.dim())
    flat = ranks[spread, symbols.detach().cpu().long().view(tensor.shape)].reshape(-1).numpy()
    signs = _signs(decoded, tensor, coders)
    head = head_bytes(tensor, TABLES | DECLARED | (SIGNS if signs else 0))
    side = head + bytes([axis]) + store(values.gather(1, order), None, (FIXED,)).data
    return _finish(tensor, TABLES, side, flat, values.shape[1], coders, signs)


def _widths(tensor: Tensor) -> tuple[int, ...]:
    """Rows in which neighbours may be alike: all that belongs to one output, the kernel of one input, its lines."""
    return tuple(prod(tensor.shape[start:]) for start in ((1,), (1, 2), (1, 2, -1))[min(max(tensor.dim() - 2, 0), 2)])


def _signs(decoded: Tensor, tensor: Tensor, coders: tuple[int, ...]) -> bytes:
    """The signs of all zeros, 1 for negative, if the codes would not give them; else nothing."""
    if same_bits(decoded, tensor):
        return b""
    return pack_symbols(torch.signbit(tensor[decoded == 0]).numpy().astype(np.int64), 2, coders)
