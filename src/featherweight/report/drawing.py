"""The geometry of the page's small charts; the templates draw it as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from featherweight.report.source import Figure, Source

WIDTH, HEIGHT = 340, 150  # of a chart, in its own units: about its size on a phone
LEFT, RIGHT, TOP, BOTTOM = 24, 24, 26, 26
LABELS = 7  # points up to which each is labelled; beyond it, the first and the last
LOG_FROM = 8  # a chart whose values span more than this is drawn on a logarithmic scale
HIST_WIDTH, HIST_HALF = 200, 34
CURVE_HEIGHT = 60


@dataclass(frozen=True)
class Dot:
    """One step of the chain on a chart: where it stands, what it is, and its interval where it has one."""

    x: float
    y: float
    low: float | None
    high: float | None
    kept: bool
    label: bool
    text_y: float
    figure: Figure


@dataclass(frozen=True)
class Chart:
    """A chart of the chain: its dots, the line through what was kept, and ticks of the axis below."""

    name: str
    dots: tuple[Dot, ...]
    line: str
    tries: tuple[str, ...]  # dashed lines to what was rolled back
    ticks: tuple[tuple[float, int], ...]
    logarithmic: bool


@dataclass(frozen=True)
class Point:
    """A step as it is handed in: figures, and whether it was kept."""

    figure: Figure
    low: float | None
    high: float | None
    kept: bool


def chart(name: str, points: Sequence[Point], *, may_log: bool) -> Chart | None:
    """Places the steps of a chain; None where fewer than two of them were measured."""
    known = [p.figure.value for p in points if p.figure.value is not None]
    if len(known) < 2:
        return None
    logarithmic = may_log and min(known) > 0 and max(known) > LOG_FROM * min(known)
    ends = [e for p in points if p.figure.value is not None for e in (p.figure.value, p.low, p.high) if e is not None]
    low, high = min(ends), max(ends)

    def up(value: float) -> float:
        if logarithmic:
            part = math.log(value / low) / math.log(high / low)
        else:
            part = (value - low) / (high - low) if high > low else 0.5
        return round(HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM), 1)

    step = (WIDTH - LEFT - RIGHT) / (len(points) - 1)
    dots, line, tries, last = [], [], [], None
    for index, point in enumerate(points):
        value = point.figure.value
        if value is None:
            continue
        x, y = round(LEFT + index * step, 1), up(value)
        label = len(points) <= LABELS or index in (0, len(points) - 1)
        ends_of = [None if end is None else up(end) for end in (point.low, point.high)]
        above = min([y, *(end for end in ends_of if end is not None)]) - 7  # clear of the interval's bar
        dots.append(Dot(x, y, ends_of[0], ends_of[1], point.kept, label, round(above, 1), point.figure))
        if point.kept:
            line.append(f"{x} {y}")
            last = (x, y)
        elif last is not None:
            tries.append(f"M{last[0]} {last[1]}L{x} {y}")
    ticks = tuple((round(LEFT + index * step, 1), index) for index in range(len(points)) if _ticked(index, len(points)))
    return Chart(name, tuple(dots), "M" + "L".join(line) if line else "", tuple(tries), ticks, logarithmic)


def _ticked(index: int, count: int) -> bool:
    """About twelve numbers fit below a chart."""
    return index % math.ceil(count / 12) == 0


@dataclass(frozen=True)
class Histogram:
    """One layer's weights: SVG paths of the original, upwards, and of the result, downwards."""

    name: str
    before: str
    after: str
    low: Figure
    high: Figure
    facts: tuple[tuple[str, Figure, Figure], ...]  # (name, before, after)
    old: bool  # whether the original has the layer
    new: bool  # whether the result has it


def histogram(source: Source, name: str, before: str, after: str) -> Histogram | None:
    """The histogram at two paths of a report (either may be absent); None where both are."""
    there = [path for path in (before, after) if source.mapping(path)]
    if not there:
        return None
    facts = tuple(
        (word, source.figure(f"{before}.{key}", "short"), source.figure(f"{after}.{key}", "short"))
        for word, key in FACTS
    )
    return Histogram(
        name,
        _outline(source, before, -1),
        _outline(source, after, 1),
        source.figure(f"{there[0]}.low", "weight"),
        source.figure(f"{there[0]}.high", "weight"),
        facts,
        old=before in there,
        new=after in there,
    )


FACTS = (("weights", "count"), ("zeros", "zeros"), ("distinct", "distinct"))


def _outline(source: Source, path: str, direction: int) -> str:
    """Bins as one closed path from the middle line, the tallest bin as high as there is room."""
    bins = [source.number(place) or 0.0 for place in source.rows(f"{path}.bins")]
    tallest = max(bins, default=0.0)
    if tallest <= 0:
        return ""
    wide = HIST_WIDTH / len(bins)
    parts = [f"M0 {HIST_HALF}"]
    for index, count in enumerate(bins):
        top = HIST_HALF + direction * (HIST_HALF - 1) * max(count, 0.0) / tallest
        parts.append(f"V{top:.1f}H{(index + 1) * wide:.4g}")
    return "".join(parts) + f"V{HIST_HALF}Z"


# --- sensitivity ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One layer pruned alone: the metric over the ratio as an SVG path, and where the ratio lies that was chosen."""

    name: str
    line: str
    chosen_x: float | None
    chosen: Figure
    most: Figure  # the largest ratio that was tried
    worst: Figure  # the metric there


def curves(source: Source, table: str) -> list[Curve]:
    """Every layer of a table of sensitivities, all on one scale of the metric."""
    points = {row: source.rows(f"{row}.points") for row in source.rows(f"{table}.layers")}
    found = [source.number(f"{point}.metric") for row in points.values() for point in row]
    values = [v for v in (source.number(f"{table}.metric"), *found) if v is not None]
    if not values:
        return []
    low, high = min(values), max(values)

    def place(ratio: float, metric: float) -> str:
        part = (metric - low) / (high - low) if high > low else 0.5
        return f"{HIST_WIDTH * min(max(ratio, 0.0), 1.0):.1f} {CURVE_HEIGHT - 3 - part * (CURVE_HEIGHT - 6):.1f}"

    drawn = []
    for row, held in points.items():
        pairs = [(0.0, source.number(f"{table}.metric"))]
        pairs += [(source.number(f"{one}.ratio") or 0.0, source.number(f"{one}.metric")) for one in held]
        line = "L".join(place(ratio, metric) for ratio, metric in pairs if metric is not None)
        last = held[-1] if held else row
        chosen = source.figure(f"{row}.chosen", "share")
        x = None if chosen.value is None else round(HIST_WIDTH * min(max(chosen.value, 0.0), 1.0), 1)
        most, worst = source.figure(f"{last}.ratio", "share"), source.figure(f"{last}.metric", "metric")
        drawn.append(Curve(source.text(f"{row}.path"), f"M{line}", x, chosen, most, worst))
    return drawn


# --- gradient shares --------------------------------------------------------------------------------------------------

SHARE_HEIGHT = 110
STROKES = ("", "7 3", "2 3", "9 3 2 3", "1 5", "12 4")  # so that curves differ without their colours


@dataclass(frozen=True)
class ShareCurve:
    """One term of a loss: its share of the gradient over the training, as an SVG path, and where it began and ended."""

    name: str
    line: str
    stroke: str
    first: Figure
    last: Figure


def share_curves(source: Source, path: str) -> list[ShareCurve]:
    """The terms of one training of a table of gradient shares."""
    points = source.rows(f"{path}.points")
    found = []
    for index, name in enumerate(source.items(f"{path}.terms")):
        held = [
            (point, source.number(f"{point}.progress"), source.number(f"{point}.shares.{index}")) for point in points
        ]
        known = [(point, x, y) for point, x, y in held if x is not None and y is not None]
        if not known:
            continue
        line = "L".join(f"{_inside(x) * WIDTH:.1f} {(1 - _inside(y)) * SHARE_HEIGHT:.1f}" for _, x, y in known)
        ends = [source.figure(f"{point}.shares.{index}", "share") for point in (known[0][0], known[-1][0])]
        found.append(ShareCurve(str(name), f"M{line}", STROKES[index % len(STROKES)], *ends))
    return found


def _inside(part: float) -> float:
    return min(max(part, 0.0), 1.0)
