"""Digests of tensors, networks and inputs: equal if and only if, bit for bit, they are the same."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from featherweight.errors import BadOption


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of a model's state."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(raw(tensor))
    return found.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's state and of the kinds of its modules: unchanged if and only if a method touched nothing."""
    kinds = " ".join(f"{path}:{type(module).__name__}" for path, module in model.named_modules())
    return hashlib.sha256((kinds + digest(model)).encode()).hexdigest()


def portrait(model: nn.Module) -> str:
    """SHA-256 of all that a frozen network shows of itself: kinds and settings of its modules, parameters, buffers."""
    found = hashlib.sha256(repr(model).encode())
    for path, module in model.named_modules():
        found.update(f"{path} {type(module).__module__} {type(module).__qualname__}".encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(raw(tensor))
    return found.hexdigest()


def inputs_digest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """SHA-256 of what a network is called with: names and places, shapes, types and bytes.

    Raises:
        BadOption: something among it has no value that could be told.
    """
    found = hashlib.sha256()
    for place, value in tree_flatten_with_path((args, kwargs))[0]:
        found.update(repr(place).encode())
        if isinstance(value, Tensor):
            found.update(f"{tuple(value.shape)} {value.dtype}".encode())
            found.update(raw(value))
        elif isinstance(value, (str, bytes, int, float, bool, type(None))):
            found.update(repr(value).encode())
        else:
            raise BadOption(
                f"an input of type {type(value).__name__} cannot be told from another, so that outputs for it cannot "
                "be kept: leave teacher_cache out, or pass tensors"
            )
    return found.hexdigest()
