"""What the command line does and shows; `cli` only parses. A user of the library calls the public functions instead."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from featherweight import catalogue, coding, figures, pipeline, running, runtime, sources
from featherweight import export as exporting
from featherweight import report as pages
from featherweight.core import progress
from featherweight.core.ledger import recording
from featherweight.core.task import Task, evaluate
from featherweight.core.wired import Wired
from featherweight.errors import BadData, BadOption, FormatError, unknown
from featherweight.recipe_model import Recipe

console = Console(markup=False, width=None if sys.stdout.isatty() else 140)  # tables in a log file keep their columns


def run(recipe: Path | None, flags: Mapping[str, Any], *, show: bool) -> tuple[pipeline.Result, Path]:
    """`featherweight run` and `featherweight compress`: a recipe file or none, the flags that were given above it."""
    over = {key: value for key, value in flags.items() if value is not None and key != "method"}
    if flags["method"]:
        over["chain"] = [sources.method(spec) for spec in flags["method"]]
    read: Path | dict[str, Any] = {} if recipe is None else recipe
    out = running.load(read, over)[0].out
    if out is None:
        raise BadOption("out is missing: pass --out FOLDER for the results, or put out: into the recipe")
    return running.run(read, show=show, **over), Path(out)


# --- reading a result back --------------------------------------------------------------------------------------------


def read_report(directory: Path) -> dict[str, Any]:
    """The report of a folder that `compress` wrote."""
    path = directory / "report.json"
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadData(
            f"there is no report.json in {directory}: pass a folder that `featherweight compress` wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from None
    if (
        not isinstance(report, dict)
        or not {"original", "result", "onnx", "split", "stages", "reproduce"} <= report.keys()
    ):
        raise FormatError(f"{path} is no report of a whole run: run `featherweight compress` again")
    return report


def rebuilt(directory: Path, report: Mapping[str, Any]) -> tuple[nn.Module, nn.Module, Task] | None:
    """The original, the result and the task of a run whose recipe names them all; None for any other run."""
    made = report["reproduce"]
    if made["recipe"] is None or made["needs"]:
        return None
    asked = Recipe.model_validate(made["recipe"])
    task = sources.task(asked.data, batch_size=asked.batch_size)
    original = sources.network(asked.model)
    kept = directory / "original.safetensors"
    weights = kept if kept.exists() else asked.weights
    if weights is not None:
        sources.load_weights(original, weights)
    fresh = copy.deepcopy(original) if asked.student is None else sources.network(asked.student)
    into = None if asked.without_class else fresh
    return original.eval(), coding.load(directory / "model.fw", into=into).eval(), task


def verify(directory: Path, *, show: bool) -> Iterator[str]:
    """Checks a result against its report, a line a finding.

    Raises:
        FormatError: something does not agree.
    """
    report = read_report(directory)
    file = directory / "model.fw"
    coding.unpack(file)
    _agree("the size of model.fw", file.stat().st_size, report["result"]["bytes"])
    yield f"model.fw: checksums hold, {file.stat().st_size} bytes as reported"
    onnx = directory / "model.onnx"
    if report["onnx"]["written"]:
        session = exporting.session(onnx)
        yield f"model.onnx: runs in ONNX Runtime, {onnx.stat().st_size} bytes"
    built = rebuilt(directory, report)
    if built is None:
        yield "the metric was not measured again: the recipe of this run does not name its model and data"
        return
    with progress.showing(show):
        _, result, task = built
        score = evaluate(result, task, report["split"], "test the file")
        _agree(f"{score.name} on {report['split']}", score.value, report["result"]["metric"])
        yield f"model.fw: {score} on {report['split']}, as reported"
        if report["onnx"]["written"]:
            score = evaluate(session, task, "valid", "evaluate the ONNX file")
            _agree("the metric of model.onnx", score.value, report["onnx"]["metric_valid"])
            yield f"model.onnx: {score} on valid, as reported"


def _agree(what: str, found: float, reported: float) -> None:
    if abs(found - reported) > 1e-9:
        raise FormatError(f"{what} is {found}, report.json says {reported}: the files are not those of the report")


def report(directory: Path, other: Path | None, out: Path | None) -> Path:
    """Writes the page of a run beside its report.json, or one page that compares two runs."""
    first = read_report(directory)
    if other is None:
        return pages.write(pages.page(first), out or directory / "report.html")
    text = pages.comparison(first, read_report(other), (directory.name or str(directory), other.name or str(other)))
    return pages.write(text, out or Path("comparison.html"))


def unpack(file: Path, onnx: Path | None, weights: Path | None, into: str | None) -> Iterator[str]:
    """Writes plain weights, an ONNX model, or both."""
    if onnx is None and weights is None:
        raise BadData("nothing to write: pass --weights FILE, --onnx FILE, or both")
    if into is None and onnx is None:
        from safetensors.torch import save_file

        assert weights is not None  # one of the two was asked for
        save_file({name: tensor.contiguous() for name, tensor in coding.unpack(file).items()}, weights)
        yield f"{weights}: {weights.stat().st_size} bytes"
        return
    model = coding.load(file, into=None if into is None else sources.network(into)).eval()
    if weights is not None:
        sources.save_weights(model, weights)
        yield f"{weights}: {weights.stat().st_size} bytes"
    if onnx is not None:
        if isinstance(model, Wired):
            inputs = model.wiring.example()
        elif (described := coding.inspect(file).get("example_inputs")) is not None:
            inputs = example(described)
        else:
            raise BadData(f"{file} does not say what its inputs look like: save it with example_inputs=...")
        exporting.onnx(model, onnx, example_inputs=inputs)
        yield f"{onnx}: {onnx.stat().st_size} bytes"


def example(described: Mapping[str, Any]) -> Any:
    """Example inputs from the shapes and types that a file states: {"args": [...], "kwargs": {...}}."""

    def made(one: Mapping[str, Any]) -> torch.Tensor:
        kind = getattr(torch, one["dtype"])
        generator = torch.Generator().manual_seed(0)
        shape = tuple(one["shape"])
        return (
            torch.randn(shape, generator=generator).to(kind)
            if kind.is_floating_point
            else torch.zeros(shape, dtype=kind)
        )

    return tuple(made(a) for a in described["args"]), {k: made(v) for k, v in described["kwargs"].items()}


def export(network: str, onnx: Path, data: str, weights: Path | None) -> str:
    """Writes a network as ONNX."""
    model = sources.network(network).eval()
    if weights is not None:
        sources.load_weights(model, weights)
    told = exporting.onnx(model, onnx, example_inputs=sources.task(data).inputs())
    return f"{onnx}: {onnx.stat().st_size} bytes, " + ", ".join(
        f"{k} {v}" for k, v in asdict(told).items() if k != "path"
    )


def bench(directory: Path, *, threads: int, batches: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """Times a result against its original again."""
    import tempfile

    report = read_report(directory)
    built = rebuilt(directory, report)
    if built is None:
        raise BadData(
            f"{directory} was made from a model or data without a name: time it with featherweight.figures.latency"
        )
    original, result, task = built
    inputs = task.inputs()
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Path] = {}
        if report["onnx"]["written"]:
            files = {"original": Path(folder) / "original.onnx", "result": directory / "model.onnx"}
            exporting.onnx(original, files["original"], example_inputs=inputs)
        rows = figures.latency(original, result, inputs, files, batches=batches, threads=threads, seconds=seconds)
    return [asdict(row) for row in rows]


def accelerate(directory: Path, *, threads: int, batch: int, keep_slower: bool, seconds: float) -> dict[str, Any]:
    """Packs the layers of a result where that is faster: rows a layer, why others stay, and times of whole networks."""
    built = rebuilt(directory, read_report(directory))
    if built is None:
        raise BadData(
            f"{directory} was made from a model or data without a name: call featherweight.accelerate on what you load"
        )
    original, result, task = built
    args, kwargs = figures.batched(task.inputs(), batch)
    with figures.threads_of_torch(threads), recording() as ledger, torch.no_grad():
        fast = runtime.accelerate(result, (args, kwargs), keep_slower=keep_slower, seconds=seconds)
        calls = {"original": original, "result": result, "accelerated": fast}
        timed = figures.compare(
            {name: partial(model, *args, **kwargs) for name, model in calls.items()},
            runtime="torch", batch=batch, threads=threads, seconds=5 * seconds,
        )  # fmt: skip
    layers = [asdict(row) for row in runtime.executed(fast)]
    return {"layers": layers, "left": ledger.skipped, "notes": ledger.notes, "network": [asdict(row) for row in timed]}


# --- showing ----------------------------------------------------------------------------------------------------------


def show_ledger(report: Mapping[str, Any], out: Path) -> None:
    """The ledger of a run: one row a stage, then original against result."""
    table = Table(title="ledger", title_justify="left")
    for column in ("method", "metric (valid)", "drop pt", "params", "non-zeros", "MACs", "bytes", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for stage in report["stages"]:
        name = stage["method"] + (" (rolled back)" if stage["rolled_back"] else "")
        cells = [f"{stage['metric']:.4f}", f"{stage['drop']:+.2f}"]
        cells += [told(stage.get(key)) for key in ("params", "nonzeros", "macs", "size")]
        table.add_row(name, *cells, f"{stage['seconds']:.1f}")
    console.print(table)
    if report["stages"] and all(stage["rolled_back"] for stage in report["stages"]):
        console.print("every method was rolled back: the result is the original")
    before, after = report["original"], report["result"]
    name, split = before["metric_detail"]["name"], report["split"]
    console.print(f"{name} on {split}: {before['metric']:.4f} -> {after['metric']:.4f}" + _interval(report["drop"]))
    console.print(f"bytes: {before['bytes']:,} -> {after['bytes']:,} ({before['bytes'] / after['bytes']:.1f}x smaller)")
    if before["macs"]:
        console.print(
            f"MACs: {before['macs']:,} -> {after['macs']:,}; params: {before['params']:,} -> {after['params']:,}"
        )
    for row in report.get("latency", []):
        if row["name"] == "result":
            where = f"{row['runtime']}, batch {row['batch']}, {row['threads']} thread"
            console.print(f"latency in {where}: {row['median']:.3f} ms, {row['ratio']:.2f}x of the original")
    if not report["onnx"]["written"]:
        console.print(f"no ONNX file: {report['onnx']['why']}")
    console.print(
        f"written to {out}: model.fw, model.onnx, report.json, report.html"
        if report["onnx"]["written"]
        else f"written to {out}"
    )


def _interval(dropped: Mapping[str, Any]) -> str:
    if dropped["paired_interval"] is None:
        return ""
    low, high = dropped["paired_interval"]
    resolved = "" if low > 0 or high < 0 else ", not resolved by these samples"
    return f", drop {dropped['points']:+.2f} pt (paired 95 %: {low:+.2f} .. {high:+.2f}{resolved})"


def told(value: float | None) -> str:
    """A count with thousands separated, or a dash."""
    return "-" if value is None else f"{value:,.0f}"


def methods(name: str | None, family: str | None) -> list[dict[str, Any]]:
    """The rows of `featherweight methods`."""
    if name is not None:
        return [catalogue.entry(name).facts()]
    families = sorted({e.family for e in catalogue.entries().values()})
    if family is not None and family not in families:
        raise unknown("family", family, families)
    return [entry.facts() for entry in catalogue.entries(family=family).values()]


def show_methods(rows: list[dict[str, Any]]) -> None:
    table = Table()
    for column in ("id", "family", "kind", "needs", "shrinks", "what it does"):
        table.add_column(column, no_wrap=column == "id")
    for row in rows:
        facts = [", ".join(row[key]) or "-" for key in ("needs", "shrinks")]
        table.add_row(row["id"], row["family"], row["kind"], *facts, row["summary"])
    console.print(table)


def show_method(row: dict[str, Any]) -> None:
    console.print(f"{row['id']} ({row['family']} {row['kind']}): {row['summary']}", highlight=False)
    console.print(f"paper: {row['paper']}", highlight=False)
    console.print(
        f"needs: {', '.join(row['needs']) or 'nothing'}; makes smaller: {', '.join(row['shrinks']) or 'nothing'}"
    )
    if row["slot"]:
        takers = ", ".join(catalogue.takers_of(row["slot"]))
        console.print(f"pass it as an option, {row['slot']}={row['id']}, to {takers}", highlight=False)
        return
    if row["kind"] == "codec":
        console.print(
            f"it packs tensors in transit: featherweight.codec({row['id']!r}).encode(tensor)", highlight=False
        )
        return
    if row["aliases"]:
        console.print(f"aliases: {', '.join(row['aliases'])}")
    table = Table()
    for column in ("option", "default", "allowed", "meaning"):
        table.add_column(column)
    for option in row["options"]:
        table.add_row(option["name"], str(option["default"]), option["allowed"], option["meaning"])
    console.print(table)


def show_file(found: dict[str, Any]) -> None:
    """Where every byte of a file goes, in 80 columns."""
    rows, structure = found["tensors"], found["structure"]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, show_footer=True, width=80)
    table.add_column("tensor", "all tensors", ratio=1, overflow="fold")
    for key, word in BYTES.items():
        total = "" if key == "ideal_bytes" else f"{sum(row[key] for row in rows):.0f}"
        table.add_column(word, total, justify="right", no_wrap=True)
    for row in rows:
        shape = "x".join(map(str, row["shape"])) or "one value"
        told = fill(
            f"{shape} {row['dtype']} {row['layout']} {row['coder']}", 36, initial_indent=" ", subsequent_indent=" "
        )
        table.add_row(f"{row['name']}\n{told}", *["-" if row[key] is None else f"{row[key]:.0f}" for key in BYTES])
    console.print(table)
    _bytes_told("description of the model, deflated", structure["description"])
    for part, size in found["described"].items():
        _bytes_told(f"  {part}", size)
    for part, size in structure.items():
        if part != "description":
            _bytes_told(part, size)
    _bytes_told(f"the file ({'bare' if found['bare'] else 'full'}, version {found['format']})", found["bytes"])
    console.print(KEY_TO_BYTES, highlight=False)
    wiring = found["manifest"].get("wiring")
    for key in ("tool", "provenance", "example_inputs"):
        if found["manifest"].get(key):
            console.print(f"{key}: {found['manifest'][key]}", highlight=False)
    console.print(
        f"without the class: {_wiring_told(wiring) if wiring else 'no, pass into= to load it'}", highlight=False
    )


BYTES = {
    "entropy_bytes": "entropy",
    "ideal_bytes": "ideal",
    "code_bytes": "code",
    "table_bytes": "tables",
    "side_bytes": "side",
    "bytes": "total",
}
KEY_TO_BYTES = """
Bytes. total = code + tables + side: code words; heads and tables of the coder;
type, shape, scales, codebooks and signs of zeros. entropy: order 0, of the
tensor's symbols; ideal: what the adaptive models of its coder took them for."""


def _bytes_told(what: str, size: int) -> None:
    console.print(f"{what:<70}{size:>9}", highlight=False)


def _wiring_told(wiring: Mapping[str, Any]) -> str:
    """The graph of a file in one line: how much of it there is, and which sizes of its inputs may differ."""
    layers = sum(step[0].startswith("@") for step in wiring["steps"])
    inputs = [
        f"{dtype} ({', '.join('any' if d in free else str(n) for d, n in enumerate(shape))})"
        for dtype, shape, free, *_ in wiring["inputs"]
    ]
    return f"yes, {layers} calls of layers, {len(wiring['steps']) - layers} of operators; takes {', '.join(inputs)}"


def show_accelerated(found: Mapping[str, Any]) -> None:
    """Layers that have a packed form, why the others stay, and the whole network."""
    if found["layers"]:
        show_latency(found["layers"])
    for path, reason in found["left"].items():
        console.print(f"{path}: {reason}", highlight=False)
    for note in found["notes"]:
        console.print(note, highlight=False)
    show_latency(found["network"])


def show_latency(rows: list[dict[str, Any]]) -> None:
    table = Table()
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()])
    console.print(table)
