"""Bytes that are changed at random, towards what harms a reader: numbers at an edge, lengths, cuts."""

from __future__ import annotations

import zlib

import numpy as np

from featherweight.coding.bits import varint
from featherweight.coding.manifest import WORDS

Random = np.random.Generator


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


def deflated(text: bytes) -> bytes:
    """A description as a file holds it, whatever the text."""
    squeeze = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, WORDS)
    return squeeze.compress(text) + squeeze.flush()
