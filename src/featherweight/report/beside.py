"""Two runs side by side: their quantities, their layers, and in what they differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from featherweight.report.chain import span
from featherweight.report.facts import timings
from featherweight.report.layers import COLUMNS, OWN, Cell, Column, cell, figures_of, longest
from featherweight.report.reproduce import steps, told
from featherweight.report.source import Figure, Source

QUANTITIES = (
    ("size on disk", "bytes", "bytes"),
    ("parameters", "params", "short"),
    ("non-zeros", "nonzeros", "short"),
    ("MACs of one sample", "macs", "short"),
)
SHARED = tuple(column for column in COLUMNS if column.key != "sensitivity")


@dataclass(frozen=True)
class Quantity:
    """One quantity of both results, and B's divided by A's (nothing where that has no meaning)."""

    name: str
    figures: tuple[Figure, Figure]
    ratio: Figure | None = None
    spans: tuple[tuple[Figure, Figure] | None, tuple[Figure, Figure] | None] = (None, None)


@dataclass(frozen=True)
class Shared:
    """A layer of either run; in its cells A stands before B, None where a run has no such layer."""

    number: int
    name: str
    type: str
    cells: tuple[Cell, ...]


def quantities(both: Source, runs: tuple[Source, Source]) -> list[Quantity]:
    """The results' size, metric, drop, parameters, MACs and latency."""
    names = [run.text("result.metric_detail.name") or "metric" for run in runs]
    metric = names[0] if names[0] == names[1] else " / ".join(names)
    found = [
        Quantity(
            f"{metric} on {' / '.join(dict.fromkeys(run.text('split') or 'valid' for run in runs))}",
            (runs[0].figure("result.metric", "metric"), runs[1].figure("result.metric", "metric")),
            spans=(span(runs[0], "result.metric_detail"), span(runs[1], "result.metric_detail")),
        ),
        Quantity("drop", (runs[0].figure("drop.points", "points"), runs[1].figure("drop.points", "points"))),
    ]
    for name, key, kind in QUANTITIES:
        pair = runs[0].figure(f"result.{key}", kind), runs[1].figure(f"result.{key}", kind)
        found.append(Quantity(name, pair, both.over(f"b.result.{key}", f"a.result.{key}")))
    timed = [{(t.runtime, t.batch.value, t.threads.value): t for t in timings(run)} for run in runs]
    for place, first in timed[0].items():
        if place in timed[1]:
            what = f"latency to the original's, {place[0]}, batch {first.batch.text}"
            found.append(Quantity(what, (first.ratio, timed[1][place].ratio)))
    return found


def joined(runs: tuple[Source, Source]) -> list[Shared]:
    """The layers of both results by name: A's in their order, then those that only B has."""
    paths = [{run.text(f"{path}.path"): path for path in run.rows("layers")} for run in runs]
    names = list(dict.fromkeys([*paths[0], *paths[1]]))
    table = []
    for column in SHARED:
        pairs = [
            tuple(_after(run, held.get(name), column) for run, held in zip(runs, paths, strict=True)) for name in names
        ]
        most = longest(column, pairs)
        table.append([cell(second, first, most) for first, second in pairs])
    types = [
        next(run.text(f"{held[name]}.type") for run, held in zip(runs, paths, strict=True) if name in held)
        for name in names
    ]
    return [
        Shared(index + 1, name or OWN, types[index], tuple(column[index] for column in table))
        for index, name in enumerate(names)
    ]


def _after(run: Source, path: str | None, column: Column) -> Figure | None:
    return None if path is None else figures_of(run, path, column.key)[0]


def differences(runs: tuple[Source, Source]) -> list[tuple[str, str, str]]:
    """What was asked or stood differently: (name, in A, in B)."""
    asked = [_asked(run) for run in runs]
    names = dict.fromkeys([*asked[0], *asked[1]])
    rows = [(name, asked[0].get(name, "none"), asked[1].get(name, "none")) for name in names]
    return [row for row in rows if row[1] != row[2]]


def _asked(run: Source) -> dict[str, str]:
    found = {"original (SHA-256)": run.text("source.sha256")[:16], "seed": run.text("seed")}
    found |= {f"step {n}": f"{name} {told(options)}".strip() for n, (name, options) in enumerate(steps(run), 1)}
    for key in ("until", "guard"):
        found[key] = ", ".join(map(str, run.items(f"budget.{key}"))) or "none"
    environment: dict[str, Any] = {**run.mapping("environment"), **run.mapping("environment.versions")}
    return found | {str(k): str(v) for k, v in environment.items() if k != "versions"}
