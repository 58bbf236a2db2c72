"""What a result depends on: seeds, digests of weights, identities of functions, versions and the machine."""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import CodeType
from typing import Any

import numpy as np
import torch

from featherweight import catalogue


def seed_everything(seed: int, index: int) -> None:
    """Seeds Python, NumPy and PyTorch for the method at place `index`, so that resuming there repeats it."""
    mixed = int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:4], "little")
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


@contextmanager
def threads_of(count: int | None) -> Iterator[None]:
    """PyTorch computes on so many threads inside the block; on as many as before where `count` is None."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def identity(value: Any) -> Any:
    """An option's value as JSON; a function by its name and code, so that a changed function is another one."""
    code = getattr(inspect.unwrap(value), "__code__", None)
    if code is None:
        return catalogue.plain(value)
    return [getattr(value, "__module__", ""), value.__qualname__, hashlib.sha256(_told(code)).hexdigest()]


def _told(part: Any) -> bytes:
    """Code and its constants as bytes, the same in every process: not where they lie in memory, sets in one order."""
    if isinstance(part, CodeType):
        return b"\0".join([part.co_code, repr(part.co_names).encode(), *map(_told, part.co_consts)])
    return repr(sorted(map(repr, part)) if isinstance(part, frozenset) else part).encode()


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {name: version(name) for name in ("featherweight", "torch", "numpy", "onnx", "onnxruntime", "constriction")}


def environment() -> dict[str, Any]:
    """Versions, processor and threads, for the report."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "versions": versions(),
    }
