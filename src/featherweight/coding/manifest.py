"""The structured part of a file: JSON, deflated with a dictionary of its usual words, read back within bounds."""

from __future__ import annotations

import json
import re
import zlib
from math import isfinite, prod
from typing import Any

from featherweight.coding.records import DTYPES
from featherweight.errors import BadOption, FormatError, shown

FREE, PER_BYTE, LARGEST = 1 << 20, 64, 16 << 20  # JSON may have 1 MiB and 64 bytes a deflated byte, at most 16 MiB
NODES = 1 << 18  # values of all kinds that it may have: each takes about a hundred bytes while it is looked at
DEPTH = 64  # values that may stand inside one another
BEYOND = 1 << 63
LONGEST = 512  # characters of a name
INPUTS = 1 << 28  # elements of an example input, which a command may make
TYPES = frozenset(str(dtype).removeprefix("torch.") for dtype in DTYPES)
# Part of the format: bytes that deflate may refer back to before the first byte. Version 1 never changes it.
WORDS = (
    b'{"tool":"featherweight 0.1.0","provenance":{"featherweight":"0.1.0","source":{"sha256":"0123456789abcdef",'
    b'"model":"prune_ratio":"sparsity":"weight_bits":8,"act_bits":8}],"chain":[["seed":0,"metric":{"name":"accuracy",'
    b'"valid":0.9}},"example_inputs":{"args":[{"shape":[1,3,224,224],"dtype":"float32"}],"kwargs":{}},"frozen":["ties":{'
    b'"names":["layer1.0.downsample.0.weight","layers.blocks.1.conv1.weight","fc1.bias","fc1.weight","features.0.bias",'
    b'"bn1.bias","bn1.num_batches_tracked","bn1.running_mean","bn1.running_var","bn1.weight"],"activations":{"conv1":{'
    b'"input":{"type":"","settings":{"bits":8,"low":0,"high":255},"tensors":{"b.scale":0,"b.zero_point":1}}},"output":{'
    b'"edits":{"features.1":{"num_features":16,"out_features":"normalized_shape":[},"conv2":{"in_channels":16,'
    b'"out_channels":16},"swaps":{"bn1":{"type":"Identity","args":{}},"fc1":{"type":"Sequential","layers":{"0":{"type":'
    b'"Linear","args":{"in_features":512,"out_features":64,"bias":false}},"1":{"type":"Conv2d","args":{"in_channels":16,'
    b'"out_channels":32,"kernel_size":[3,3],"stride":[1,1],"padding":[0,0],"dilation":[1,1],"groups":1,"bias":true,'
    b'"padding_mode":"zeros"}}}}}}'
)


def pack_manifest(data: dict[str, Any]) -> bytes:
    """Raw deflate of compact JSON; nothing for an empty dict.

    Raises:
        BadOption: something in it is not JSON, or more than a reader accepts.
    """
    if not data:
        return b""
    try:
        text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
        plain = text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BadOption(f"what a file says about its model must be JSON (numbers finite): {error}") from None
    packed = deflated(plain)
    if len(plain) > largest(len(packed)) or _values(plain) > NODES:
        raise BadOption(f"{len(plain)} bytes about a model are more than a file may hold: shorten provenance=")
    try:
        bounded(json.loads(text))
    except FormatError as error:
        raise BadOption(f"what a file says about its model cannot be read back: {error}") from None
    return packed


def deflated(plain: bytes) -> bytes:
    """Raw deflate with the words of the format before the first byte."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, WORDS)
    return squeeze.compress(plain) + squeeze.flush()


def largest(length: int) -> int:
    """The bytes of JSON that so many deflated bytes may hold."""
    return min(LARGEST, FREE + PER_BYTE * length)


def unpack_manifest(data: bytes) -> dict[str, Any]:
    """The dict that `pack_manifest` wrote.

    Raises:
        FormatError: the bytes are no deflated JSON object, or a larger or deeper one than a file may hold.
    """
    if not data:
        return {}
    expand = zlib.decompressobj(-15, WORDS)
    try:
        text = expand.decompress(data, largest(len(data)))
    except zlib.error:
        raise FormatError("the description of the model is corrupt: it cannot be inflated") from None
    if expand.unconsumed_tail:
        raise FormatError("the description of the model is corrupt: it is far larger than its deflated length")
    if not expand.eof or expand.unused_data:
        raise FormatError("the description of the model is corrupt: its deflated bytes end too early or too late")
    if _values(text) > NODES:
        raise FormatError(f"the description of the model is corrupt: it has more than {NODES} values")
    try:
        found = json.loads(text.decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise FormatError("the description of the model is corrupt: it is no JSON, or nested too deeply") from None
    if not isinstance(found, dict):
        raise FormatError("the description of the model is corrupt: it is no JSON object")
    bounded(found)
    return found


def _values(text: bytes) -> int:
    """At least the number of values that JSON holds, found before any of them takes memory."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise FormatError("the description of the model is corrupt: a key occurs twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise FormatError(f"the description of the model is corrupt: it holds the number {name}")


def bounded(data: dict[str, Any]) -> None:
    """Checks that nothing is deeper than `DEPTH`, longer than `LONGEST`, or a whole number beyond 63 bits.

    Texts are names, and are shown to people: all but those of the provenance are printable.

    Raises:
        FormatError: something is.
    """
    free = [value for key, value in data.items() if key in ("tool", "provenance")]
    level = [(value, True) for key, value in data.items() if key not in ("tool", "provenance")]
    level += [*((value, False) for value in free), *((key, True) for key in data)]
    depth = 0
    while level:
        depth += 1
        if depth > DEPTH:
            raise FormatError(f"the description of the model is corrupt: it is nested more than {DEPTH} deep")
        inner: list[tuple[Any, bool]] = []
        for value, strict in level:
            kind = type(value)  # JSON gives no others
            if kind is str:
                if (strict and not (len(value) <= LONGEST and value.isprintable())) or _broken(value):
                    raise FormatError(f"the description of the model is corrupt: {shown(value)} is no name")
            elif kind is int:
                if not -BEYOND < value < BEYOND:
                    raise FormatError("the description of the model is corrupt: it holds a number beyond 63 bits")
            elif kind is list:
                inner += [(one, strict) for one in value]
            elif kind is dict:
                inner += [(one, strict) for pair in value.items() for one in pair]
            elif kind is float and not isfinite(value):
                raise FormatError("the description of the model is corrupt: it holds a number that is not finite")
        level = inner


def _broken(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which no output can show."""
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


def checked(data: dict[str, Any]) -> dict[str, Any]:
    """The manifest with every part present and of the right type, so that what follows need not ask.

    Raises:
        FormatError: a part is of another type, or refers to what is not there.
    """
    empty: dict[str, Any] = {
        "swaps": {},
        "edits": {},
        "activations": {},
        "names": [],
        "ties": {},
        "frozen": [],
        "hidden": [],
        "kept": [],
        "wiring": {},
    }
    full = empty | data
    _texts(full["names"], "names")
    known = set(full["names"])
    _need(len(known) == len(full["names"]), "names", "a name occurs twice")
    _need(_named(full["ties"], str), "ties", "they are no object of names")
    for name, owner in full["ties"].items():
        _need(owner in known, "ties", f"{shown(name)} is tied to {shown(owner)}, which is none of its names")
        _need(name not in known, "ties", f"{shown(name)} is tied and has a record of its own")
    _texts(full["frozen"], "frozen")
    _need(set(full["frozen"]) <= known | full["ties"].keys(), "frozen", "a name is none of its names")
    _texts(full["hidden"], "hidden")
    _texts(full["kept"], "kept")
    taken = known | full["ties"].keys()
    _need(taken.isdisjoint(full["hidden"]), "hidden", "a name has a record of its own already")
    _need(len(set(full["hidden"])) == len(full["hidden"]), "hidden", "a name occurs twice")
    _need(isinstance(full["wiring"], dict), "wiring", "it is no object")
    _need(_named(full["swaps"], dict), "swaps", "they are no object of layers")
    _check_edits(full["edits"])
    _check_forms(full["activations"])
    if full.get("example_inputs"):
        _check_inputs(full["example_inputs"])
    return full


def _check_edits(edits: Any) -> None:
    _need(_named(edits, dict), "edits", "they are no object of layers")
    for path, edit in edits.items():
        for key, value in edit.items():
            _need(_plain_path(key), "edits", f"{shown(key)} of {shown(path)} is no name of a public attribute")
            _need(_numbers(value), "edits", f"{shown(key)} of {shown(path)} is to be no integer or list of integers")


def _check_forms(active: Any) -> None:
    _need(_named(active, dict), "activations", "they are no object of layers")
    used: set[int] = set()
    for path, forms in active.items():
        for at, form in forms.items():
            _need(isinstance(form, dict) and _form(form), "activations", f"{shown(at)} of {shown(path)} is no form")
            used |= set(form["tensors"].values())
    _need(used == set(range(len(used))), "activations", "their tensors are not numbered from 0 without a gap")


def _check_inputs(inputs: Any) -> None:
    fits = isinstance(inputs, dict) and inputs.keys() == {"args", "kwargs"} and isinstance(inputs["args"], list)
    _need(fits and isinstance(inputs["kwargs"], dict), "example_inputs", "they are no object of args and kwargs")
    total = sum(_elements(given) for given in (*inputs["args"], *inputs["kwargs"].values()))
    _need(total <= INPUTS, "example_inputs", f"they have {total} elements, more than {INPUTS}")


def _elements(given: Any) -> int:
    if isinstance(given, list):
        return sum(_elements(inner) for inner in given)
    _need(isinstance(given, dict), "example_inputs", f"{shown(given)} is no input")
    if "type" in given:
        return 0
    shape, dtype = given.get("shape"), given.get("dtype")
    sizes = isinstance(shape, list) and len(shape) <= 32 and all(_size(size) for size in shape)
    _need(sizes, "example_inputs", f"{shown(shape)} is no shape")
    _need(isinstance(dtype, str) and dtype in TYPES, "example_inputs", f"{shown(dtype)} is no type of a tensor")
    return prod(shape)


def _size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40


def _texts(value: Any, part: str) -> None:
    _need(isinstance(value, list) and all(isinstance(text, str) for text in value), part, "they are no list of names")


def _need(holds: bool, part: str, why: str) -> None:
    if not holds:
        raise FormatError(f"the description of the model is corrupt: {part}: {why}")


def _named(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(v, kind) for v in value.values())


def _plain_path(key: str) -> bool:
    """Whether every step of an attribute's path is a public name, so that no file reaches into classes."""
    return re.fullmatch(r"(?:[A-Za-z]\w*)(?:\.[A-Za-z]\w*)*", key) is not None


def _numbers(value: Any) -> bool:
    """Whether a value is an integer, or a list of such; true and false are none."""
    if isinstance(value, list):
        return all(_numbers(v) for v in value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 62


def _form(form: dict[str, Any]) -> bool:
    return (
        isinstance(form.get("type"), str)
        and isinstance(form.get("settings"), dict)
        and _named(form.get("tensors"), int)
        and all(key[:2] in ("p.", "b.") and key[2:].isidentifier() for key in form["tensors"])
        and not any(isinstance(index, bool) or index < 0 for index in form["tensors"].values())
    )
