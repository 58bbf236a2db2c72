"""Facts of a report as short tables: bytes, latency, how to reproduce, what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from featherweight.report.reproduce import call, command, recipe, start
from featherweight.report.source import Figure, Source

SIZES = (
    ("fp32", "four bytes a parameter"),
    ("packed", "codes of fixed length and their tables"),
    ("entropy", "order-0 entropy of the codes, with their tables"),
    ("coded", "the file as it is on disk"),
    ("weights", "of the file: tensors"),
    ("structure", "of the file: structure, checksums, provenance"),
)


def sizes(source: Source) -> list[tuple[str, str, Figure, float]]:
    """Where the result's bytes are: name, meaning, figure, percents of the longest."""
    rows = [(name, meaning, source.figure(f"result.size.{name}", "bytes")) for name, meaning in SIZES]
    most = max((figure.value or 0.0 for _, _, figure in rows), default=0.0)
    return [
        (name, meaning, figure, round(100 * (figure.value or 0.0) / most, 1) if most else 0.0)
        for name, meaning, figure in rows
    ]


@dataclass(frozen=True)
class Timing:
    """Latency of original and result in one runtime at one batch size."""

    runtime: str
    batch: Figure
    threads: Figure
    runs: Figure
    before: Figure
    after: Figure
    before_p99: Figure
    after_p99: Figure
    ratio: Figure


def timings(source: Source) -> list[Timing]:
    """Pairs of rows of the latency table: those of the same runtime, batch and threads."""
    rows = source.rows("latency")
    originals = {_place(source, path): path for path in rows if source.text(f"{path}.name") == "original"}
    found = []
    for path in rows:
        before = originals.get(_place(source, path))
        if before is None or before == path:
            continue
        found.append(
            Timing(
                source.text(f"{path}.runtime"),
                batch=source.figure(f"{path}.batch"),
                threads=source.figure(f"{path}.threads"),
                runs=source.figure(f"{path}.runs"),
                before=source.figure(f"{before}.median", "ms"),
                after=source.figure(f"{path}.median", "ms"),
                before_p99=source.figure(f"{before}.p99", "ms"),
                after_p99=source.figure(f"{path}.p99", "ms"),
                ratio=source.figure(f"{path}.ratio", "times"),
            )
        )
    return found


def _place(source: Source, path: str) -> tuple[str, ...]:
    return tuple(source.text(f"{path}.{key}") for key in ("runtime", "batch", "threads"))


def again(source: Source) -> dict[str, Any]:
    """How to get the result again: command or call, versions, machine, seed."""
    environment = {str(k): str(v) for k, v in source.mapping("environment").items() if k != "versions"}
    return {
        "recipe": recipe(source),
        "start": start(source),
        "no_recipe": source.text("reproduce.why"),
        "command": command(source),
        "call": call(source),
        "versions": {str(k): str(v) for k, v in source.mapping("environment.versions").items()},
        "machine": environment,
        "seed": source.text("seed"),
        "model": source.text("source.model"),
        "digest": source.text("source.sha256"),
        "coder": source.text("coder") or "the shortest for each tensor",
        "seconds": source.figure("seconds", "seconds"),
    }


def profile(source: Source) -> dict[str, Any]:
    """How the layers' shares of the time were measured, and the share of what is no layer with weights."""
    return {
        "how": source.text("profile.result.how"),
        "runs": source.figure("profile.result.runs"),
        "threads": source.figure("profile.result.threads"),
        "milliseconds": source.figure("profile.result.milliseconds", "ms"),
        "elsewhere": source.figure("profile.result.elsewhere", "share"),
    }


def onnx(source: Source) -> dict[str, Any]:
    """Whether an ONNX file was written, why not, and its metric beside the module's."""
    return {
        "known": bool(source.mapping("onnx")),
        "written": source.at("onnx.written") is True,
        "why": source.text("onnx.why"),
        "metric": source.figure("onnx.metric_valid", "metric"),
        "module": source.figure("onnx.metric_valid_of_the_module", "metric"),
    }


def file(source: Source) -> dict[str, Any]:
    """Whether model.fw opens without the class that built the model, why not, and how far it then is from it."""
    return {
        "known": bool(source.mapping("file")),
        "free": source.at("file.class_free") is True,
        "why": source.text("file.why"),
        "gap": source.figure("file.largest_difference", "gap"),
    }


PARTS = (
    ("base", "the original's metric on the validation data"),
    ("budget.limits", "what was reached of each limit"),
    ("layers", "figures of each layer"),
    ("profile", "each layer's share of the time"),
    ("layers.0.histogram", "histograms of the weights"),
    ("sensitivity", "what each layer costs alone"),
    ("latency", "latency"),
    ("result.size", "where the bytes are"),
    ("environment", "versions and machine"),
)


def missing(source: Source) -> list[str]:
    """What the report does not hold: measuring was off, or an earlier version wrote it."""
    return [meaning for path, meaning in PARTS if source.at(path) in (None, [], {}) and not _not_asked(source, path)]


def _not_asked(source: Source, path: str) -> bool:
    return path == "budget.limits" and not source.items("budget.until") and not source.items("budget.guard")
