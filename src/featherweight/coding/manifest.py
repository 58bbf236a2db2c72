"""The structured part of a file: JSON, deflated with a dictionary of its usual words, read back within bounds."""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

from featherweight.errors import BadOption, FormatError

FREE, PER_BYTE, LARGEST = 1 << 20, 64, 16 << 20  # JSON may have 1 MiB and 64 bytes a deflated byte, at most 16 MiB
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
        BadOption: something in it is not JSON.
    """
    if not data:
        return b""
    try:
        text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise BadOption(f"what a file says about its model must be JSON (numbers finite): {error}") from None
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, WORDS)
    packed = squeeze.compress(text.encode()) + squeeze.flush()
    if len(text.encode()) > largest(len(packed)):
        raise BadOption(f"{len(text.encode())} bytes about a model are more than a file may hold: shorten provenance=")
    return packed


def largest(length: int) -> int:
    """The bytes of JSON that so many deflated bytes may hold."""
    return min(LARGEST, FREE + PER_BYTE * length)


def unpack_manifest(data: bytes) -> dict[str, Any]:
    """The dict that `pack_manifest` wrote.

    Raises:
        FormatError: the bytes are no deflated JSON object, or a larger one than `largest` allows.
    """
    if not data:
        return {}
    try:
        expand = zlib.decompressobj(-15, WORDS)
        text = expand.decompress(data, largest(len(data)))
        found = json.loads(text.decode())
    except (zlib.error, ValueError, RecursionError):
        raise FormatError("the description of the model is corrupt") from None
    if not expand.eof or expand.unused_data or not isinstance(found, dict):
        raise FormatError("the description of the model is corrupt, or far larger than its deflated length")
    return found


def checked(data: dict[str, Any]) -> dict[str, Any]:
    """The manifest with every part present and of the right type, so that what follows need not ask.

    Raises:
        FormatError: a part is of another type.
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
    _need(isinstance(full["wiring"], dict), "wiring")
    for key in ("hidden", "kept"):
        _need(isinstance(full[key], list) and all(isinstance(n, str) for n in full[key]), key)
    _need(isinstance(full["names"], list) and all(isinstance(n, str) for n in full["names"]), "names")
    _need(len(set(full["names"])) == len(full["names"]), "names")
    _need(isinstance(full["frozen"], list) and all(isinstance(n, str) for n in full["frozen"]), "frozen")
    _need(_named(full["ties"], str) and set(full["ties"].values()) <= set(full["names"]), "ties")
    _need(_named(full["swaps"], dict), "swaps")
    _need(_named(full["edits"], dict), "edits")
    for edit in full["edits"].values():
        _need(all(_plain_path(key) and _numbers(value) for key, value in edit.items()), "edits")
    _need(_named(full["activations"], dict), "activations")
    for forms in full["activations"].values():
        _need(_named(forms, dict) and all(_form(form) for form in forms.values()), "activations")
    return full


def _need(holds: bool, part: str) -> None:
    if not holds:
        raise FormatError(f"the description of the model is corrupt: {part}")


def _named(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(v, kind) for v in value.values())


def _plain_path(key: str) -> bool:
    """Whether every step of an attribute's path is a public name, so that no file reaches into classes."""
    return re.fullmatch(r"(?:[A-Za-z]\w*)(?:\.[A-Za-z]\w*)*", key) is not None


def _numbers(value: Any) -> bool:
    if isinstance(value, list):
        return all(_numbers(v) for v in value)
    return isinstance(value, (int, float)) and abs(value) < 1 << 62


def _form(form: Any) -> bool:
    return (
        isinstance(form.get("type"), str)
        and isinstance(form.get("settings"), dict)
        and _named(form.get("tensors"), int)
        and all(index >= 0 for index in form["tensors"].values())
    )
