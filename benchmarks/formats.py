"""Every number format on the workhorse without training: accuracy against the bytes of the file, by bits.

    OMP_NUM_THREADS=1 python benchmarks/formats.py

Weights alone, then weights and activations. Each row is written to results/formats.json as soon as it is there; a run
that was stopped goes on with the rows that are missing. Nothing is chosen by these figures: every row is a format with
its defaults, evaluated once on test.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from run import commit

from featherweight import FeatherweightError, compress, outputs, provenance, save, sources
from featherweight.catalogue import entries

HERE = Path(__file__).parent
RESULT = HERE / "results" / "formats.json"
NETWORK, WEIGHTS, DATA = "resnet20_half", "base/resnet20_half_fashion_mnist.safetensors", "fashion_mnist"
QUANTIZE: dict[str, Any] = {"epochs": 0}


def rows() -> list[tuple[str, str, int, str, dict[str, Any]]]:
    """(format, what is on it, bits, method, options)."""
    found: list[tuple[str, str, int, str, dict[str, Any]]] = []
    for bits in (8, 6, 5, 4, 3, 2):
        for name in ("symmetric_tensor", "symmetric", "symmetric_mse"):
            found.append((name, "weights", bits, "quantize", {"weights": name, "weight_bits": bits, **QUANTIZE}))
        found.append(("k-means", "weights", bits, "kmeans_share", {"weight_bits": bits, "epochs": 0}))
        found.append(("k-means, exact", "weights", bits, "gong_kmeans", {"weight_bits": bits}))
        found.append(("network_sketching", "weights", bits, "network_sketching", {"weight_bits": bits}))
        if bits <= 5:
            found.append(("shiftcnn", "weights", bits, "shiftcnn", {"weight_bits": bits}))
        found.append(("adaround", "weights", bits, "adaround", {"weight_bits": bits}))
        both = {"weights": "symmetric_mse", "acts": "mse", "weight_bits": bits, "act_bits": bits, "first_last_bits": 8}
        found.append(("symmetric_mse, mse", "weights and activations", bits, "quantize", {**both, **QUANTIZE}))
    found.append(("twn", "weights", 2, "quantize", {"weights": "ternary", "weight_bits": 2, **QUANTIZE}))
    found.append(("bwn", "weights", 1, "quantize", {"weights": "binary", "weight_bits": 1, **QUANTIZE}))
    found.append(("gong_pq", "weights", 0, "gong_pq", {}))
    found.append(("gong_rq", "weights", 0, "gong_rq", {}))
    for bits, kind in ((16, "fp16"), (16, "bf16"), (8, "e4m3"), (8, "e5m2"), (4, "e2m1")):
        found.append((kind, "weights", bits, "precision_cast", {"format": kind}))
    return found


def one(label: str, on: str, bits: int, method: str, options: dict[str, Any]) -> dict[str, Any]:
    model = sources.load_weights(sources.network(NETWORK), HERE / WEIGHTS).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    out = HERE / "cache" / "formats" / f"{label}_{on}_{bits}".replace(" ", "_").replace(",", "")
    task = sources.task(DATA)
    row: dict[str, Any] = {"format": label, "on": on, "bits": bits, "method": method, "options": options}
    try:
        result = compress(model, task, method, out=out, measure=False, onnx=False, **options)
    except FeatherweightError as error:
        return row | {"refused": str(error)}
    bare = save(result.model, out / "bare.fw", bare=True)
    report = result.report
    return row | {
        "original": report["original"]["metric"],
        "result": report["result"]["metric"],
        "drop_points": report["drop"]["points"],
        "paired_interval": report["drop"]["paired_interval"],
        "bare_bytes": bare.bytes,
        "seconds": sum(stage["seconds"] for stage in report["stages"]),
    }


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"title": __doc__.partition("\n")[0], "rows": []}
    done = {(row["format"], row["on"], row["bits"]) for row in result["rows"]}
    for label, on, bits, method, options in rows():
        if (label, on, bits) in done or method not in entries("method") | entries("verb"):
            continue
        result["rows"].append(one(label, on, bits, method, options))
        result |= {"environment": provenance.environment(), "commit": commit()}
        outputs.write_json(RESULT, result)
        print(json.dumps(result["rows"][-1])[:160], flush=True)


if __name__ == "__main__":
    main()
