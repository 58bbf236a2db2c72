"""What writer and reader of a tensor share: the numbers in its record, bit patterns, and the account of its bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featherweight.coding.bits import Ints, entropy_bits
from featherweight.coding.streams import WIDEST, width_of
from featherweight.core.forms import Affine

# The position in this table is the number in the file.
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
RAW, PLANES, TABLE, AFFINE, PRODUCT, TABLES = range(6)
LAYOUTS = ("raw", "planes", "table", "affine", "product", "tables")
DECLARED = 0x08  # the codes of the tensor were declared, and are declared again when it is read
SIGNS = 0x10  # some zeros of the weight have another sign than its codes say: a stream of signs follows
BLOCKS = 0x20  # the integer grid has a scale for each run of so many weights
COLUMNS = 0x20  # of a product: one dimension of the weight is its columns, all others are its rows
ZEROS = 15  # storage of a raw tensor: every bit is zero, nothing follows
# Types in which raw elements may be stored if each is exactly representable. The number in the file is the position
# plus one; 0 is the tensor's own type.
NARROWER = (torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int8, torch.int16, torch.int32)
SYMBOLS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # the types that an integer grid may have
ADDED = (torch.float32, torch.float64)  # the types in which the stages of a product are added
PATTERNS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Row:
    """What one tensor takes. `packed_bits` (fixed width) and `entropy_bits` (order 0) leave out the `side_bytes`.

    Side bytes are type, shape, tables, codebooks, scales and zero points, but not the tables of the coder.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    coder: str
    bytes: int
    side_bytes: int
    packed_bits: int
    entropy_bits: float

    @property
    def coded_bytes(self) -> int:
        """What the tensor takes in the file."""
        return self.bytes

    @property
    def packed_bytes(self) -> float:
        """What it would take at fixed width, with its tables."""
        return self.packed_bits / 8 + self.side_bytes

    @property
    def entropy_bytes(self) -> float:
        """The order-0 entropy of its symbols, without any table."""
        return self.entropy_bits / 8


def account(head: tuple[tuple[int, ...], torch.dtype], layout: int, coder: str, total: int, side: int) -> Row:
    """The row of a tensor whose elements are stored as they are."""
    shape, dtype = head
    bits = 8 * (total - side)
    return Row(
        "", tuple(shape), str(dtype).removeprefix("torch."), LAYOUTS[layout], coder, total, side, bits, float(bits)
    )


def counted(row: Row, streams: list[Ints], size: int) -> Row:
    """The row of a tensor that is stored as streams of symbols below `size`, given the `counts` of each."""
    packed = sum(int(found.sum()) for found in streams) * width_of(size)
    return replace(row, packed_bits=packed, entropy_bits=sum(entropy_bits(found) for found in streams))


def counts(symbols: Ints, size: int) -> Ints:
    """How often the symbols of a stream occur, those that do in any order."""
    if size <= WIDEST:
        return np.bincount(symbols, minlength=1)
    return np.asarray(np.unique(symbols, return_counts=True)[1], dtype=np.int64)


def bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor, element after element."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)


def patterns_of(tensor: Tensor) -> NDArray[Any]:
    """The bit patterns of the elements as unsigned integers, flat (the halves of complex128)."""
    return bytes_of(tensor).view(PATTERNS.get(tensor.element_size(), np.uint64))


def from_bytes(raw: NDArray[np.uint8], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor whose elements have these bytes."""
    if not len(raw):
        return torch.zeros(shape, dtype=dtype)
    data = (raw != 0).astype(np.uint8) if dtype == torch.bool else raw.copy()
    return torch.from_numpy(data).view(dtype).reshape(shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one type are equal bit for bit, `-0.0` and `0.0` apart."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(np.array_equal(bytes_of(a), bytes_of(b)))


def grid_fits(head: tuple[tuple[int, ...], torch.dtype], rule: Affine) -> bool:
    """Whether a scale and zero point can belong to a tensor: scalars, one value per index of the axis, or per block."""
    (shape, dtype), axis, block = head, rule.axis, rule.block
    scale, zero = rule.scale, rule.zero_point
    if axis is not None and not (block is None and 0 <= axis < min(len(shape), 31)):
        return False
    if block is not None and (block < 1 or prod(shape) % block):
        return False
    several = shape[axis] if axis is not None else prod(shape) // block if block else 1
    sizes = {1, several}
    return (
        scale.dtype == dtype
        and dtype in FLOATS
        and zero.dtype in (*FLOATS, *SYMBOLS)
        and all(t.dim() <= 1 and t.numel() in sizes for t in (scale, zero))
    )


def tables_fit(head: tuple[tuple[int, ...], torch.dtype], values: Tensor, axis: int) -> bool:
    """Whether tables of shape (size of the axis, k) can belong to a tensor."""
    shape, dtype = head
    sizes = values.dim() == 2 and axis < len(shape) and values.shape[0] == shape[axis] and 0 < values.shape[1] <= WIDEST
    return sizes and values.dtype == dtype and dtype in FLOATS
