"""Where every byte of a `.fw` file goes."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from featherweight.coding.bits import Wanted
from featherweight.coding.container import VERSION, read
from featherweight.coding.manifest import deflated, unpack_manifest
from featherweight.coding.unpacking import Packed

PARTS = frozenset(
    [
        "swaps",
        "edits",
        "kept",
        "activations",
        "names",
        "ties",
        "frozen",
        "wiring",
        "hidden",
        "tool",
        "provenance",
        "example_inputs",
    ]
)
LONGEST = 1 << 20  # bytes of JSON that are deflated part by part
COMPACT: dict[str, Any] = {"separators": (",", ":"), "ensure_ascii": False}


def inspect(path: str | Path, *, into: nn.Module | None = None, limit: int | None = None) -> dict[str, Any]:
    """What a file says and what each of its bytes is, JSON-able.

    Of a tensor, `bytes` is the sum of `code_bytes` (code words), `table_bytes` (heads and tables of the coder) and
    `side_bytes` (type, shape, scales, codebooks, signs of zeros); `entropy_bytes` is the order-0 entropy of its
    symbols; `ideal_bytes` is `code_bytes` at the ideal lengths that adaptive models give, None where there are none.
    `structure` has all other bytes: header, lengths, ties, checksums, and `description`, which `described` tells by
    its parts: each the bytes by which it made the deflated JSON longer. `bytes` is the size on disk, the sum of it all.

    Args:
        into: a model of the file's class, which tells the shapes that a compact file leaves out.

    Raises:
        FormatError: the file is truncated, corrupt, newer or not a .fw file.
    """
    contents = read(path, limit, into, Wanted(weigh=True))
    rows = [
        _row(name, record)
        for name, record in zip(contents.names, contents.records, strict=True)
        if isinstance(record, Packed)
    ]
    size, weights = Path(path).stat().st_size, sum(row["bytes"] for row in rows)
    return {
        "format": VERSION,
        "bare": contents.bare,
        "bytes": size,
        "weights_bytes": weights,
        "structure_bytes": size - weights,
        "manifest_bytes": len(contents.packed),
        "structure": {**contents.framing, "description": len(contents.packed)},
        "described": _by_part(contents.packed),
        "example_inputs": contents.manifest.get("example_inputs"),
        "manifest": contents.manifest,
        "tensors": rows,
    }


def _row(name: str, record: Packed) -> dict[str, Any]:
    row = record.row
    return {
        **asdict(row),
        "name": name,
        "shape": list(row.shape),
        "code_bytes": record.coded,
        "table_bytes": row.bytes - row.side_bytes - record.coded,
        "entropy_bytes": row.entropy_bytes,
        "ideal_bytes": record.coded - record.spare if record.spare else None,
    }


def _by_part(packed: bytes) -> dict[str, int]:
    """By how many bytes each part of a description made it longer, in the order in which they are written."""
    told = unpack_manifest(packed)
    known = [key for key in told if key in PARTS]
    texts = [json.dumps({k: told[k] for k in known[:some]}, **COMPACT).encode() for some in range(1, len(known) + 1)]
    if not texts or len(texts[-1]) > LONGEST:
        return {"description": len(packed)}
    whole = len(told) == len(known)
    sizes = [0, *(len(deflated(text)) for text in (texts[:-1] if whole else texts)), len(packed)]  # whoever wrote it
    names = known if whole else [*known, "other"]
    return {name: after - before for name, (before, after) in zip(names, pairwise(sizes), strict=True)}
