"""Ways to damage a .fw file: bytes of the file, fields of its records, its description as text and as a tree.

`mutated(data, rng)` gives the damaged bytes and the names of what was done. Half of all mutations lie below the
checksums, which are then made right again, so that the decoders are reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from featherweight.coding import compact
from featherweight.coding.bits import Reader, pack_list, varint
from featherweight.coding.container import assemble
from featherweight.coding.unpacking import read_tensor
from featherweight.errors import FeatherweightError
from mutated_bytes import Random, bytes_changed, cut, extreme
from mutated_descriptions import text_changed, tree_changed, wiring_changed

Parts = tuple[bytes, list[bytes], bool]
Span = tuple[str, int, int]
Shapes = Sequence[tuple[int, ...]]
PLENTY = 1 << 20  # bytes that a record may describe: a fuzzer takes damaged files apart too


# --- taking a file apart ----------------------------------------------------------------------------------------------


class Noting(Reader):
    """A reader that notes every field that it reads: ("byte" | "varint" | "bytes", start, end)."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data, PLENTY)
        self.spans: list[Span] = []

    def _note(self, kind: str, read: Callable[[], Any]) -> Any:
        start, known = self.position, len(self.spans)
        value = read()
        self.spans[known:] = [(kind, start, self.position)]  # a varint is read byte by byte: one field
        return value

    def take(self, count: int) -> bytes:
        return self._note("bytes", lambda: Reader.take(self, count))

    def byte(self) -> int:
        return self._note("byte", lambda: Reader.byte(self))

    def varint(self) -> int:
        return self._note("varint", lambda: Reader.varint(self))


@lru_cache(maxsize=1024)
def fields(record: bytes) -> tuple[Span, ...]:
    """Where the fields of an honest record lie."""
    source = Noting(record)
    try:
        read_tensor(source)
    except FeatherweightError:  # a tie, or a record that was damaged before
        return (("bytes", 0, len(record)),)
    return tuple(source.spans)


@lru_cache(maxsize=256)
def parts(data: bytes) -> tuple[bytes, tuple[bytes, ...], bool]:
    """The deflated description and the records of an honest file; those of a compact one are no bytes of their own."""
    if compact.is_compact(data):
        return compact.cut(data).described, (data[1:],), True
    bare = bool(data[2] & 0x80)
    source = Reader(data[:-4] if bare else data, PLENTY)
    source.take(3)
    manifest = source.take(source.varint())
    records = []
    if not bare:
        source.take(4)
    while source.left:
        if not bare:
            records.append(source.take(source.varint()))
            source.take(4)
        elif source.data[source.position] == 0x1F:
            start = source.position
            source.byte()
            source.varint()
            records.append(data[start : source.position])
        else:
            start = source.position
            read_tensor(source)
            records.append(data[start : source.position])
    return manifest, tuple(records), bare


def field_changed(record: bytes, rng: Random) -> bytes:
    """One to three fields of a record replaced by numbers at an edge, other codes, or more or fewer bytes."""
    out = bytearray(record)
    spans = fields(record)
    for index in sorted(rng.integers(len(spans), size=int(rng.integers(1, 4))).tolist(), reverse=True):
        kind, start, end = spans[index]
        if kind == "varint":
            out[start:end] = varint(extreme(rng))
        elif kind == "byte":
            out[start:end] = bytes([int(rng.integers(256))]) if rng.random() < 0.5 else bytes([out[start] ^ 0x08])
        else:
            out[start:end] = bytes_changed(bytes(out[start:end]), rng)
    return bytes(out)


# --- whole records ----------------------------------------------------------------------------------------------------


def constant(size: int, rng: Random) -> bytes:
    """A stream that says one of `size` symbols as often as is asked for, or nearly: codes of next to no bytes."""
    at, coder = int(rng.integers(size)), int(rng.integers(1, 6))
    if coder == 4:  # context-adaptive: whatever comes first in the code, then as few bits for each symbol as can be
        code = bytes_changed(bytes([int(rng.integers(1, 255))] * int(rng.integers(1, 40))), rng).rstrip(b"\0")
        width = varint(int(rng.choice([1, 2, 64, 1 << 40])))
        return b"\x10" + varint(at) + width + bytes([int(rng.integers(256))]) + varint(len(code)) + code
    if coder == 5:  # a multiset: the same, in rows of any width and of one run or none
        code = bytes_changed(bytes([int(rng.integers(1, 255))] * int(rng.integers(1, 40))), rng).rstrip(b"\0")
        width = varint(int(rng.choice([1, 2, 64, 1 << 16, 1 << 40])))
        return b"\x1c" + width + bytes([int(rng.integers(2))]) + varint(len(code)) + code
    return bytes([coder << 2]) + pack_list([int(i == at) for i in range(size)]) + (b"" if coder == 1 else b"\0")


def bomb(rng: Random) -> bytes:
    """A record whose few bytes describe as much, or as slow, as its kind can."""
    count = int(rng.choice([1 << 10, 1 << 16, 1 << 19, 1 << 20, 1 << 21, 1 << 22, 3 << 20, 1 << 23, 1 << 26, 1 << 39]))
    kind = int(rng.choice([0, 0, 0, 1, 3, 4, 5, 8, 13, 14, 15]))
    shapes = [[count], [1, count], [count, 1], [count >> 5 or 1, 32], [0, count], [count, 0, count]]
    shape = shapes[int(rng.integers(6))]
    head = bytes([kind | len(shape) << 5]) + b"".join(varint(s) for s in shape)
    two, scalar = bytes([kind | 1 << 5, 2, 0xF0]), bytes([kind, 0xF0])
    background = bytes([1 | int(rng.integers(33)) << 2, int(rng.integers(2)), 0, 0, 0])
    mask = bytes([2, 0]) + constant(2, rng) + constant(2, rng)
    many = int(rng.choice([2, 3, 256, 65536, 65537, 1 << 32]))
    affine = bytes([int(rng.integers(256)), 0]) + varint(many) + scalar * 2
    any_of = constant(min(many, 4096), rng)
    records = (
        head + b"\xf0",
        head + b"\x01" + b"".join(constant(256, rng) for _ in range(8)),
        head + b"\x01" + background * 8,
        head + b"\x02" + two + constant(2, rng),
        head + b"\x02" + two + background,
        head + b"\x02" + two + mask,
        head + b"\x0a" + two + background,
        head + b"\x1b" + affine + background + mask,
        head + b"\x1b" + affine + any_of + constant(2, rng),
        head + b"\x0b" + affine + background,
        head + b"\x0c" + bytes([kind | 3 << 5, 1, 2]) + varint(shape[-1]) + b"\xf0" + background,
        head + b"\x1c" + bytes([kind | 3 << 5, 32, 2, 1, 0xF0]) + constant(2, rng) * 2,
        head + b"\x02" + bytes([kind | 1 << 5]) + varint(min(many, 4096)) + b"\xf0" + any_of,
        head + b"\x02" + bytes([kind | 1 << 5]) + varint(65536) + b"\xf0" + background,
    )
    return records[int(rng.integers(len(records)))]


def records_changed(records: list[bytes], rng: Random) -> tuple[str, list[bytes]]:
    """One record damaged, or the list of them: repeated, moved, removed, tied, blown up."""
    kind = int(rng.integers(10))
    at = int(rng.integers(len(records))) if records else 0
    if not records or kind == 0:
        return "bomb", [*records[:at], bomb(rng), *records[at:]]
    if kind == 1:
        some = records[at : at + 3]
        several = min(int(rng.choice([1, 1, 200])), 1 + 500_000 // (1 + sum(map(len, some))))
        return "records repeated", records + some * several
    if kind == 2:
        return "records moved", [records[i] for i in rng.permutation(len(records))]
    if kind == 3:
        return "records removed", records[:at] + records[at + int(rng.integers(1, 3)) :]
    changes = (
        lambda record, rng: bomb(rng),
        lambda record, rng: b"\x1f" + varint(extreme(rng)),
        field_changed,
        bytes_changed,
    )
    which = (0, 1, 2, 2, 2, 3)[kind - 4]
    names = ("bomb in place", "tie", "field_changed", "bytes_changed")
    return names[which], [*records[:at], changes[which](records[at], rng), *records[at + 1 :]]


# --- one case ---------------------------------------------------------------------------------------------------------


def _compact_changed(data: bytes, rng: Random, shapes: Shapes) -> tuple[str, bytes]:
    had = compact.cut(data)
    whole = {"description": had.described, "front": had.front, "stream": had.stream}
    name = str(rng.choice([name for name, part in whole.items() if part] or ["stream"]))
    change = (bytes_changed, tree_changed)[int(name == "description" and rng.random() < 0.8)]
    whole[name] = change(whole[name], rng)
    if rng.random() < 0.1:
        whole["stream"] += bytes(rng.integers(0, 256, size=int(rng.integers(1, 6))).tolist())
    described, front, stream = whole.values()
    flags = bool(described) | bool(front) << 1 | had.shaped << 2
    body = (
        bytes([compact.MARK | flags]) + b"".join(varint(len(one)) + one for one in (described, front) if one) + stream
    )
    known = [] if had.shaped else shapes
    return f"compact {name}: {change.__name__}", body + compact.checksum(body, known, len(body) + 2 < compact.LONG)


def resigned(data: bytes, rng: Random, shapes: Shapes = ()) -> tuple[str, bytes]:
    """A mutation below the checksums, which are made right again.

    Args:
        shapes: those that the checksum of a compact file counts in.
    """
    if compact.is_compact(data):
        return _compact_changed(data, rng, shapes)
    manifest, some, bare = parts(data)
    records = list(some)
    what = "other header"
    if manifest and rng.random() < 0.5:
        changes = (
            tree_changed,
            tree_changed,
            tree_changed,
            wiring_changed,
            wiring_changed,
            text_changed,
            bytes_changed,
        )
        change = changes[int(rng.integers(7))]
        what, manifest = f"description: {change.__name__}", change(manifest, rng)
        if rng.random() < 0.1:
            also, records = records_changed(records, rng)
            what = f"{what}, {also}"
    elif rng.random() < 0.97:
        what, records = records_changed(records, rng)
    if what == "other header" or rng.random() < 0.02:
        bare = not bare
    return what, assemble(manifest, records, bare)


def mutated(data: bytes, rng: Random, *, sign: bool, shapes: Shapes = ()) -> tuple[str, bytes]:
    """What was done, and the bytes."""
    if sign:
        return resigned(data, rng, shapes)
    if rng.random() < 0.2:
        return "cut", cut(data, rng)
    return "bytes", bytes_changed(data, rng)
