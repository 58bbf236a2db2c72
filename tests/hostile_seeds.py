"""Honest files that are damaged in the tests and benchmarks: every coder, layout, rule and part of the description."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import nn

from featherweight.coding import compact, load, save, streams
from featherweight.coding.container import shapes_of
from featherweight.coding.manifest import checked, unpack_manifest
from featherweight.core.forms import Affine, Codes, declare_codes
from featherweight.core.recurrent import shared
from featherweight.core.structured import from_dense
from golden_models import GOLDEN_FILES, fresh
from test_coding import Net, Tied, compressed

GOLDEN = Path(__file__).parent / "golden"


@dataclass
class Seed:
    """An honest file, and a function that makes a model into which it can be loaded."""

    name: str
    data: bytes
    fresh: Callable[[], nn.Module] | None

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Those that the checksum of a compact file counts in."""
        if self.fresh is None or not compact.is_compact(self.data):
            return []
        return shapes_of(self.fresh(), checked(unpack_manifest(compact.cut(self.data).described)))


def tied() -> nn.Module:
    torch.manual_seed(0)
    model = Tied()
    model.head.weight = model.second.weight = model.first.weight
    return model


def wired_graph() -> nn.Module:
    return load(GOLDEN / "graph.fw")


def shared_layers() -> nn.Module:
    """Layers of all structures, and a recurrent one."""
    torch.manual_seed(0)
    told = (("circulant", 1), ("hashed", 5, 2), ("functional", 3, 2, 2, 3), ("toeplitz", 1), ("stein_cauchy", 2))
    model = nn.Sequential(*[from_dense(nn.Linear(8, 8), one) for one in told], SharedGRU())
    for module in model[:-1]:
        module._fw_swapped = True
    return model


class SharedGRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.gru = nn.Unflatten(1, (2, 4)), shared(nn.GRU(4, 3, 2, batch_first=True), 2)
        self.gru._fw_swapped = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(self.into(x))[0]


def wide() -> nn.Module:
    """A layer of integers that is long enough to be cut into blocks."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 150, bias=False)
    symbols = torch.randint(-3, 4, (150, 64), dtype=torch.int8)
    codes = Codes(symbols, Affine(torch.tensor(0.1), torch.zeros((), dtype=torch.int32)), (150, 64))
    layer.weight = nn.Parameter(codes.decode())
    declare_codes(layer, "weight", codes)
    return layer


def blocks() -> list[Seed]:
    """Files whose streams are cut as those of large tensors are."""
    found, kept = [], {name: getattr(streams, name) for name in ("LONG", "BLOCK", "FAST_BLOCK")}
    with tempfile.TemporaryDirectory() as folder:
        for name in kept:
            setattr(streams, name, 4096)
        for coder in ("fast", "huffman", "context_mixing"):
            save(wide(), Path(folder) / "a.fw", coder=coder)
            found.append(Seed(f"blocks {coder}", (Path(folder) / "a.fw").read_bytes(), wide))
    for name, value in kept.items():
        setattr(streams, name, value)
    return found


@cache
def seeds() -> tuple[Seed, ...]:
    """The golden files, and compressed networks under every coder, full and bare."""
    found = [Seed(name, (GOLDEN / f"{name}.fw").read_bytes(), lambda name=name: fresh(name)) for name in GOLDEN_FILES]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.fw"
        names = ("huffman", "range", "ans", "deepcabac", "context_mixing", "unlabeled_graph", "sparse_index", "fast")
        for coder in names:
            for bare in (False, True):
                save(compressed(), path, bare=bare, coder=coder)
                found.append(Seed(f"compressed {coder}{' bare' * bare}", path.read_bytes(), Net))
        for bare in (False, True):
            save(tied(), path, bare=bare)
            found.append(Seed(f"tied{' bare' * bare}", path.read_bytes(), tied))
        for bare in (False, True):
            save(shared_layers(), path, bare=bare, example_inputs=torch.zeros(2, 8))
            found.append(Seed(f"shared layers{' bare' * bare}", path.read_bytes(), shared_layers))
        wired = [one for one in found if one.name in ("graph", "network_wired")]
        found += wired * 3  # what a graph can say takes more tries
        save(wired_graph(), path, bare=True)
        found.append(Seed("graph bare", path.read_bytes(), wired_graph))
    return (*found, *blocks())
