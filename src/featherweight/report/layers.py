"""The layers of a report: a table with bars, histograms of their weights, why some were left alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from featherweight.report.drawing import Curve, Histogram, ShareCurve, curves, histogram, share_curves
from featherweight.report.source import Figure, Source

OWN = "(the network's own)"  # what a network computes outside of its layers has the path ""


@dataclass(frozen=True)
class Cell:
    """A figure of a layer with that of the original, and both as percents of the longest bar of the column."""

    after: Figure | None
    before: Figure | None
    width: float
    before_width: float


@dataclass(frozen=True)
class Layer:
    """A row of the table of layers."""

    number: int
    name: str
    type: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Column:
    """A column of the table of layers: its name, and what it means."""

    key: str
    name: str
    meaning: str


COLUMNS = (
    Column("params", "parameters", "weights and biases of the layer itself"),
    Column("macs", "MACs", "multiply-accumulates of one sample"),
    Column("coded_bytes", "bytes", "as coded in the file; of the original, four bytes a parameter"),
    Column("sparsity", "sparsity", "share of the parameters that are exactly zero"),
    Column("latency_share", "time", "share of the time of one call of the whole network"),
    Column("sensitivity", "alone", "drop when this layer alone takes its compressed weights"),
)


def layers(source: Source) -> list[Layer]:
    """The result's layers in the order of the network."""
    paths = source.rows("layers")
    table = []
    for column in COLUMNS:
        pairs = [figures_of(source, path, column.key) for path in paths]
        most = longest(column, pairs)
        table.append([cell(after, before, most) for after, before in pairs])
    return [
        Layer(
            index + 1,
            source.text(f"{path}.path") or OWN,
            source.text(f"{path}.type"),
            tuple(column[index] for column in table),
        )
        for index, path in enumerate(paths)
    ]


def figures_of(source: Source, path: str, key: str) -> tuple[Figure, Figure | None]:
    """One column of the layer at a path: of the result, and of the original where it had that layer."""
    was = f"{path}.original"
    known = bool(source.mapping(was))
    if key == "coded_bytes":
        before = source.figure(f"{was}.fp32_bytes", "bytes") if known else None
        return source.figure(f"{path}.coded_bytes", "bytes"), before
    if key == "sparsity":
        before = source.missing_share(f"{was}.nonzeros", f"{was}.params") if known else None
        return source.missing_share(f"{path}.nonzeros", f"{path}.params"), before
    if key == "sensitivity":
        return source.figure(f"{path}.sensitivity", "points"), None
    kind = "share" if key == "latency_share" else "short"
    return source.figure(f"{path}.{key}", kind), source.figure(f"{was}.{key}", kind) if known else None


def longest(column: Column, pairs: Iterable[tuple[Figure | None, ...]]) -> float:
    """What a bar of full length stands for: the largest of the column, and 1 for a share of the layer itself."""
    values = [figure.value for pair in pairs for figure in pair if figure is not None and figure.value is not None]
    return 1.0 if column.key == "sparsity" else max(values, default=0.0)


def cell(after: Figure | None, before: Figure | None, most: float) -> Cell:
    """A figure and the one before it, with their bars."""
    return Cell(after, before, _width(after, most), _width(before, most))


def _width(figure: Figure | None, most: float) -> float:
    if figure is None or figure.value is None or most <= 0:
        return 0.0
    return round(100 * min(max(figure.value, 0.0), most) / most, 1)


@dataclass(frozen=True)
class Gone:
    """A layer of the original that the result does not have, and what stands in its place."""

    name: str
    type: str
    params: Figure
    macs: Figure
    instead: str


def gone(source: Source) -> list[Gone]:
    """Layers that were replaced, folded into another or removed."""
    names = [source.text(f"{path}.path") for path in source.rows("layers")]
    found = []
    for path in source.rows("layers_gone"):
        name = source.text(f"{path}.path")
        parts = [other for other in names if other.startswith(f"{name}.")]
        instead = f"replaced by {', '.join(parts)}" if parts else "folded into its neighbour or removed"
        kinds = source.text(f"{path}.type"), source.figure(f"{path}.params"), source.figure(f"{path}.macs", "short")
        found.append(Gone(name, *kinds, instead))
    return found


def weights(source: Source) -> list[Histogram]:
    """Histograms of the layers that have weights, in the order of the network; those that are gone come last."""
    rows = [(f"{p}.original.histogram", f"{p}.histogram", p) for p in source.rows("layers")]
    rows += [(f"{p}.histogram", f"{p}.none", p) for p in source.rows("layers_gone")]
    drawn = [histogram(source, source.text(f"{path}.path"), before, after) for before, after, path in rows]
    return [one for one in drawn if one is not None]


# --- sensitivity ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scan:
    """What a step measured of every layer alone before it chose their ratios."""

    step: int
    method: str
    metric: Figure
    curves: tuple[Curve, ...]


def scans(source: Source) -> list[Scan]:
    """Of the steps that measured it."""
    found = []
    for index, path in enumerate(source.rows("stages")):
        table = f"{path}.tables.sensitivity"
        if drawn := curves(source, table):
            metric = source.figure(f"{table}.metric", "metric")
            found.append(Scan(index + 1, source.text(f"{path}.method"), metric, tuple(drawn)))
    return found


# --- gradient shares --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """One training with several terms of the loss: who led, and where that was measured."""

    step: int
    method: str
    training: str
    at: str
    curves: tuple[ShareCurve, ...]


def learned(source: Source) -> list[Learned]:
    """Of all trainings of all steps that had more than one term."""
    found = []
    for index, path in enumerate(source.rows("stages")):
        for row in source.rows(f"{path}.tables.gradient_shares"):
            if drawn := share_curves(source, row):
                told = source.text(f"{path}.method"), source.text(f"{row}.training"), source.text(f"{row}.at")
                found.append(Learned(index + 1, *told, tuple(drawn)))
    return found


# --- why left alone ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reason:
    """Layers that a method left alone for one reason."""

    step: int
    method: str
    reason: str
    layers: tuple[str, ...]


def reasons(source: Source) -> list[Reason]:
    """By step and reason, in the order in which they were said."""
    found: dict[tuple[int, str, str], list[str]] = {}
    for index, path in enumerate(source.rows("stages")):
        for layer, reason in source.mapping(f"{path}.skipped").items():
            key = (index + 1, source.text(f"{path}.method"), str(reason))
            found.setdefault(key, []).append(str(layer) or OWN)
    return [Reason(*key, tuple(names)) for key, names in found.items()]
