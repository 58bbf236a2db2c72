"""The `.fw` file: a model in as few bytes as its codes allow, bit-exact, safe to open. Specified in docs/format.md."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.coding import compact
from featherweight.coding.bits import ALL, Reader, Wanted, varint
from featherweight.coding.files import write_whole
from featherweight.coding.manifest import checked, pack_manifest, unpack_manifest
from featherweight.coding.packing import store
from featherweight.coding.records import FLOATS, Row
from featherweight.coding.restoring import Slot, fill, reshape, slots
from featherweight.coding.streams import MIXING, allowed
from featherweight.coding.threads import each
from featherweight.coding.unpacking import Packed, allowance, read_tensor
from featherweight.core.agree import answer, compared
from featherweight.core.blueprint import structure
from featherweight.core.forms import Codes, activation_forms, bake, codes_of, form_names
from featherweight.core.ledger import note
from featherweight.core.progress import track
from featherweight.core.task import as_call, device_of
from featherweight.core.wire_data import check_calls, hidden_tensors, wired_from, wiring_data
from featherweight.core.wired import Wired
from featherweight.core.wiring import wire
from featherweight.errors import BadData, BadOption, FeatherweightError, FormatError, shown

MAGIC = b"FW"
VERSION = 1
BARE = 0x80  # in the byte of the version: no names, no provenance, one checksum at the end
BARE_PARTS = ("swaps", "edits", "kept", "activations", "wiring")  # all that a bare file says of its model
BRIEF = 0.02  # seconds after which records are read in threads
TIE = 0x1F  # first byte of a record that repeats an earlier tensor of a bare file


@dataclass(frozen=True)
class SaveReport:
    """What a file takes on disk: `bytes` is its size, of which `weights_bytes` are tensors and the rest structure.

    `class_free` says whether `load` can restore it without the class that built the model, `why_not` why it cannot.
    """

    path: Path
    bytes: int
    weights_bytes: int
    structure_bytes: int
    tensors: tuple[Row, ...]
    class_free: bool = False
    why_not: str = ""


@dataclass(frozen=True)
class Contents:
    """A file as read: what it says of the model, and its records in order; a tie is the number of an earlier one.

    `framing` says how many bytes hold the parts together, by what they are.
    """

    bare: bool
    manifest: dict[str, Any]
    packed: bytes
    records: list[Packed | int]
    framing: dict[str, int]

    @property
    def names(self) -> list[str]:
        """A name for each record: that of the state dict, of a form's tensor, or its number in a bare file."""
        if self.bare:
            return [str(i) for i in range(len(self.records))]
        return [*self.manifest["names"], *form_tensor_names(self.manifest["activations"]), *self.manifest["hidden"]]


Entry = tuple[bytes, Row | None]  # a record and its account

# --- writing ----------------------------------------------------------------------------------------------------------


def save(
    model: nn.Module,
    path: str | Path,
    *,
    example_inputs: Any = None,
    coder: str | None = None,
    bare: bool = False,
    class_free: bool = True,
    provenance: dict[str, Any] | None = None,
) -> SaveReport:
    """Writes a model to a `.fw` file, whole or not at all. The model is not changed.

    Args:
        example_inputs: their shapes and types are written down, and the model is traced with them; a bare file
            needs none.
        coder: "huffman", "range_coder" ("range"), "rans" ("ans"), "sparse_index" (fixed widths), "deepcabac" ("cabac"),
            "context_mixing" ("cm"), "unlabeled_graph", "smallest" (all of these), "fast" (interleaved ANS);
            None for the shortest of the first four.
        bare: the smallest file that `load(into=)` can restore: no names, no provenance, one checksum. With context
            mixing it is compact: one code for all integers, no shapes.
        class_free: also write the model's graph as data, so that `load` needs no class. Where that cannot be done the
            report says why, and the file is written without.
        provenance: JSON-able facts, such as the chain, the seed, the metric and `weights_sha256` of the source.

    Raises:
        UnknownName: there is no such coder.
        BadData: a parameter is not finite, or of a type that the format has no number for.
        BadOption: the file cannot be written there, or the provenance is not JSON.
    """
    coders, path = allowed(coder), Path(path)
    plain = baked(model)
    hidden: dict[str, Tensor] = {}
    why_not = "a bare file"
    places = slots(plain)
    told, held = described(plain)
    if bare and MIXING in coders:
        return _save_compact(path, places, told, held, coders)
    own = told.get("wiring", {})  # of a network that has no class: whether or not the file opens by itself
    for place, module in plain.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            note(f"{place or 'the model'} keeps extra state that is no tensor: the file does not hold it")
    if not bare:
        hidden, why_not = _graph(told, plain, example_inputs) if class_free else ({}, "not asked for")
        told |= named(places)
        told["tool"] = f"featherweight {version('featherweight')}"
        told["provenance"], told["example_inputs"] = provenance, _shapes(example_inputs)
    stored, forms, unseen = list(_tensors(places, coders, bare)), list(_held(told, held, coders)), []
    data = b""
    if not why_not:
        unseen = list(_hidden(hidden, coders))
        data = _bytes(told, [*stored, *forms, *unseen], bare)
        why_not, holds = _read_back(data, plain, example_inputs)
        if not holds:
            note(f"the file needs the model's class to be loaded (into=): {why_not}")
            told, unseen, data = told | {"wiring": own, "hidden": []}, [], b""
    entries = [*stored, *forms, *unseen]
    data, rows = data or _bytes(told, entries, bare), tuple(row for _, row in entries if row is not None)
    write_whole(path, data)
    size, weights = path.stat().st_size, sum(row.bytes for row in rows)
    return SaveReport(path, size, weights, size - weights, rows, not why_not, why_not)


def _save_compact(
    path: Path, places: list[Slot], told: dict[str, Any], held: list[Tensor], coders: tuple[int, ...]
) -> SaveReport:
    """A bare file whose integers are one stream."""
    shaped = bool(told.get("edits") or told.get("wiring"))  # else the class, and what was swapped, tells all shapes
    tensors: list[compact.Place] = [*_places(places), *((tensor, None) for tensor in held)]
    written = compact.pack(
        pack_manifest({k: v for k, v in told.items() if v}), tensors, len(places), coders, shaped=shaped
    )
    write_whole(path, written.data)
    names = [*(place.name for place in places), *form_tensor_names(told.get("activations", {}))]
    rows = tuple(replace(row, name=n) for n, row in zip(names, written.rows, strict=True) if row is not None)
    size, weights = len(written.data), sum(row.bytes for row in rows)
    return SaveReport(path, size, weights, size - weights, rows, False, "a bare file")


def _places(places: list[Slot]) -> Iterator[compact.Place]:
    """The tensors of a model with their codes, or the number of an earlier one."""
    seen: dict[int, int] = {}
    for number, place in enumerate(track(places, "code", len(places))):
        earlier = seen.setdefault(id(place.tensor), number)
        if earlier == number:
            _refuse_unfinished(place)
        yield (place.tensor, codes_of(place.module, place.leaf)) if earlier == number else earlier


def _bytes(told: dict[str, Any], entries: list[Entry], bare: bool) -> bytes:
    return assemble(pack_manifest({k: v for k, v in told.items() if v}), [data for data, _ in entries], bare)


def _read_back(data: bytes, model: nn.Module, example_inputs: Any) -> tuple[str, bool]:
    """Opens what was written as `load` will, without the class: why that gives another network, or none.

    Also whether the graph is to stay in the file: it does where only the allowance of a reader is too small.
    """
    try:
        with reading("the file"):
            try:
                contents = parse(data, allowance(len(data)))
                why_not = ""
            except FormatError:
                contents = parse(data, 1 << 62)
                why_not = "its tensors take more than a reader allows for its length: it opens with load(path, limit=)"
            again = _without_class(contents)
        if example_inputs is None:  # a network without a class, whose graph was read back and is the one it has
            return why_not, True
        wrong = compared(answer(model, example_inputs), answer(again.to(device_of(model)), example_inputs))[1]
    except FeatherweightError as error:
        return str(error), False
    except Exception as error:  # an operator may raise anything
        return f"the network that the file describes does not run: {type(error).__name__}", False
    return (
        (f"the network that the file describes computes something else: {wrong}", False) if wrong else (why_not, True)
    )


def _tensors(places: list[Slot], coders: tuple[int, ...], bare: bool) -> Iterator[Entry]:
    """The records of a model's tensors with their accounts, each once; a bare file says where one repeats."""
    seen: dict[int, int] = {}
    for number, place in enumerate(track(places, "code", len(places))):
        earlier = seen.setdefault(id(place.tensor), number)
        if earlier == number:
            _refuse_unfinished(place)
            stored = store(place.tensor, codes_of(place.module, place.leaf), coders)
            yield stored.data, replace(stored.row, name=place.name)
        elif bare:
            yield bytes([TIE]) + varint(earlier), None


def _held(told: dict[str, Any], held: list[Tensor], coders: tuple[int, ...]) -> Iterator[Entry]:
    """The records of the tensors of forms on activations."""
    for name, tensor in zip(form_tensor_names(told.get("activations", {})), held, strict=True):
        stored = store(tensor, None, coders)
        yield stored.data, replace(stored.row, name=name)


def _hidden(hidden: dict[str, Tensor], coders: tuple[int, ...]) -> Iterator[Entry]:
    """The records of tensors that only the wiring knows: constants, and buffers that no state dict holds."""
    for name, tensor in hidden.items():
        stored = store(tensor, None, coders)
        yield stored.data, replace(stored.row, name=name)


def _graph(told: dict[str, Any], model: nn.Module, example_inputs: Any) -> tuple[dict[str, Tensor], str]:
    """Adds the model's graph to what a file says; the tensors that only the graph needs, and why there is none."""
    if example_inputs is None and not isinstance(model, Wired):
        return {}, "no example inputs to trace the model with"
    try:
        wired = wire(model, example_inputs)
        told["wiring"] = wiring_data(wired)
    except FeatherweightError as error:
        note(f"the file needs the model's class to be loaded (into=): {error}")
        return {}, str(error)
    hidden = hidden_tensors(wired)
    told["hidden"] = list(hidden)
    return hidden, ""


def named(places: list[Slot]) -> dict[str, Any]:
    """The names of a model's tensors: each under its first name, the others as ties, and which are frozen."""
    first: dict[int, str] = {}
    for place in places:
        first.setdefault(id(place.tensor), place.name)
    ties = {place.name: first[id(place.tensor)] for place in places if first[id(place.tensor)] != place.name}
    return {
        "names": list(first.values()),
        "ties": ties,
        "frozen": [p.name for p in places if isinstance(p.tensor, nn.Parameter) and _frozen(p.tensor)],
    }


def baked(model: nn.Module) -> nn.Module:
    """The model itself, or a baked copy if forms stand on its weights, or ranges of its activations are learned."""
    learned = any(form.settled() is not form for held in activation_forms(model).values() for form in held.values())
    if not learned and not any(form_names(module) for module in model.modules()):
        return model
    return bake(deepcopy(model))


def described(model: nn.Module) -> tuple[dict[str, Any], list[Tensor]]:
    """Swaps, edits and the forms on activations as JSON-able data, and the tensors of those forms."""
    held: list[Tensor] = []
    active: dict[str, dict[str, Any]] = {}
    for path, forms in activation_forms(model).items():
        for at, form in forms.items():
            settings, tensors = form.state()
            numbers = {key: len(held) + i for i, key in enumerate(tensors)}
            held += tensors.values()
            spec = {"type": type(form).__name__, "settings": settings, "tensors": numbers}
            active.setdefault(path, {})[at] = spec
    data = {**structure(model), "activations": active}
    return {key: value for key, value in data.items() if value}, held


def form_tensor_names(active: dict[str, Any]) -> list[str]:
    """A name for each tensor of the forms on activations: `path/place/key`."""
    found = {
        index: f"{path}/{at}/{key}"
        for path, forms in active.items()
        for at, form in forms.items()
        for key, index in form["tensors"].items()
    }
    return [found[index] for index in sorted(found)]


def _frozen(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and not parameter.requires_grad


def _refuse_unfinished(place: Slot) -> None:
    tensor = place.tensor
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    wide = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
    broken = not torch.isfinite(wide).all() if isinstance(tensor, nn.Parameter) else torch.isnan(wide).any()
    if broken:
        raise BadData(f"{place.name} has values that are NaN or infinite: train again, or restore a good checkpoint")


def _shapes(inputs: Any) -> dict[str, Any]:
    """Shapes and types of example inputs, JSON-able: {"args": [...], "kwargs": {...}}."""
    if inputs is None:
        return {}
    args, kwargs = as_call(inputs)
    return {"args": [_shape(a) for a in args], "kwargs": {str(k): _shape(v) for k, v in kwargs.items()}}


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, (tuple, list)):
        return [_shape(v) for v in value]
    return {"type": type(value).__name__}


def assemble(manifest: bytes, records: list[bytes], bare: bool) -> bytes:
    """The bytes of a file from its parts, with checksums."""
    head = MAGIC + bytes([VERSION | (BARE if bare else 0)]) + varint(len(manifest)) + manifest
    if bare:
        return signed(head + b"".join(records))
    return signed(head) + b"".join(signed(varint(len(record)) + record) for record in records)


def signed(data: bytes) -> bytes:
    """The data and their CRC-32, which protects against damage, not against malice."""
    return data + zlib.crc32(data).to_bytes(4, "little")


def bare_bytes(model: nn.Module) -> int:
    """What the smallest file of a model takes on disk: a bare one, with context mixing."""
    with tempfile.TemporaryDirectory() as folder:
        return save(model, Path(folder) / "weighed.fw", coder="context_mixing", bare=True).bytes


# --- reading ----------------------------------------------------------------------------------------------------------


def load(
    path: str | Path,
    into: nn.Module | None = None,
    *,
    limit: int | None = None,
    dtype: torch.dtype | None = None,
    codes: bool = True,
) -> nn.Module:
    """Restores a file: without the class that built the model, or into a fresh instance of it, in place.

    Layers that were swapped, channels that were removed, ties, codes and forms on activations come back too. Without
    `into` the network is a `Wired` in evaluation mode: ordinary layers at their old names, which trains and can be
    compressed further.

    Args:
        into: an instance of the class that was compressed, made with the same options.
        limit: bytes of tensors that the file may describe; 16 MiB, 256 times its size and four times the size of
            `into` unless said.
        dtype: the type to which all floats are brought, weight by weight while they are decoded; integers then are
            not kept, since the weights are not theirs any more.
        codes: whether to keep the integers behind the weights, which `export` and `pack` read.

    Raises:
        BadOption: `dtype` is no type of floats.
        FormatError: the file is truncated, corrupt, newer or not a .fw file, or holds no graph and `into` is missing.
        BadData: `into` is of another class or configuration than the model in the file.
    """
    if dtype not in (None, *FLOATS):
        raise BadOption(f"dtype={dtype}: pass float32, bfloat16, float16 or float64, or None for what the file says")
    contents = read(path, limit, into, Wanted(codes=codes and dtype is None, dtype=dtype))
    with reading(path):
        if into is None:
            return _without_class(contents)
        filled = fill(into, contents.manifest, contents.records, contents.bare)
        if isinstance(filled, Wired):
            check_calls(filled)
        return filled


def _own(into: nn.Module | None) -> int:
    """What a reader grants a file beyond its length: four times the model that it is loaded into."""
    return 0 if into is None else sum(4 * p.tensor.numel() * max(p.tensor.element_size(), 4) for p in slots(into))


def _without_class(contents: Contents) -> nn.Module:
    if not contents.manifest["wiring"]:
        why = "it is a bare file" if contents.bare else "it was written without the model's graph"
        raise FormatError(f"the file needs the model's class, since {why}: pass into=, a fresh model of that class")
    manifest, own = contents.manifest, contents.manifest["wiring"].get("own")
    tensors = {name: packed.tensor for name, packed in _records(contents).items()}
    wired = wired_from(manifest["wiring"], {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()})
    try:
        fill(wired, {**manifest, "swaps": {}, "edits": {}, "kept": [], "wiring": {}}, contents.records, False)
    except BadData as error:  # there is no class that could be another one
        raise FormatError(f"the file is corrupt: {str(error).partition(': pass')[0]}") from None
    for name in manifest["hidden"]:
        if own.get(name) != "n":
            raise FormatError(f"the file is corrupt: it hides a tensor {shown(name)}, which its network does not have")
        holder, _, leaf = name.rpartition(".")
        wired.get_submodule(holder)._buffers[leaf] = tensors[name].clone()
    for name, tensor in (*wired.named_parameters(), *wired.named_buffers()):
        if tensor.is_meta:
            raise FormatError(f"the file is corrupt: its network has a tensor {shown(name)}, which it does not hold")
    check_calls(wired)
    return wired.eval()


def unpack(path: str | Path, *, into: nn.Module | None = None, limit: int | None = None) -> dict[str, Tensor]:
    """The tensors of a file by name (by number, "0", "1", ..., if it is bare), bit-exact; ties appear under each name.

    Args:
        into: a model of the file's class, which tells the shapes that a compact file leaves out.

    Raises:
        FormatError: the file is truncated, corrupt, newer or not a .fw file.
    """
    return {name: record.tensor for name, record in _records(read(path, limit, into, Wanted(codes=False))).items()}


def unpack_codes(path: str | Path, *, into: nn.Module | None = None, limit: int | None = None) -> dict[str, Codes]:
    """The declared codes of a file by name (by number if it is bare).

    Args:
        into: a model of the file's class, which tells the shapes that a compact file leaves out.

    Raises:
        FormatError: the file is truncated, corrupt, newer or not a .fw file.
    """
    found = _records(read(path, limit, into, Wanted(weights=False)))
    return {name: record.codes for name, record in found.items() if record.codes is not None}


def _records(contents: Contents) -> dict[str, Packed]:
    found: dict[str, Packed] = {}
    by_number: list[Packed] = []
    for name, record in zip(contents.names, contents.records, strict=True):
        packed = by_number[record] if isinstance(record, int) else record
        by_number.append(packed)
        found[name] = packed
    return found | {name: found[owner] for name, owner in contents.manifest["ties"].items()}


def read(path: str | Path, limit: int | None = None, into: nn.Module | None = None, wanted: Wanted = ALL) -> Contents:
    """All of a file, checked.

    Args:
        into: the model that it is loaded into: four times its size may be described beyond what the length allows, and
            shapes that a compact file does not tell are its own. It is not changed.
        wanted: what to find in it.

    Raises:
        FormatError: the file is truncated, corrupt, newer or not a .fw file.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from None
    with reading(path):
        return parse(data, allowance(len(data)) + _own(into) if limit is None else limit, into, wanted)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns whatever a damaged or hostile file can cause into one sentence that names it."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    except FeatherweightError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RecursionError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise FormatError(f"{path}: the file is corrupt: what it describes fits no model") from error


def parse(data: bytes, limit: int, into: nn.Module | None = None, wanted: Wanted = ALL) -> Contents:
    """The parts of a file.

    Raises:
        FormatError: the bytes are none that a writer makes.
    """
    if compact.is_compact(data):
        return _parse_compact(data, limit, into, wanted)
    if data[:2] != MAGIC:
        raise FormatError("this is not a .fw file: pass one that fw.save wrote")
    if len(data) < 8:
        raise FormatError("the file is truncated")
    version_of = data[2] & ~BARE
    if version_of != VERSION:
        raise FormatError(
            f"the file is of version {version_of}, this program reads version {VERSION}: update featherweight"
        )
    bare = bool(data[2] & BARE)
    reader = Reader(_checked(data) if bare else data, limit, wanted)
    reader.take(3)
    packed = reader.take(reader.varint())
    head = reader.position - len(packed)
    if not bare:
        _check(reader, 0)
    start = reader.position
    told = unpack_manifest(packed)
    manifest = checked({key: value for key, value in told.items() if key in BARE_PARTS} if bare else told)
    records = _bare_records(reader) if bare else _blocks(reader)
    forms = len(form_tensor_names(manifest["activations"]))
    told_of = len(manifest["names"]) + forms + len(manifest["hidden"])
    if len(records) < forms or (not bare and len(records) != told_of):
        raise FormatError(f"the file is truncated or corrupt: it describes {told_of} tensors and has {len(records)}")
    weights = sum(record.row.bytes for record in records if isinstance(record, Packed))  # 0 unless `weigh`
    between = len(reader.data) - start - weights
    checksums = 4 if bare else 4 * (1 + len(records))
    lengths = {"ties": between} if bare else {"lengths": between - 4 * len(records)}
    return Contents(bare, manifest, packed, records, {"header": head, "checksums": checksums, **lengths})


def _parse_compact(data: bytes, limit: int, into: nn.Module | None, wanted: Wanted) -> Contents:
    parts = compact.cut(data)
    if into is None:
        raise FormatError(
            "this is not a .fw file, or a bare one whose shapes only its class knows: "
            "pass into=, a fresh model of that class"
        )
    manifest = checked({key: value for key, value in unpack_manifest(parts.described).items() if key in BARE_PARTS})
    forms: list[compact.Shape | None] = [None] * len(form_tensor_names(manifest["activations"]))
    shapes = [None if parts.shaped else shape for shape in shapes_of(into, manifest)]
    records = compact.records(parts, [*shapes, *forms], limit, wanted)
    taken = sum(record.row.bytes for record in records if isinstance(record, Packed)) + len(parts.described)
    framing = {"header": 1, "checksums": len(parts.sum)}
    framing["lengths"] = len(data) - taken - sum(framing.values())
    return Contents(True, manifest, parts.described, records, framing)


def shapes_of(model: nn.Module, manifest: dict[str, Any]) -> list[tuple[int, ...]]:
    """The shapes that a model will have once it is as a file describes it; found on a copy without memory."""
    if manifest["swaps"] or manifest["edits"] or manifest["kept"] or manifest["wiring"]:
        tensors = (*model.parameters(), *model.buffers())
        model = deepcopy(model, {id(t): _without_memory(t) for t in tensors})
        reshape(model, manifest)
    return [tuple(place.tensor.shape) for place in slots(model)]


def _without_memory(tensor: Tensor) -> Tensor:
    meta = tensor.detach().to("meta")
    return nn.Parameter(meta, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


def _checked(data: bytes) -> bytes:
    if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise FormatError("the file is truncated or corrupt: its checksum does not match")
    return data[:-4]


def _check(reader: Reader, start: int) -> None:
    """Checks the sum that follows what was read since `start`."""
    body = reader.data[start : reader.position]
    if int.from_bytes(reader.take(4), "little") != zlib.crc32(body):
        raise FormatError("the file is truncated or corrupt: a checksum does not match")


def _blocks(reader: Reader) -> list[Packed | int]:
    """The records of a full file; in threads, once they have taken long enough for that to pay."""
    bodies: list[memoryview] = []
    while reader.left:
        start = reader.position
        body = reader.view(reader.varint())
        _check(reader, start)
        bodies.append(body)
    begun, records = perf_counter(), list[Packed | int]()
    while len(records) < len(bodies) and perf_counter() - begun < BRIEF:
        records.append(_block(bodies[len(records)], reader))
    return records + each(lambda body: _block(body, reader), bodies[len(records) :])


def _block(body: memoryview, reader: Reader) -> Packed | int:
    inner = Reader(body, reader.allowance, reader.wanted)
    packed = read_tensor(inner)
    if inner.left:
        raise FormatError(f"the file is corrupt: {inner.left} bytes follow a tensor inside its block")
    return packed


def _bare_records(reader: Reader) -> list[Packed | int]:
    records: list[Packed | int] = []
    while reader.left:
        if reader.data[reader.position] == TIE:
            reader.byte()
            number = reader.varint()
            if number >= len(records) or isinstance(records[number], int):
                raise FormatError(f"the file is corrupt: a tensor repeats number {number}, which is none before it")
            records.append(number)
        else:
            records.append(read_tensor(reader))
    return records
