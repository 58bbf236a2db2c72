"""One stream of symbols: how its positions are laid out and which entropy coder writes it, chosen by cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featherweight.coding.bits import Ints, Reader, entropy_bits, pack_fixed, unpack_fixed, varint
from featherweight.coding.coders.context_mixing import context_mixing, context_mixing_decode
from featherweight.coding.coders.deepcabac import deepcabac, deepcabac_decode
from featherweight.coding.coders.huffman import huffman, huffman_decode, huffman_size
from featherweight.coding.coders.interleaved_rans import interleaved_decode, interleaved_rans, interleaved_size
from featherweight.coding.coders.range_coder import entropy_coder_size, range_coder, range_decode
from featherweight.coding.coders.rans import rans, rans_decode
from featherweight.coding.coders.sparse_index import from_gaps, run_lengths, sparse_index
from featherweight.coding.coders.unlabeled_graph import unlabeled_graph, unlabeled_graph_decode
from featherweight.coding.threads import each
from featherweight.errors import FormatError, unknown

WIDEST = 1 << 16  # symbols that a table of code lengths or frequencies may have
LARGEST = 1 << 32  # symbols that a stream of fixed width may have
WIDEST_GAP = 12  # bits that a writer gives a gap; the format allows 32
FEWEST = 32  # symbols from which contexts can have learned anything
SYMBOL = 4  # bytes that a symbol is booked at while a file is read, and the time that it takes with them
DENSE, GAPS, MASK, BLOCKS = 0, 1, 2, 3  # layouts, the low two bits of a stream's first byte
LAYOUTS = ("dense", "gaps", "bitmask", "blocks")
LONG, BLOCK = 1 << 20, 1 << 19  # symbols beyond which a stream is cut, and of a block
FAST_BLOCK = 1 << 18  # of a block, where speed counts
LEAST_BLOCK = 1 << 12  # symbols that a block has, but for the last one: many small ones would be slow to read


@dataclass(frozen=True)
class Coder:
    """An entropy coder as the streams use it; `size` estimates bytes from the counts of symbols."""

    name: str
    encode: Callable[[Ints, int], bytes]
    decode: Callable[[Reader, int, int], Any]
    size: Callable[[Ints], float]


def width_of(size: int) -> int:
    """Bits of a fixed-width symbol below `size`."""
    return max(size - 1, 0).bit_length()


def _fixed_encode(symbols: Ints, size: int) -> bytes:
    return pack_fixed(symbols, width_of(size))


def _fixed_decode(reader: Reader, count: int, size: int) -> Ints:
    width = width_of(size)
    symbols = unpack_fixed(reader.code(-(-count * width // 8)), count, width)
    if width and count and int(symbols.max()) >= size:
        raise FormatError("the file is corrupt: a symbol lies outside its alphabet")
    return symbols


def _fixed_size(counts: Ints) -> float:
    return int(counts.sum()) * width_of(len(counts)) / 8


# The position in this table is the number in the file.
CODERS = (
    Coder("fixed", _fixed_encode, _fixed_decode, _fixed_size),
    Coder("huffman", huffman, huffman_decode, huffman_size),
    Coder("range_coder", range_coder, range_decode, entropy_coder_size),
    Coder("rans", rans, rans_decode, entropy_coder_size),
    Coder("deepcabac", deepcabac, deepcabac_decode, entropy_coder_size),
    Coder("context_mixing", context_mixing, context_mixing_decode, entropy_coder_size),
    Coder("interleaved_rans", interleaved_rans, interleaved_decode, interleaved_size),
    Coder("unlabeled_graph", unlabeled_graph, unlabeled_graph_decode, entropy_coder_size),
)
FIXED, CONTEXT, MIXING, FAST, MULTISET = 0, 4, 5, 6, 7
ALLOWED = {
    None: (0, 1, 2, 3),
    "fixed": (0,),
    "sparse_index": (0,),
    "huffman": (0, 1),
    "range_coder": (0, 2),
    "range": (0, 2),
    "rans": (0, 3),
    "ans": (0, 3),
    "deepcabac": (0, 4),
    "cabac": (0, 4),
    "context_mixing": (0, 5),
    "cm": (0, 5),
    "unlabeled_graph": (0, 1, 2, 3, 7),
    "smallest": (0, 1, 2, 3, 4, 5, 7),
    "fast": (0, 6),
}


def allowed(coder: str | None) -> tuple[int, ...]:
    """The coders that `coder=` lets the streams use; fixed width is always among them, for streams without skew.

    Raises:
        UnknownName: there is no such coder.
    """
    if coder not in ALLOWED:
        raise unknown("coder", str(coder), [name for name in ALLOWED if name])
    return ALLOWED[coder]


def pack_symbols(
    symbols: Ints,
    size: int,
    coders: tuple[int, ...] = ALLOWED[None],
    widths: Sequence[int] = (),
    zero: int | None = None,
) -> bytes:
    """The shortest of all layouts and coders for symbols in 0..size-1, at the sizes that their counts foretell.

    Args:
        widths: lengths of the rows in which the symbols stand, where neighbours tell something of each other: only then
            are the adaptive coders tried, which have no size that counts foretell.
        zero: the symbol that stands for zero, on an integer grid.
    """
    cuts: list[int] = []
    if 1 < size <= WIDEST and len(symbols) > (FAST_BLOCK if FAST in coders else LONG):
        every = [*range(FAST_BLOCK, len(symbols), FAST_BLOCK)]
        cuts = every if FAST in coders else _cuts(symbols, widths, zero)
    pieces = np.split(symbols, cuts)
    streams = each(lambda piece: _pack_one(piece, size, coders, widths, zero), pieces)
    if len(streams) == 1:
        return streams[0]
    sizes = b"".join(varint(len(p)) + varint(len(s)) for p, s in zip(pieces, streams, strict=True))
    return bytes([BLOCKS]) + varint(len(pieces)) + sizes + b"".join(streams)


def _pack_one(symbols: Ints, size: int, coders: tuple[int, ...], widths: Sequence[int], zero: int | None) -> bytes:
    """The shortest stream that is not cut."""
    made = [_pack_static(symbols, size, tuple(c for c in coders if c not in (CONTEXT, MIXING, MULTISET)))]
    if not widths or size <= 1 or size > WIDEST or len(symbols) < FEWEST:
        return made[0]
    if CONTEXT in coders:
        made.append(bytes([DENSE | CONTEXT << 2]) + deepcabac(symbols, size, widths))
    if MIXING in coders:
        made.append(bytes([DENSE | MIXING << 2]) + context_mixing(symbols, size, widths, zero))
    if MULTISET in coders:
        made.append(bytes([DENSE | MULTISET << 2]) + unlabeled_graph(symbols, size, widths))
    return min(made, key=len)


def _pack_static(symbols: Ints, size: int, coders: tuple[int, ...]) -> bytes:
    if size <= 1 or not len(symbols):
        return bytes([DENSE | FIXED << 2])
    if size > WIDEST:
        coders = (FIXED,)
    if FAST in coders:
        return _dense(symbols, size, coders)
    counts = np.bincount(symbols, minlength=size) if size <= WIDEST else np.array([len(symbols)])
    background = int(counts.argmax())
    if size > WIDEST or counts[background] * 4 < len(symbols):  # no layout but the dense one can win
        return _dense(symbols, size, coders)
    options: list[tuple[float, int, int]] = [(_best(counts, size, coders), DENSE, 0)]
    gaps = run_lengths(symbols, background)
    others = counts.copy()
    others[background] = 0
    values = _best(others, size, coders)
    mask = np.array([len(symbols) - len(gaps), len(gaps)])
    options.append((4 + _best(mask, 2, coders) + values, MASK, 0))
    options += [(6 + _gap_size(gaps, others, background, b, coders), GAPS, b) for b in _gap_widths(gaps)]
    _, layout, bits = min(options)
    return {DENSE: _dense, MASK: _mask, GAPS: _gaps}[layout](symbols, size, coders, background, bits)


def _size(coder: int, counts: Ints, size: int, total: int) -> float:
    return 1 + (total * width_of(size) / 8 if coder == FIXED else CODERS[coder].size(counts))


def _best(counts: Ints, size: int, coders: tuple[int, ...]) -> float:
    total = int(counts.sum())
    distinct = {CODERS[c].size: c for c in coders}.values()  # range coding and ANS have one estimate
    return min(_size(c, counts, size, total) for c in distinct) if total else 1.0


def _gap_widths(gaps: Ints) -> range:
    """The widths of a gap that are worth looking at: from a little below that of the mean gap."""
    middle = int(gaps.mean()).bit_length() if len(gaps) else 1
    return range(max(1, min(middle, WIDEST_GAP) - 2), WIDEST_GAP + 1)


def _gap_size(gaps: Ints, others: Ints, background: int, bits: int, coders: tuple[int, ...]) -> float:
    fillers = int((gaps >> bits).sum())
    entries, steps = others.copy(), np.bincount(gaps & ((1 << bits) - 1), minlength=1 << bits)
    entries[background] = fillers
    steps[-1] += fillers
    return _best(steps, len(steps), coders) + _best(entries, len(entries), coders)


def _dense(symbols: Ints, size: int, coders: tuple[int, ...], background: int = 0, bits: int = 0) -> bytes:
    """The two coders that are estimated to be shortest are both run."""
    if size <= 1 or not len(symbols):
        return bytes([DENSE | FIXED << 2])
    if size > WIDEST:
        return bytes([DENSE | FIXED << 2]) + _fixed_encode(symbols, size)
    counts = np.bincount(symbols, minlength=size)
    if entropy_bits(counts) + size >= len(symbols) * width_of(size):  # a table has at least a bit per symbol
        coders = (FIXED,)
    ranked = sorted(coders, key=lambda c: _size(c, counts, size, len(symbols)))
    made = [
        bytes([DENSE | c << 2]) + CODERS[c].encode(symbols, size) for c in ranked[: 2 if len(symbols) < 1 << 20 else 1]
    ]
    return min(made, key=len)


def _mask(symbols: Ints, size: int, coders: tuple[int, ...], background: int = 0, bits: int = 0) -> bytes:
    kept = symbols != background
    head = bytes([MASK]) + varint(background)
    return head + _dense(kept.astype(np.int64), 2, coders) + _dense(symbols[kept], size, coders)


def _gaps(symbols: Ints, size: int, coders: tuple[int, ...], background: int = 0, bits: int = 0) -> bytes:
    gaps, entries = sparse_index(symbols, background, bits)
    head = bytes([GAPS | bits << 2]) + varint(background) + varint(len(gaps))
    return head + _dense(gaps, 1 << bits, coders) + _dense(entries, size, coders)


def _cuts(symbols: Ints, widths: Sequence[int], zero: int | None) -> list[int]:
    """Where a long stream is cut: at the end of rows, and where a trellis, if these are its points, is in state 0."""
    width = next((w for w in widths if 0 < w <= BLOCK // 8), 1)
    ends = np.arange(width, len(symbols), width)
    if zero is not None:
        state = _states(symbols - zero)
        ends = ends[state[ends] == 0] if state is not None else ends
    found: list[int] = []
    for aim in range(BLOCK, len(symbols) - BLOCK // 2, BLOCK):
        near = int(ends[np.abs(ends - aim).argmin()]) if len(ends) else 0
        if near - (found[-1] if found else 0) >= LEAST_BLOCK:
            found.append(near)
    return found


def _states(whole: Ints) -> Ints | None:
    """The state of the trellis before each of its points, None if these are any integers."""
    from featherweight.coding.mixing_kernels import levels, states

    for trellis in (2, 1):
        found, fits = levels(whole, trellis)
        if fits and (whole & 1).any():
            return np.asarray(states(found, trellis))
    return None


def described(stream: bytes, size: int) -> str:
    """How a stream is laid out and coded, in words."""
    if size <= 1:
        return "constant"
    return CODERS[stream[0] >> 2].name if stream[0] & 3 == DENSE else LAYOUTS[stream[0] & 3]


Take = Callable[[int, Any], None]  # what to do with the symbols from a given one on


def unpack_into(reader: Reader, count: int, size: int, take: Take) -> str:
    """Hands `count` symbols in 0..size-1 over, block by block if there are some, in any order and maybe in threads.

    Returns how they were laid out and coded, in words.

    Raises:
        FormatError: the stream is none that a writer makes.
    """
    if not reader.left or reader.data[reader.position] & 3 != BLOCKS:
        symbols, coder = unpack_symbols(reader, count, size)
        take(0, symbols)
        return coder
    reader.spend(count * SYMBOL)
    blocks = _read_blocks(reader, count, size)
    inner = [Reader(data, 4 * some * SYMBOL + (1 << 16), reader.wanted) for _, some, data in blocks]

    def one(number: int) -> str:
        start, some, _ = blocks[number]
        symbols, coder = unpack_symbols(inner[number], some, size)
        if inner[number].left:
            raise FormatError("the file is corrupt: bytes follow the symbols of a block")
        take(start, symbols)
        return coder

    coders = each(one, range(len(blocks)), worth=count > LONG)  # to start threads takes as long as to read a few
    reader.coded += sum(own.coded for own in inner)
    reader.spare += sum(own.spare for own in inner)
    return f"{len(blocks)} blocks ({', '.join(dict.fromkeys(coders))})"


def _read_blocks(reader: Reader, count: int, size: int) -> list[tuple[int, int, memoryview]]:
    """Of each block the first symbol, how many there are, and its stream."""
    head, number = reader.byte(), reader.varint()
    if head != BLOCKS or not 1 < size <= WIDEST or not 0 < number <= count // LEAST_BLOCK + 1:
        raise FormatError(f"the file is corrupt: {count} symbols are cut into {number} blocks")
    sizes = [(reader.varint(), reader.varint()) for _ in range(number)]
    if sum(some for some, _ in sizes) != count or any(some < LEAST_BLOCK for some, _ in sizes[:-1]):
        raise FormatError("the file is corrupt: blocks do not make their stream")
    starts = np.cumsum([0, *(some for some, _ in sizes)]).tolist()
    return [(start, some, reader.view(length)) for start, (some, length) in zip(starts, sizes, strict=False)]


def unpack_all(reader: Reader, count: int, size: int) -> tuple[Any, str]:
    """All `count` symbols in 0..size-1, in the narrowest type, and how they were laid out and coded, in words."""
    found = np.empty(count, dtype=np.uint8 if size <= 256 else np.uint16 if size <= WIDEST else np.int64)

    def take(start: int, symbols: Ints) -> None:
        found[start : start + len(symbols)] = symbols

    return found, unpack_into(reader, count, size, take)


def unpack_symbols(reader: Reader, count: int, size: int, depth: int = 0) -> tuple[Ints, str]:
    """`count` symbols in 0..size-1, and how they were laid out and coded, in words.

    Raises:
        FormatError: the stream is none that a writer makes.
    """
    reader.spend(count * SYMBOL)
    head = reader.byte()
    layout, rest = head & 3, head >> 2
    if layout == DENSE and rest < len(CODERS):
        if size <= 1:
            return np.zeros(count, dtype=np.int64), "constant"
        if rest != FIXED and size > WIDEST:
            raise FormatError(f"the file is corrupt: an alphabet of {size} symbols has a table")
        symbols = CODERS[rest].decode(reader, count, size) if count else np.zeros(0, dtype=np.int64)
        return symbols, CODERS[rest].name
    if depth or layout not in (GAPS, MASK) or size <= 1:
        raise FormatError(f"the file is corrupt: a stream has the unknown layout {head:#x}")
    background = reader.varint()
    if background >= size:
        raise FormatError("the file is corrupt: the background of a sparse tensor lies outside its alphabet")
    if layout == MASK:
        bits, first = unpack_symbols(reader, count, 2, 1)
        kept = bits == 1
        del bits
        values, second = unpack_symbols(reader, int(kept.sum()), size, 1)
        symbols = np.full(count, background, dtype=np.int64)
        symbols[kept] = values
        return symbols, f"bitmask ({first}, {second})"
    entries = reader.varint()
    if entries > count or rest > 32:
        raise FormatError("the file is corrupt: a relative index has impossible gaps or more entries than its tensor")
    gaps, first = unpack_symbols(reader, entries, 1 << rest, 1)
    values, second = unpack_symbols(reader, entries, size, 1)
    return from_gaps(gaps, values, background, count), f"gaps of {rest} bits ({first}, {second})"
