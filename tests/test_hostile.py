"""A .fw file from a stranger: damaged or made with malice, its checksums right or wrong, it cannot do harm."""

from __future__ import annotations

import json
import resource
import time
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.coding import load, save, unpack, unpack_tensor
from featherweight.coding.bits import Reader, varint
from featherweight.coding.container import assemble
from featherweight.coding.manifest import WORDS, pack_manifest, unpack_manifest
from featherweight.errors import FeatherweightError, FormatError
from test_coding import GOLDEN, Net, compressed, golden_model

SECONDS = 10.0  # the longest that any file of this size may take on a busy machine
MEMORY = 700 << 20  # bytes by which the process may grow over all of them
Parts = tuple[bytes, list[bytes], bool]


def parts(data: bytes) -> Parts:
    """The deflated manifest and the records of a file (all records of a bare file as one)."""
    bare = bool(data[2] & 0x80)
    source = Reader(data[:-4] if bare else data, 0)
    source.take(3)
    manifest = source.take(source.varint())
    if bare:
        return manifest, [source.take(source.left)], True
    records = []
    source.take(4)
    while source.left:
        records.append(source.take(source.varint()))
        source.take(4)
    return manifest, records, False


@cache
def files() -> dict[str, tuple[bytes, Callable[[], nn.Module]]]:
    """Honest files, each with the fresh model that it fits."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.fw"
        found: dict[str, tuple[bytes, Callable[[], nn.Module]]] = {}
        for coder in ("huffman", "range", "ans", "sparse_index"):
            for bare in (False, True):
                save(compressed(), path, bare=bare, coder=coder)
                found[f"{coder} {bare}"] = path.read_bytes(), Net
    for golden in sorted(GOLDEN.glob("*.fw")):
        found[golden.stem] = golden.read_bytes(), golden_model
    return found


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with a few changed, removed, doubled, swapped, or set to what a length looks like."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        if not out:
            return bytes(rng.integers(0, 256, size=3, dtype=np.uint8))
        at = int(rng.integers(min(len(out), 12) if rng.random() < 0.4 else len(out)))
        kind = int(rng.integers(6))
        if kind == 0:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[at] = int(rng.choice([0, 1, 0x0F, 0x7F, 0x80, 0xFF]))
        elif kind == 2:
            del out[at : at + int(rng.integers(1, 9))]
        elif kind == 3:
            out[at:at] = out[at : at + int(rng.integers(1, 9))]
        elif kind == 4:
            out[at : at + 1] = varint(int(rng.integers(0, 1 << int(rng.integers(1, 62)))))
        else:
            out[at:at] = rng.integers(0, 256, size=int(rng.integers(1, 9)), dtype=np.uint8).tobytes()
    return bytes(out)


def resigned(data: bytes, rng: np.random.Generator) -> bytes:
    """A mutation below the checksums, which are made right again."""
    manifest, records, bare = parts(data)
    if manifest and rng.random() < 0.3:
        if rng.random() < 0.7:
            text = json.dumps(unpack_manifest(manifest)).encode()
            squeeze = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, WORDS)
            manifest = squeeze.compress(mutated(text, rng)) + squeeze.flush()
        else:
            manifest = mutated(manifest, rng)
    else:
        which = int(rng.integers(len(records)))
        records[which] = mutated(records[which], rng)
    return assemble(manifest, records, bare)


def survives(path: Path, data: bytes, fresh: Callable[[], nn.Module]) -> bool:
    """Opens a file in every way; whether it loaded. Anything but a model or an error of ours fails the test."""
    path.write_bytes(data)
    start = time.monotonic()
    refused = []
    for use in (unpack, lambda p: load(p, into=fresh())):
        try:
            use(path)
        except FeatherweightError as error:
            refused.append(str(error))
    assert all(sentence and "\n" not in sentence for sentence in refused)
    assert time.monotonic() - start < SECONDS
    return not refused


@pytest.mark.parametrize("resign", [False, True])
@pytest.mark.parametrize("name", sorted(files()))
def test_mutated_files_give_a_model_or_one_sentence(name: str, resign: bool, tmp_path: Path) -> None:
    data, fresh = files()[name]
    assert survives(tmp_path / "a.fw", data, fresh)
    rng = np.random.default_rng(sum(name.encode()) + resign)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    loaded = sum(
        survives(tmp_path / "a.fw", (resigned if resign else mutated)(data, rng), fresh)
        for _ in range(160 if resign else 40)
    )
    assert resign or loaded <= 2  # checksums find what no one hides (a doubled byte may change nothing)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MEMORY


@pytest.mark.parametrize("name", ["full", "bare"])
def test_a_truncated_file_is_refused_wherever_it_ends(name: str, tmp_path: Path) -> None:
    data, fresh = files()[name]
    for end in [*range(12), *range(12, len(data), 23), len(data) - 1]:
        (tmp_path / "a.fw").write_bytes(data[:end])
        with pytest.raises(FeatherweightError):
            load(tmp_path / "a.fw", into=fresh())


# --- what is declared and what is there -------------------------------------------------------------------------------

F32 = 0


def head(*shape: int, kind: int = F32) -> bytes:
    return bytes([kind | len(shape) << 5]) + b"".join(varint(size) for size in shape)


BOMBS = {
    "zeros": head(1 << 39) + b"\xf0",
    "raw": head(1 << 20, 1 << 30) + b"\x00",
    "product of sizes beyond 64 bits": head(*[1 << 39] * 6) + b"\xf0",
    "one value a billion times": head(1 << 30) + b"\x02" + head(1) + b"\x00" + b"\0\0\x80\x3f" + b"\x00",
    "fixed width": head(1 << 20) + b"\x02" + head(3) + b"\xf0" + b"\x00" + b"\0" * 100,
    "a table larger than its tensor": head(2) + b"\x02" + head(1 << 30) + b"\xf0",
    "an alphabet of 2**32": head(4) + b"\x03\x80" + varint(0) + varint(1 << 32) + (head() + b"\xf0") * 2 + b"\x04",
    "an alphabet of 2**60": head(4) + b"\x03\x80" + varint(0) + varint(1 << 60) + (head() + b"\xf0") * 2 + b"\x04",
    "more entries than elements": head(4) + b"\x02" + head(2) + b"\xf0" + b"\x11\x00" + varint(1 << 40) + b"\0\0",
    "gaps that add up to less than nothing": head(4)
    + b"\x02"
    + head(2)
    + b"\xf0"
    + bytes([1 | 63 << 2, 0, 2, 0])
    + b"\xff" * 20,
    "a gap beyond the end": head(4) + b"\x02" + head(2) + b"\xf0" + bytes([1 | 30 << 2, 0, 1, 0]) + b"\xff" * 8,
    "lengths that are no prefix code": head(9) + b"\x02" + head(3) + b"\xf0" + b"\x04\x00\xff\x01\xff",
    "frequencies that are all zero": head(9) + b"\x02" + head(3) + b"\xf0" + b"\x08\x00\xff\x01\xff",
    "a range code of nothing": head(9) + b"\x02" + head(2) + b"\xf0" + b"\x08\x0f" + b"\0" * 8,
    "an unknown type": bytes([0x1E, 0]),
    "an unknown layout": head(3) + b"\x07",
    "33 dimensions": bytes([7 << 5, 33]) + b"\x01" * 33 + b"\xf0",
    "an integer of 70 bits": bytes([1 << 5]) + b"\xff" * 10,
    "tables in tables": (head(1) + b"\x02") * 2000,
    "codebooks that do not fit": head(4, 4) + b"\x04" + head(2, 2, 3) + b"\xf0" + b"\0\0",
    "an axis that is not there": head(4) + b"\x03\x85" + b"\0\x02" + (head() + b"\xf0") * 2 + b"\0\0",
    "integers beyond their type": head(4) + b"\x03\x00" + varint(600) + b"\x02" + (head() + b"\xf0") * 2 + b"\0\0",
    "planes of a complex number": head(4, kind=14) + b"\x01" + b"\0" * 100,
    "nothing": b"",
}


@pytest.mark.parametrize("name", BOMBS)
def test_declared_sizes_are_checked_before_anything_is_allocated(name: str) -> None:
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError):
        unpack_tensor(BOMBS[name])
    assert time.monotonic() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def test_a_large_honest_file_says_how_to_raise_the_limit(tmp_path: Path) -> None:
    model = nn.Linear(2100, 2100, bias=False)
    model.weight.data.zero_()
    save(model, tmp_path / "a.fw")
    with pytest.raises(FormatError, match="limit="):
        unpack(tmp_path / "a.fw")
    assert unpack(tmp_path / "a.fw", limit=1 << 26)["weight"].shape == (2100, 2100)
    fresh = load(tmp_path / "a.fw", into=nn.Linear(2100, 2100, bias=False))
    assert not fresh.weight.any()


# --- the description of the model -------------------------------------------------------------------------------------


def with_manifest(change: Callable[[dict], None]) -> bytes:
    manifest, records, bare = parts(files()["huffman False"][0])
    data = unpack_manifest(manifest)
    change(data)
    return assemble(pack_manifest(data), records, bare)


def linear(**args: object) -> dict:
    return {"type": "Linear", "args": {"in_features": 8, "out_features": 4, "bias": True, **args}}


def nested(depth: int) -> dict:
    return linear() if depth == 0 else {"type": "Sequential", "layers": {"0": nested(depth - 1)}}


SWAPS = {
    "a huge layer": linear(in_features=1 << 50),
    "a layer of a terabyte": linear(in_features=1 << 19, out_features=1 << 19),
    "a negative layer": linear(in_features=-1),
    "a layer of text": linear(in_features="8"),
    "an unknown argument": linear(device="cuda"),
    "an unknown type": {"type": "os.system", "args": {"command": "true"}},
    "a type that is no text": {"type": ["Linear"], "args": {}},
    "no arguments": {"type": "Linear"},
    "deep nesting": nested(9),
    "a dotted name": {"type": "Sequential", "layers": {"a.b": linear()}},
    "groups of zero": {"type": "Conv2d", "args": {"in_channels": 1, "out_channels": 1, "kernel_size": 1, "groups": 0}},
}


@pytest.mark.parametrize("name", SWAPS)
def test_layers_that_a_file_may_not_build_are_refused(name: str, tmp_path: Path) -> None:
    data = with_manifest(lambda m: m["swaps"].update(head=SWAPS[name]))
    assert not survives(tmp_path / "a.fw", data, Net)


EDITS = {
    "a private attribute": {"": {"_fw_codes": 1}},
    "a class": {"conv1": {"__class__": 1}},
    "an attribute of a class": {"conv1": {"__class__.call_super_init": 1}},
    "an inner private attribute": {"conv1": {"weight._version": 1}},
    "text": {"conv1": {"out_channels": "6"}},
    "an object": {"conv1": {"out_channels": {"a": 1}}},
    "an absent attribute": {"conv1": {"absent": 1}},
    "an absent layer": {"conv9": {"out_channels": 1}},
    "a huge number": {"conv1": {"out_channels": 1 << 80}},
    "a method": {"conv1": {"forward": 1}},
}


@pytest.mark.parametrize("name", EDITS)
def test_attributes_that_a_file_may_not_change_are_refused(name: str, tmp_path: Path) -> None:
    data = with_manifest(lambda m: m.update(edits=EDITS[name]))
    assert not survives(tmp_path / "a.fw", data, Net)
    assert nn.Module.call_super_init is False


FORMS = {
    "an unknown form": {"head": {"input": {"type": "Popen", "settings": {}, "tensors": {}}}},
    "an unknown place": {"head": {"inside": {"type": "Half", "settings": {"bits": 1}, "tensors": {}}}},
    "an absent layer": {"tail": {"input": {"type": "Half", "settings": {"bits": 1}, "tensors": {}}}},
    "an absent tensor": {"head": {"input": {"type": "Half", "settings": {"bits": 1}, "tensors": {"b.factor": 99}}}},
    "a negative tensor": {"head": {"input": {"type": "Half", "settings": {"bits": 1}, "tensors": {"b.factor": -1}}}},
    "no settings": {"head": {"input": {"type": "Half", "settings": {}, "tensors": {}}}},
    "a name that is a method": {
        "head": {"input": {"type": "Half", "settings": {"bits": 1}, "tensors": {"b.forward": 0}}}
    },
    "no form": {"head": {"input": 3}},
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_a_file_may_not_attach_are_refused(name: str, tmp_path: Path) -> None:
    data = with_manifest(lambda m: m.update(activations=FORMS[name]))
    assert not survives(tmp_path / "a.fw", data, Net)


NAMED = {
    "a name twice": lambda m: m["names"].append(m["names"][0]),
    "a name too many": lambda m: m["names"].append("absent"),
    "a name too few": lambda m: m["names"].pop(),
    "names that are numbers": lambda m: m.update(names=[1, 2]),
    "a tie to nothing": lambda m: m.update(ties={"conv1.weight": "absent"}),
    "a tie to another shape": lambda m: (m["names"].remove("bn.bias"), m.update(ties={"bn.bias": "head.weight"})),
    "frozen is no list": lambda m: m.update(frozen=3),
}


@pytest.mark.parametrize("name", NAMED)
def test_names_that_do_not_fit_the_records_are_refused(name: str, tmp_path: Path) -> None:
    assert not survives(tmp_path / "a.fw", with_manifest(NAMED[name]), Net)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"a":' * 50_000, b"[]", b"{", b"\xff", b'{"names":' + b"9" * 5000 + b"}"]
)
def test_a_description_that_is_no_object_is_refused(text: bytes, tmp_path: Path) -> None:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, WORDS)
    manifest = squeeze.compress(text) + squeeze.flush()
    assert not survives(tmp_path / "a.fw", assemble(manifest, [], False), Net)


def test_a_description_that_inflates_beyond_bounds_is_refused(tmp_path: Path) -> None:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, WORDS)
    manifest = b"".join(squeeze.compress(b" " * (1 << 22)) for _ in range(40)) + squeeze.flush()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not survives(tmp_path / "a.fw", assemble(manifest, [], False), Net)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


# --- what is not a .fw file -------------------------------------------------------------------------------------------


def test_other_files_are_refused_by_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.fw"
    for content, sentence in (
        (b"", "not a .fw file"),
        (b"PK\x03\x04 an archive", "not a .fw file"),
        (b"FW\x01", "truncated"),
        (b"FW\x02" + bytes(40), "version 2"),
    ):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=sentence):
            unpack(path)
    with pytest.raises(FormatError, match="cannot be read"):
        unpack(tmp_path / "absent.fw")
    with pytest.raises(FormatError, match="cannot be read"):
        load(tmp_path, into=Net())


def test_a_tie_of_a_bare_file_points_backwards(tmp_path: Path) -> None:
    record = head(2) + b"\xf0"
    for tie in (varint(0), varint(1), varint(2), varint(1 << 40)):
        (tmp_path / "a.fw").write_bytes(assemble(b"", [record, b"\x1f" + tie, b"\x1f\x01"], True))
        with pytest.raises(FormatError, match="repeats"):
            unpack(tmp_path / "a.fw")
    (tmp_path / "a.fw").write_bytes(assemble(b"", [record, b"\x1f\x00"], True))
    assert [t.shape for t in unpack(tmp_path / "a.fw").values()] == [torch.Size([2])] * 2
