"""int8 beside ONNX Runtime's own static quantization (U8S8, per channel, Q/DQ), both from the same float network.

`python benchmarks/int8_beside_onnxruntime.py [NAME ...]` writes `results/int8_beside_onnxruntime.json`, a row a network
and batch size: accuracy of the files on the test split, their sizes, and latency in one interleaved run on one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from featherweight import compress, evaluate, export, outputs, provenance, sources
from featherweight.core.task import Task
from featherweight.figures import batched, compare

HERE = Path(__file__).parent
NETWORKS = {
    "workhorse": ("resnet20_half", "base/resnet20_half_fashion_mnist.safetensors"),
    "vgg": ("vgg", "base/vgg_fashion_mnist.safetensors"),
}
CALIBRATION_BATCHES = 16


class Reader(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime's class has no types
    """The first training batches, as ONNX Runtime wants them."""

    def __init__(self, task: Task) -> None:
        self.batches: Iterator[Any] = (
            {"input": batch[0].numpy()}
            for batch, _ in zip(task.calibrating(), range(CALIBRATION_BATCHES), strict=False)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def measured(name: str) -> list[dict[str, Any]]:
    """The rows of one network."""
    spec, weights = NETWORKS[name]
    model = sources.load_weights(sources.network(spec), HERE / weights).eval()
    task = sources.task("fashion_mnist")
    with tempfile.TemporaryDirectory() as folder:
        files = {key: Path(folder) / f"{key}.onnx" for key in ("float", "ours", "theirs")}
        result = compress(model, task, "int8", calibration_batches=CALIBRATION_BATCHES, out=Path(folder) / "ours")
        export.onnx(model, files["float"], example_inputs=task.inputs())
        (Path(folder) / "ours" / "model.onnx").replace(files["ours"])
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(files["float"], prepared)
        quantize_static(
            prepared,
            files["theirs"],
            Reader(task),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        sessions = {key: export.session(path, threads=1) for key, path in files.items()}
        scores = {key: evaluate(session, task, "test").value for key, session in sessions.items()}
        rows = []
        for batch in (1, 64):
            args, kwargs = batched(task.inputs(), batch)
            calls = {key: partial(session, *args, **kwargs) for key, session in sessions.items()}
            timed = {row.name: row for row in compare(calls, runtime="onnxruntime", batch=batch, threads=1, seconds=12)}
            rows.append(
                {
                    "network": name,
                    "batch": batch,
                    "accuracy, float": scores["float"],
                    "accuracy, int8": scores["ours"],
                    "accuracy, ONNX Runtime's": scores["theirs"],
                    "ms, float": timed["float"].median,
                    "int8 / float": timed["ours"].ratio,
                    "ONNX Runtime's / float": timed["theirs"].ratio,
                    "int8 / ONNX Runtime's": timed["ours"].ratio / timed["theirs"].ratio,
                    "p99 ms, int8": timed["ours"].p99,
                    "bytes, float onnx": files["float"].stat().st_size,
                    "bytes, int8 onnx": files["ours"].stat().st_size,
                    "bytes, model.fw": result.report["result"]["bytes"],
                    "bytes, fp32 weights": result.report["original"]["bytes"],
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=sorted(NETWORKS))
    path = HERE / "results" / "int8_beside_onnxruntime.json"
    found = json.loads(path.read_text()) if path.exists() else {"table": []}
    for name in parser.parse_args().names:
        rows = [row for row in found["table"] if row["network"] != name] + measured(name)
        found = {
            "title": "int8 beside ONNX Runtime's static quantization (Fashion-MNIST, one thread, interleaved)",
            "table": sorted(rows, key=lambda row: (row["network"], row["batch"])),
            "environment": provenance.environment(),
        }
        outputs.write_json(path, found)
        print(json.dumps(rows[-2:], indent=1))


if __name__ == "__main__":
    main()
