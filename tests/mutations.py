"""Ways to damage a .fw file: bytes of the file, fields of its records, its description as text and as a tree.

`mutated(data, rng)` gives the damaged bytes and the names of what was done. Half of all mutations lie below the
checksums, which are then made right again, so that the decoders are reached.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from featherweight.coding.bits import Reader, pack_list, varint
from featherweight.coding.container import assemble
from featherweight.coding.manifest import WORDS, unpack_manifest
from featherweight.coding.unpacking import read_tensor
from featherweight.errors import FeatherweightError

Random = np.random.Generator
Parts = tuple[bytes, list[bytes], bool]
Span = tuple[str, int, int]
PLENTY = 1 << 40


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


@lru_cache(maxsize=4096)
def fields(record: bytes) -> tuple[Span, ...]:
    """Where the fields of an honest record lie."""
    source = Noting(record)
    try:
        read_tensor(source)
    except FeatherweightError:  # a tie, or a record that was damaged before
        return (("bytes", 0, len(record)),)
    return tuple(source.spans)


@lru_cache(maxsize=1024)
def parts(data: bytes) -> tuple[bytes, tuple[bytes, ...], bool]:
    """The deflated description and the records of an honest file."""
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


def deflated(text: bytes) -> bytes:
    """A description as a file holds it, whatever the text."""
    squeeze = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, WORDS)
    return squeeze.compress(text) + squeeze.flush()


# --- bytes ------------------------------------------------------------------------------------------------------------


def extreme(rng: Random) -> int:
    """A number at an edge: small, at or beside a power of two, or anything up to 2**62."""
    kind = int(rng.integers(4))
    if kind == 0:
        return int(rng.integers(0, 20))
    if kind == 1:
        return max(0, (1 << int(rng.integers(0, 63))) + int(rng.integers(-2, 3)))
    if kind == 2:
        return int(rng.choice([0, 127, 128, 255, 256, 65535, 65536, 65537, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1]))
    return int(rng.integers(0, 1 << int(rng.integers(1, 62))))


def bytes_changed(data: bytes, rng: Random) -> bytes:
    """A few bits flipped; bytes set, removed, doubled, moved, inserted, or set to what a length looks like."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        if not out:
            return bytes(rng.integers(0, 256, size=3, dtype=np.uint8))
        at = int(rng.integers(min(len(out), 12) if rng.random() < 0.3 else len(out)))
        kind, some = int(rng.integers(7)), int(rng.integers(1, 9))
        if kind == 0:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[at] = int(rng.choice([0, 1, 0x0F, 0x7F, 0x80, 0xF0, 0xFF]))
        elif kind == 2:
            del out[at : at + some]
        elif kind == 3:
            out[at:at] = out[at : at + some]
        elif kind == 4:
            out[at : at + 1] = varint(extreme(rng))
        elif kind == 5:
            out[at:at] = rng.integers(0, 256, size=some, dtype=np.uint8).tobytes()
        else:
            other = int(rng.integers(len(out)))
            out[at : at + some] = out[other : other + some]
    return bytes(out)


def cut(data: bytes, rng: Random) -> bytes:
    return data[: int(rng.integers(len(data)))]


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


# --- the description --------------------------------------------------------------------------------------------------

RAW = (  # texts that json.dumps would not write
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-0",
    "9" * 400,
    "9" * 5000,
    "1" + "0" * 4000,
    "0.1e-400",
    '"\\ud800"',
    '"\\u0000"',
    '"\\u001b[2J"',
    "[" * 300 + "]" * 300,
    "[" * 40_000,
    '{"a":' * 300 + "1" + "}" * 300,
    '{"type":"Sequential","layers":{"0":' * 9 + '{"type":"ReLU","args":{}}' + "}}" * 9,
    '{"type":"Identity","args":{},"type":"Linear"}',
    "[" + "[]," * 20_000 + "0]",
    "{" + ",".join(f'"{i}":0' for i in range(20_000)) + "}",
    "[1,]",
    "",
)
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, -(2**31), 2**40, 2**62, 2**63, 2**64, 10**30, 0.5, -0.5, 1e308, 5e-324,
    "", "a", ".", "..", "a.b", "__class__", "_parameters", "forward", "weight", "0", "ключ", "\N{GRINNING FACE}",
    "a\nb", "\u202e", "x" * 5000, [], [[]], {}, [0], [1, 2], ["a"], [None], {"a": 1}, {"same": "conv1"},
    {"type": "Linear", "args": {"in_features": 2**20, "out_features": 2**20, "bias": True}}, {"type": "Sequential"},
    {"type": "Half", "settings": {"bits": 1}, "tensors": {"b.factor": 0}}, {"shape": [2**40], "dtype": "float32"},
)  # fmt: skip


def tree_changed(manifest: bytes, rng: Random) -> bytes:
    """The description with some of its values, keys or subtrees replaced, removed, repeated, moved or nested."""
    data: Any = unpack_manifest(manifest)
    raw: list[str] = []
    for _ in range(int(rng.integers(1, 4))):
        places = list(_places(data))
        if not places:
            return deflated(b'{"names":["a","a"]}')
        at = int(rng.integers(len(places)))
        if rng.random() < 0.4:  # near the root, where the parts are
            at = int(rng.integers(min(len(places), 12)))
        _change(places, at, raw, rng)
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=bool(rng.integers(2)))
    for number, piece in enumerate(raw):
        text = text.replace(f'"@raw{number}@"', piece)
    return deflated(text.encode("utf-8", "surrogatepass"))


def _places(value: Any) -> Any:
    """Every (container, key) of a tree, outer ones first."""
    held = [value]
    for one in held:
        items = list(one.items()) if isinstance(one, dict) else list(enumerate(one))
        for key, inner in items:
            yield one, key
            if isinstance(inner, (dict, list)):
                held.append(inner)


def _change(places: list[Any], at: int, raw: list[str], rng: Random) -> None:
    owner, key = places[at]
    kind = int(rng.integers(9))
    if kind <= 1:
        owner[key] = json.loads(json.dumps(ODD[int(rng.integers(len(ODD)))]))
    elif kind == 2:
        owner[key] = f"@raw{len(raw)}@"
        raw.append(RAW[int(rng.integers(len(RAW)))])
    elif kind == 3:
        del owner[key]
    elif kind == 4:
        other, place = places[int(rng.integers(len(places)))]
        owner[key] = json.loads(json.dumps(other[place])) if _has(other, place) else None
    elif kind == 5 and isinstance(owner, dict):
        new = rng.choice(["a", "", "conv1", "names", "same", "type", "0", "__class__", "b.forward", "p.", "x" * 3000])
        owner[str(new)] = owner.pop(key)
    elif kind == 6:
        for _ in range(int(rng.integers(1, 30))):
            owner[key] = [owner[key]] if rng.integers(2) else {"a": owner[key]}
    elif kind == 7 and isinstance(owner, list):
        owner += owner[: int(rng.integers(1, 9))] * int(rng.choice([1, 1, 1, 300]))
    elif isinstance(owner[key], (int, float)):
        owner[key] = int(extreme(rng)) * int(rng.choice([-1, 1]))
    else:
        owner[key] = str(owner[key])[:50] + str(rng.choice(["", "x", ".0", "\N{COMBINING ACUTE ACCENT}"]))


def _has(owner: Any, key: Any) -> bool:
    return key in owner if isinstance(owner, dict) else key < len(owner)


def text_changed(manifest: bytes, rng: Random) -> bytes:
    return deflated(bytes_changed(json.dumps(unpack_manifest(manifest)).encode(), rng))


# --- whole records ----------------------------------------------------------------------------------------------------


def constant(size: int, rng: Random) -> bytes:
    """A stream that says one of `size` symbols as often as is asked for: Huffman, range or ANS code of no bytes."""
    at, coder = int(rng.integers(size)), int(rng.integers(1, 4))
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
        return "records repeated", records + records[at : at + 3] * int(rng.choice([1, 1, 200]))
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


def resigned(data: bytes, rng: Random) -> tuple[str, bytes]:
    """A mutation below the checksums, which are made right again."""
    manifest, some, bare = parts(data)
    records = list(some)
    what = "other header"
    if manifest and rng.random() < 0.45:
        change = (tree_changed, tree_changed, tree_changed, text_changed, bytes_changed)[int(rng.integers(5))]
        what, manifest = f"description: {change.__name__}", change(manifest, rng)
        if rng.random() < 0.1:
            also, records = records_changed(records, rng)
            what = f"{what}, {also}"
    elif rng.random() < 0.97:
        what, records = records_changed(records, rng)
    if what == "other header" or rng.random() < 0.02:
        bare = not bare
    return what, assemble(manifest, records, bare)


def mutated(data: bytes, rng: Random, *, sign: bool) -> tuple[str, bytes]:
    """What was done, and the bytes."""
    if sign:
        return resigned(data, rng)
    if rng.random() < 0.2:
        return "cut", cut(data, rng)
    return "bytes", bytes_changed(data, rng)
