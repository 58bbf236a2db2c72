"""int8 beside ONNX Runtime's static quantization and NNCF, all from the same float network and calibration data.

`python benchmarks/int8_beside.py [--again] [NAME ...]` writes three tables into `results/`, network after network, and
leaves out what is there already:

- `int8_beside.json`: accuracy on the 10,000 test images in ONNX Runtime and OpenVINO, McNemar's test against ours;
- `int8_beside_latency.json`: medians and 99th percentiles, one thread, all files of a runtime interleaved;
- `int8_beside_photographs.json`: EfficientNet-Lite0 (ImageNet weights), mean Kullback-Leibler divergence to the float
  network's outputs on crops of seven photographs, calibrated on crops of seven others.

Peers: ONNX Runtime (U8S8, per channel, Q/DQ), NNCF on the ONNX file, NNCF on the OpenVINO model (which is how OpenVINO
quantizes); each with its defaults. Needs `pip install featherweight[beside]`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from featherweight import compress, evaluate, export, outputs, provenance, sources
from featherweight.core.task import Score, Task
from featherweight.figures import batched, compare, paired_test

HERE = Path(__file__).parent
RESULTS = HERE / "results"
NETWORKS = {
    "workhorse": ("resnet20_half", "resnet20_half_fashion_mnist"),
    "resnet20": ("resnet20", "resnet20_fashion_mnist"),
    "vgg": ("vgg", "vgg_fashion_mnist"),
    "mobilenet_v2": ("mobilenet_v2:halvings=3", "mobilenet_v2_fashion_mnist"),
}
PHOTOGRAPHS = "efficientnet_lite0"
CALIBRATION_BATCHES = 16
NNCF_SAMPLES = 300  # its default
LEARNED: dict[str, Any] = {"calibration_batches": CALIBRATION_BATCHES, "iterations": 200, "rows": 1024}
SECONDS = 10.0
CROPS = 56


class Reader(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime's class has no types
    """Calibration batches, as ONNX Runtime wants them."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches: Iterator[dict[str, np.ndarray]] = ({"input": batch.numpy()} for batch in batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


class OpenVino:
    """A model of OpenVINO as a callable, in full precision where it is float, on one thread."""

    def __init__(self, model: Any) -> None:
        import openvino

        asked = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        self.request = openvino.Core().compile_model(model, "CPU", asked).create_infer_request()

    def __call__(self, value: Tensor) -> Tensor:
        found = self.request.infer({0: value.numpy()})
        return torch.from_numpy(np.array(next(iter(found.values()))))


@dataclass(frozen=True)
class Given:
    """What every quantizer starts from."""

    model: nn.Module
    task: Task
    batches: list[Tensor]
    folder: Path

    @property
    def file(self) -> Path:
        """The float network."""
        path = self.folder / "float.onnx"
        if not path.exists():
            export.onnx(self.model, path, example_inputs=self.task.inputs())
        return path

    @property
    def samples(self) -> list[np.ndarray]:
        """Single samples, as NNCF wants them."""
        return [one[None].numpy() for batch in self.batches for one in batch][:NNCF_SAMPLES]


def ours(given: Given, method: str, **options: Any) -> Path:
    """A method of Featherweight."""
    out = given.folder / method
    compress(given.model, given.task, method, out=out, measure=False, **options)
    return out / "model.onnx"


def onnxruntime(given: Given) -> Path:
    """ONNX Runtime's static quantization."""
    prepared, path = given.folder / "prepared.onnx", given.folder / "onnxruntime.onnx"
    quant_pre_process(given.file, prepared)
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(prepared, path, Reader(given.batches), quant_format=QuantFormat.QDQ, per_channel=True, **types)
    return path


def nncf_onnx(given: Given) -> Path:
    """NNCF on the ONNX file."""
    import nncf

    data = nncf.Dataset(given.samples, lambda value: {"input": value})
    path = given.folder / "nncf.onnx"
    onnx.save(nncf.quantize(onnx.load(given.file), data, subset_size=len(given.samples)), path)
    return path


def nncf_openvino(given: Given) -> Any:
    """NNCF on the model of OpenVINO."""
    import nncf
    import openvino

    converted = openvino.convert_model(given.file)
    return nncf.quantize(converted, nncf.Dataset(given.samples), subset_size=len(given.samples))


QUANTIZERS: dict[str, Callable[[Given], Any]] = {
    "float": lambda given: given.file,
    "ours": partial(ours, method="int8", calibration_batches=CALIBRATION_BATCHES),
    "ONNX Runtime": onnxruntime,
    "NNCF, ONNX": nncf_onnx,
    "NNCF, OpenVINO": nncf_openvino,
    "ours, rounding learned": partial(ours, method="adaround", weight_bits=8, **LEARNED),
}


def runners(files: dict[str, Any]) -> dict[str, dict[str, Callable[..., Tensor]]]:
    """Every file in every runtime that opens it."""
    paths = {name: path for name, path in files.items() if isinstance(path, Path)}
    return {
        "ONNX Runtime": {name: export.session(path, threads=1) for name, path in paths.items()},
        "OpenVINO": {name: OpenVino(str(file) if isinstance(file, Path) else file) for name, file in files.items()},
    }


def accuracies(name: str, files: dict[str, Any], task: Task, running: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each file: what it gets right in either runtime, and McNemar's test of it against ours."""
    scores: dict[str, dict[str, Score]] = {
        runtime: {who: evaluate(call, task, "test") for who, call in calls.items()}
        for runtime, calls in running.items()
    }
    rows = []
    for who, file in files.items():
        row: dict[str, Any] = {"network": name, "quantized by": who}
        for runtime, found in scores.items():
            row[f"{runtime}: accuracy"] = found[who].value if who in found else None
            tested = paired_test(found["ours"], found[who]) if who in found else None
            row[f"{runtime}: only ours right | only it | p"] = (
                f"{tested['lost']} | {tested['won']} | {tested['p']:.3g}" if tested else None
            )
        row["bytes"] = file.stat().st_size if isinstance(file, Path) else None
        rows.append(row)
    return rows


def latencies(name: str, task: Task, running: dict[str, Any], batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row for each file, runtime and batch size; what a runtime runs is interleaved."""
    rows = []
    for runtime, calls in running.items():
        for batch in batches:
            args, kwargs = batched(task.inputs(), batch)
            timed = compare(
                {who: partial(call, *args, **kwargs) for who, call in calls.items()},
                runtime=runtime,
                batch=batch,
                threads=1,
                seconds=SECONDS,
            )
            ours = next(row.ratio for row in timed if row.name == "ours")
            for row in timed:
                rows.append(
                    {
                        "network": name,
                        "runtime": runtime,
                        "batch": batch,
                        "quantized by": row.name,
                        "median ms": row.median,
                        "p99 ms": row.p99,
                        "to float": row.ratio,
                        "ours to it": ours / row.ratio,
                        "runs": row.runs,
                    }
                )
    return rows


def classified(name: str) -> None:
    """The rows of one network on Fashion-MNIST."""
    spec, weights = NETWORKS[name]
    model = sources.load_weights(sources.network(spec), HERE / "base" / f"{weights}.safetensors").eval()
    task = sources.task("fashion_mnist")
    batches = [batch[0] for batch, _ in zip(task.calibrating(), range(CALIBRATION_BATCHES), strict=False)]
    with tempfile.TemporaryDirectory() as folder:
        given = Given(model, task, batches, Path(folder))
        files = {who: quantize(given) for who, quantize in QUANTIZERS.items()}
        running = runners(files)
        add("int8_beside", f"int8 beside ONNX Runtime and NNCF (Fashion-MNIST, {10_000:,} test images)", name,
            accuracies(name, files, task, running))  # fmt: skip
        add("int8_beside_latency", "Latency of int8 files (one thread, interleaved within a runtime)", name,
            latencies(name, task, running, (1, 64)))  # fmt: skip


def photographed() -> None:
    """The rows of EfficientNet-Lite0."""
    from photographs import CALIBRATED_ON, HELD_OUT, crops, efficientnet_lite0

    model = efficientnet_lite0()
    batches = list(crops(CALIBRATED_ON, CROPS, 1).split(16))
    held = list(crops(HELD_OUT, CROPS, 2).split(16))
    labels = torch.zeros(16, dtype=torch.long)
    task = Task(valid=[(batches[0], labels)], calibration=[(batch,) for batch in batches])
    with torch.no_grad():
        wanted = torch.cat([model(x) for x in held]).log_softmax(1)
    title = f"EfficientNet-Lite0 in int8: divergence from the float network on {CROPS} crops of other photographs"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        given, files = Given(model, task, batches, Path(folder)), {}
        for who, quantize in QUANTIZERS.items():
            files[who] = quantize(given)
            row: dict[str, Any] = {"network": PHOTOGRAPHS, "quantized by": who}
            for runtime, calls in runners({who: files[who]}).items():
                row |= {f"{runtime}: {key}": value for key, value in _apart(calls.get(who), held, wanted).items()}
            rows.append(row)
            add("int8_beside_photographs", title, PHOTOGRAPHS, rows)
        add("int8_beside_latency", "Latency of int8 files (one thread, interleaved within a runtime)", PHOTOGRAPHS,
            latencies(PHOTOGRAPHS, task, runners(files), (1,)))  # fmt: skip


def _apart(call: Callable[..., Tensor] | None, held: list[Tensor], wanted: Tensor) -> dict[str, Any]:
    """Mean divergence from what is wanted, in nats, its standard error, and how often the first class agrees."""
    keys = ("mean KL", "standard error", "top-1 agreement")
    if call is None:
        return dict.fromkeys(keys)
    found = torch.cat([call(x) for x in held]).log_softmax(1)
    each = (wanted.exp() * (wanted - found)).sum(1)
    agree = (wanted.argmax(1) == found.argmax(1)).float().mean()
    return dict(zip(keys, (float(each.mean()), float(each.std() / len(each) ** 0.5), float(agree)), strict=True))


def add(file: str, title: str, name: str, rows: list[dict[str, Any]]) -> None:
    """Puts the rows of a network into a table, in place of those that are there."""
    path = RESULTS / f"{file}.json"
    held = json.loads(path.read_text())["table"] if path.exists() else []
    table = [row for row in held if row["network"] != name] + rows
    outputs.write_json(path, {"title": title, "table": table, "environment": provenance.environment()})
    print(json.dumps(rows, indent=1), flush=True)


def done(name: str) -> bool:
    """Whether the latency table, which is written last, has the network."""
    path = RESULTS / "int8_beside_latency.json"
    return path.exists() and any(row["network"] == name for row in json.loads(path.read_text())["table"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*NETWORKS, PHOTOGRAPHS])
    parser.add_argument("--again", action="store_true", help="also what has been measured already")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in asked.names:
        if asked.again or not done(name):
            photographed() if name == PHOTOGRAPHS else classified(name)


if __name__ == "__main__":
    main()
