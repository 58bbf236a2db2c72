"""One file, one SHA-256 of its weights: compiled or not, one thread or two, our reader or the independent one."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import independent_reader
from featherweight.coding import container, save, streams, threads, unpack
from featherweight.core.forms import Affine, Codes, declare_codes

CODERS = ("sparse_index", "huffman", "range", "rans", "deepcabac", "context_mixing", "fast")
UNCOMPILED = """
import sys, torch
from test_same_weights import digest
torch.set_num_threads(2)
for path in sys.argv[1:]:
    print(digest(path))
"""


def net(last: int = 10) -> nn.Module:
    """Integers on a grid for each tensor and for each channel, the points of a trellis, and floats."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(10, 12, bias=False), nn.Linear(12, last))
    scales = (torch.linspace(0.01, 0.03, 4), torch.tensor(0.05), torch.tensor(0.02))
    for layer, scale in zip((model[0], model[2], model[3]), scales, strict=True):
        symbols = (torch.randn(layer.weight.shape) * 3).round().to(torch.int8)
        rule = Affine(scale, torch.zeros((), dtype=torch.int32), 0 if scale.dim() else None)
        codes = Codes(points(symbols) if layer is model[2] else symbols, rule, tuple(symbols.shape))
        layer.weight = nn.Parameter(codes.decode())
        declare_codes(layer, "weight", codes)
    return model


def points(levels: torch.Tensor) -> torch.Tensor:
    """What levels of dependent quantization with 8 states stand for."""
    table, state, found = ("02", "75", "13", "64", "20", "57", "31", "46"), 0, []
    for level in levels.reshape(-1).tolist():
        found.append(2 * level - (state % 2) * int(np.sign(level)))
        state = int(table[state][level % 2])
    return torch.tensor(found, dtype=torch.int8).view(levels.shape)


def test_every_reader_finds_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "FAST_BLOCK", 4100)
    wanted: dict[Path, str] = {}
    for coder in CODERS:
        model = net(350) if coder == "fast" else net()  # the last layer is in blocks
        for bare in (False, True):
            path = tmp_path / f"{coder}{' bare' * bare}.fw"
            save(model, path, coder=coder, bare=bare, class_free=False)
            wanted[path] = hashlib.sha256(b"".join(t.numpy().tobytes() for t in in_order(model))).hexdigest()
            shapes = [tuple(t.shape) for t in in_order(model)] if bare else None
            _, tensors = independent_reader.read(path.read_bytes(), shapes)
            assert hashlib.sha256(b"".join(raw for *_, raw in tensors.values())).hexdigest() == wanted[path], path
    pools: list[int] = []
    monkeypatch.setattr(threads, "ThreadPoolExecutor", lambda n: pools.append(n) or ThreadPoolExecutor(n))
    monkeypatch.setattr(streams, "LONG", 4000)  # of so short streams and files nothing would be read in threads
    monkeypatch.setattr(container, "BRIEF", 0)
    for number in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        assert [digest(str(path)) for path in wanted] == list(wanted.values()), number
    assert len(pools) > len(CODERS)  # the records of every full file, and blocks
    assert set(pools) == {2}
    found = subprocess.run(
        [sys.executable, "-c", UNCOMPILED, *wanted],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert found.stdout.split() == list(wanted.values())


def digest(path: str) -> str:
    """Of the weights that our reader finds."""
    tensors = unpack(path, into=None if "fast" in path else net()).values()
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def in_order(model: nn.Module) -> list[torch.Tensor]:
    """The tensors in the order of a file."""
    return [model.state_dict()[name] for name in ("0.bias", "0.weight", "2.weight", "3.bias", "3.weight")]
