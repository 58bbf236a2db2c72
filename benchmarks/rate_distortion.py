"""Every number format on random weights: bits of the file and squared error, against the rate-distortion bound.

`python benchmarks/rate_distortion.py` writes `results/rate_distortion.json`. The weights are 512 x 1024 independent
numbers of variance one, normal or Laplacian, in a linear layer. Bits are those of the weights in a bare file, side
information included. The bound for the mean squared error D that a format makes is `1/2 log2(1 / D)` of normal weights,
and of others Shannon's lower bound `h - 1/2 log2(2 pi e D)`.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight import outputs, provenance, save
from featherweight.catalogue import entry
from featherweight.core.forms import bake
from featherweight.core.task import Task

HERE = Path(__file__).parent
SHAPE = (512, 1024)
ENTROPY = {"normal": math.log2(2 * math.pi * math.e) / 2, "Laplacian": math.log2(2 * math.e**2) / 2}  # bits


def formats() -> list[tuple[str, str, dict[str, Any]]]:
    """(name, method, options)."""
    casts = [(kind, "precision_cast", {"format": kind}) for kind in ("fp16", "bf16", "e4m3", "e5m2", "e2m1")]
    found: list[tuple[str, str, dict[str, Any]]] = list(casts)
    for name, bits in [
        *((grid, bits) for grid in ("symmetric_tensor", "symmetric", "symmetric_mse") for bits in (8, 6, 5, 4, 3, 2)),
        *(("dorefa_weights", bits) for bits in (4, 3, 2)),
        *(("ternary", 2), ("ternary_tensor", 2), ("binary", 1)),
        *(("sketch_direct", 3), ("sketch_refined", 3), ("sketch_refined", 2)),
    ]:
        found.append((f"{name}, {bits}", "quantize", {"weights": name, "weight_bits": bits}))
    found += [(f"pseudo_quant of 64, {bits}", "pseudo_quant", grouped(bits)) for bits in (8, 4)]
    found += [(f"k-means, {bits}", "gong_kmeans", {"weight_bits": bits}) for bits in (5, 4, 3, 2, 1)]
    found += [(f"shiftcnn, {bits}", "shiftcnn", {"weight_bits": bits}) for bits in (4, 3)]
    return [
        *found,
        ("gong_pq", "gong_pq", {"index_bits": 6, "dim": 2}),
        ("gong_rq", "gong_rq", {"index_bits": 4, "dim": 2}),
    ]


def grouped(bits: int) -> dict[str, Any]:
    return {"weight_bits": bits, "granularity": "group", "group_size": 64}


def drawn(kind: str) -> Tensor:
    """Weights of variance one, by the inverse of their distribution function."""
    generator = torch.Generator().manual_seed(0)
    if kind == "normal":
        return torch.randn(SHAPE, generator=generator)
    u = torch.rand(SHAPE, generator=generator, dtype=torch.float64) - 0.5
    return (-u.sign() * torch.log1p(-2 * u.abs()) / math.sqrt(2)).float()


def measured(name: str, method: str, options: dict[str, Any], kind: str) -> dict[str, Any]:
    """One format on one kind of weights."""
    weight = drawn(kind)
    model = nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0], bias=False))
    model[0].weight.data = weight.clone()
    batch = (torch.randn(2, SHAPE[1], generator=torch.Generator().manual_seed(1)), torch.zeros(2, dtype=torch.long))
    model = bake(entry(method)(model, Task(valid=[batch], train=[batch]), **options))
    with tempfile.TemporaryDirectory() as folder:
        report = save(model, Path(folder) / "model.fw", bare=True)
    (row,) = report.tensors
    error = float((model[0].weight.detach().double() - weight.double()).square().mean() / weight.double().var())
    bits = 8 * report.weights_bytes / weight.numel()
    bound = max(0.0, ENTROPY[kind] - math.log2(2 * math.pi * math.e * error) / 2)
    packed = (row.packed_bits + 8 * row.side_bytes) / weight.numel()
    return {
        "format": name,
        "weights": kind,
        "fixed bits": packed,
        "coded bits": bits,
        "error": error,
        "above": bits - bound,
    }


def main() -> None:
    rows = []
    for name, method, options in formats():
        rows += [measured(name, method, options, kind) for kind in ENTROPY]
        print(json.dumps(rows[-2]), json.dumps(rows[-1]), flush=True)
    found = {"formats": rows, "shape": SHAPE, "environment": provenance.environment()}
    outputs.write_json(HERE / "results" / "rate_distortion.json", found)


if __name__ == "__main__":
    main()
