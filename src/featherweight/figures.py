"""The ledger's figures, measured on the artefact itself: cost, bytes, latency, and the test of a difference."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight import export
from featherweight.coding import SaveReport, save
from featherweight.core.cost import Cost, cost
from featherweight.core.measuring import Stopwatch, Timed, interleaved
from featherweight.core.progress import track
from featherweight.core.task import Score, as_call, eval_mode, pairs
from featherweight.errors import BadData
from featherweight.export import session

# A tensor at a fixed width, at its order-0 entropy (both with tables and scales), and as coded.
BYTES = ("packed_bytes", "entropy_bytes", "coded_bytes")

Call = Callable[[], Any]


def measure(model: nn.Module, example_inputs: Any, *, coder: str | None = None) -> dict[str, Any]:
    """Params, non-zeros, MACs (of one sample) and bytes of a model, in total and per layer. The model is not changed.

    Bytes are given as fp32 (4 a parameter), packed (fixed-length codes and their tables) and coded (the size of the
    file, by `os.stat` of one that was written to a temporary folder), beside the order-0 entropy of the symbols.
    """
    with tempfile.TemporaryDirectory() as folder:
        saved = save(model, Path(folder) / "model.fw", coder=coder)
        return figures_of(model, example_inputs, saved)


def figures_of(model: nn.Module, example_inputs: Any, saved: SaveReport) -> dict[str, Any]:
    """The figures of `measure`, from the report of a file that was already saved."""
    counted = cost(model, example_inputs)
    layers = rows(model, counted)
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    for tensor in saved.tensors:
        path = _owner(tensor.name, kinds)
        place = layers.setdefault(path, {"params": 0, "nonzeros": 0, "macs": 0, "type": kinds[path]})
        for key in BYTES:
            place[key] = place.get(key, 0) + math.ceil(getattr(tensor, key))
    return {
        "params": counted.params,
        "nonzeros": counted.nonzeros,
        "macs": counted.macs,
        "macs_note": counted.note,
        "bytes": {
            "fp32": 4 * counted.params,
            "packed": sum(math.ceil(t.packed_bytes) for t in saved.tensors),
            "entropy": sum(math.ceil(t.entropy_bytes) for t in saved.tensors),
            "coded": saved.bytes,
            "weights": saved.weights_bytes,
            "structure": saved.structure_bytes,
        },
        "layers": [{"path": path, **row} for path, row in layers.items()],
    }


def _owner(name: str, paths: Container[str]) -> str:
    """The module that a tensor of a file is of: the longest path that its name begins with.

    Forms of a layer's inputs and outputs stand beside it: `conv1/input/b.scale`.

    >>> _owner("block.conv/input/b.scale", {"", "block", "block.conv"}), _owner("weight", {""})
    ('block.conv', '')
    """
    ends = [end for end, letter in enumerate(name) if letter in "./"]
    return next((name[:end] for end in reversed(ends) if name[:end] in paths), "")


def rows(model: nn.Module, counted: Cost) -> dict[str, dict[str, Any]]:
    """Cost by module path, with the type of each module."""
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    return {
        path: {**asdict(row), "fp32_bytes": 4 * row.params, "type": kinds.get(path, "")}
        for path, row in counted.layers.items()
    }


# --- latency ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latency:
    """Times of one call, in milliseconds, and the median ratio to the first of the calls that ran beside it."""

    name: str
    runtime: str
    batch: int
    threads: int
    runs: int
    median: float
    p99: float
    ratio: float


def compare(
    calls: Mapping[str, Call], *, runtime: str, batch: int, threads: int, seconds: float = 2.0
) -> list[Latency]:
    """`interleaved` as rows: median, p99, and the median of the per-round ratios to the first call."""
    times = interleaved(calls, seconds=seconds)
    first = next(iter(times.values()))
    return [
        Latency(
            name,
            runtime,
            batch,
            threads,
            len(values),
            float(np.median(values)),
            float(np.percentile(values, 99)),
            float(np.median(values / first)),
        )
        for name, values in times.items()
    ]


def latency(
    original: nn.Module,
    result: nn.Module,
    example_inputs: Any,
    onnx: Mapping[str, str | Path],
    *,
    batches: Sequence[int] = (1, 64),
    threads: int = 1,
    seconds: float = 2.0,
    runtimes: Sequence[str] = ("torch", "onnxruntime"),
) -> list[Latency]:
    """Original and result side by side in PyTorch and, from the given files, in ONNX Runtime, a row each.

    Args:
        onnx: {"original": path, "result": path}; empty to leave ONNX Runtime out.
        batches: batch sizes.
        threads: threads of either runtime.
        seconds: time per pair.
        runtimes: which of the two to time.
    """
    sessions = {name: session(path, threads=threads) for name, path in onnx.items()}
    found: list[Latency] = []
    with threads_of_torch(threads), eval_mode(original), eval_mode(result):
        for batch in track(list(batches), "latency", len(batches)):
            args, kwargs = batched(example_inputs, batch)
            modules = {"original": _bind(original, args, kwargs), "result": _bind(result, args, kwargs)}
            files = {name: _bind(run, args, kwargs) for name, run in sessions.items()}
            for runtime, calls in (("torch", modules), ("onnxruntime", files)):
                if calls and runtime in runtimes:
                    found += compare(calls, runtime=runtime, batch=batch, threads=threads, seconds=seconds)
    return found


@contextmanager
def stopwatch(*, seconds: float = 1.0) -> Iterator[Stopwatch]:
    """What methods time by (`core.measuring`): two networks in ONNX Runtime, batch 1, one thread, interleaved."""
    with tempfile.TemporaryDirectory() as folder:
        written: list[tuple[nn.Module, Path]] = []  # the original is the same one from candidate to candidate

        def file(model: nn.Module, name: str, example_inputs: Any) -> Path:
            path = Path(folder) / name
            export.onnx(model, path, example_inputs=example_inputs, check=False)
            return path

        def timed(original: nn.Module, result: nn.Module, example_inputs: Any) -> Timed:
            if not (written and written[0][0] is original):
                written[:] = [(original, file(original, "original.onnx", example_inputs))]
            files = {"original": written[0][1], "result": file(result, "result.onnx", example_inputs)}
            before, after = latency(
                original, result, example_inputs, files, batches=(1,), runtimes=("onnxruntime",), seconds=seconds
            )
            return Timed(before.median, after.median, after.ratio)

        yield timed


def _bind(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return lambda: call(*args, **kwargs)


@contextmanager
def threads_of_torch(threads: int) -> Any:
    """Sets the number of PyTorch's threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batched(example_inputs: Any, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs as a call with `batch` samples, repeating those that are there."""
    args, kwargs = as_call(example_inputs)
    return tuple(_repeat(a, batch) for a in args), {k: _repeat(v, batch) for k, v in kwargs.items()}


def _repeat(value: Any, batch: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if len(value) == 0:
        raise BadData("the example inputs are an empty batch: at least one sample is needed")
    times = (batch + len(value) - 1) // len(value)
    return value.repeat(times, *[1] * (value.dim() - 1))[:batch].contiguous()


# --- is a difference real? --------------------------------------------------------------------------------------------


def paired_test(before: Score, after: Score) -> dict[str, Any] | None:
    """McNemar's exact test on the samples that both models saw, for metrics that are right or wrong per sample.

    Returns how many samples only one of the two had right and the two-sided p-value; None where it does not apply.
    """
    from scipy.stats import binomtest

    found = pairs(before, after)
    if before.k is None or after.k is None or found is None:
        return None
    right = 1 if before.higher_is_better else 0  # an error of 0 is what is right
    old, new = (values == right for values in found)
    lost, won = int((old & ~new).sum()), int((new & ~old).sum())
    p = binomtest(lost, lost + won).pvalue if lost + won else 1.0
    return {"test": "McNemar, exact", "lost": lost, "won": won, "p": float(p)}
