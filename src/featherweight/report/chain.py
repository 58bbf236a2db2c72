"""The head of a page: the verdict, and the chain step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from featherweight.report.drawing import Chart, Point, chart
from featherweight.report.facts import timings
from featherweight.report.reproduce import told
from featherweight.report.source import Figure, Source

# --- verdict ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Versus:
    """One quantity of the original and of the result; `word` says what the change is: "smaller", "the same"."""

    name: str
    before: Figure
    after: Figure
    change: Figure
    word: str
    before_span: tuple[Figure, Figure] | None = None
    after_span: tuple[Figure, Figure] | None = None
    remark: str = ""


@dataclass(frozen=True)
class Limit:
    """A budget or guard as it was asked; `holds` is None where the report does not say."""

    text: str
    guard: bool
    allowed: Figure
    reached: Figure
    holds: bool | None


def versus(source: Source) -> list[Versus]:
    """The quantities of the verdict: size, metric, parameters, MACs, latency."""
    rows = [_counted(source, "size on disk", "bytes", "bytes", ("smaller", "larger")), _metric(source)]
    for name, key, kind in (("parameters", "params", "short"), ("non-zeros", "nonzeros", "short")):
        rows.append(_counted(source, name, key, kind, ("fewer", "more")))
    rows.append(_counted(source, "MACs of one sample", "macs", "short", ("fewer", "more")))
    timed = [row for row in timings(source) if row.batch.value == 1]
    return rows + [
        Versus(
            f"latency, {row.runtime}, batch 1, {row.threads.text} thread" + "s" * (row.threads.value != 1),
            row.before,
            row.after,
            row.ratio,
            "of the original",
            remark="median of interleaved runs",
        )
        for row in timed
    ]


def _counted(source: Source, name: str, key: str, kind: str, words: tuple[str, str]) -> Versus:
    before, after = (source.figure(f"{side}.{key}", kind) for side in ("original", "result"))
    above, below, word = f"original.{key}", f"result.{key}", words[0]
    if (before.value or 0) < (after.value or 0):
        above, below, word = below, above, words[1]
    change = source.over(above, below)
    return Versus(name, before, after, change, "the same" if change.value == 1 else word)


def _metric(source: Source) -> Versus:
    name = source.text("result.metric_detail.name") or "metric"
    before, after = (source.figure(f"{side}.metric", "metric") for side in ("original", "result"))
    low, high = (source.figure(f"drop.paired_interval.{end}", "points") for end in (0, 1))
    remark = ""
    if low.value is not None and high.value is not None:
        resolved = low.value > 0 or high.value < 0
        remark = f"paired 95 % interval {low.text} to {high.text}" + (
            "" if resolved else ": not resolved by these samples"
        )
    return Versus(
        f"{name} on {source.text('split') or 'valid'}",
        before,
        after,
        source.figure("drop.points", "points"),
        "drop",
        span(source, "original.metric_detail"),
        span(source, "result.metric_detail"),
        remark,
    )


def span(source: Source, path: str) -> tuple[Figure, Figure] | None:
    """The interval of a score; None where it has none."""
    low, high = source.figure(f"{path}.low", "metric"), source.figure(f"{path}.high", "metric")
    return None if low.value is None or high.value is None else (low, high)


LIMIT_KINDS = {"size": "bytes", "latency": "ms", "drop": "points"}


def limits(source: Source) -> list[Limit]:
    """Every budget and guard with what was reached; reports of earlier versions only say which were missed."""
    found = []
    for path in source.rows("budget.limits"):
        kind = LIMIT_KINDS.get(source.text(f"{path}.quantity"), "short")
        holds = source.at(f"{path}.holds")
        allowed, reached = source.figure(f"{path}.allowed", kind), source.figure(f"{path}.reached", kind)
        guard = source.at(f"{path}.guard") is True
        found.append(
            Limit(source.text(f"{path}.text"), guard, allowed, reached, holds if holds in (True, False) else None)
        )
    if found:
        return found
    missed = [str(text) for text in source.items("budget.binds")]
    for key in ("until", "guard"):
        for index, text in enumerate(source.items(f"budget.{key}")):
            unknown = source.figure(f"budget.limits.{index}.reached")
            told_missed = any(f"{text} was asked" in told for told in missed)
            # what broke a guard was rolled back, so whatever was kept holds it
            holds = not told_missed and (key == "guard" or source.at("budget.reached") is True)
            found.append(Limit(str(text), key == "guard", unknown, unknown, holds))
    return found


def verdict(source: Source) -> dict[str, Any]:
    """The head of the page: how much smaller, at what cost, and whether the budget holds."""
    stages = source.rows("stages")
    asked = bool(source.items("budget.until"))
    return {
        "model": source.text("source.model") or "network",
        "smaller": source.over("original.bytes", "result.bytes"),
        "chain": [source.text(f"{path}.0") for path in source.rows("chain")],
        "budget": ("met" if source.at("budget.reached") is True else "missed") if asked else "none",
        "binds": [str(text) for text in source.items("budget.binds")],
        "undone": bool(stages) and all(source.at(f"{path}.rolled_back") is True for path in stages),
        "limits": limits(source),
        "rows": versus(source),
        "strict": source.at("budget.strict") is True,
    }


# --- the chain --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One step of the ledger."""

    number: int
    method: str
    options: str
    metric: Figure
    span: tuple[Figure, Figure] | None
    drop: Figure
    drop_span: tuple[Figure, Figure] | None
    params: Figure
    nonzeros: Figure
    macs: Figure
    size: Figure
    seconds: Figure
    state: str  # "original", "kept", "rolled back", "result"
    why: str
    notes: tuple[str, ...]
    skipped: int


def ledger(source: Source) -> list[Stage]:
    """The original and every step of the chain."""
    return [_stage(source, 0, "base", "original")] + [
        _stage(source, index + 1, path, _state(source, index, path)) for index, path in enumerate(source.rows("stages"))
    ]


def _state(source: Source, index: int, path: str) -> str:
    if source.at(f"{path}.rolled_back") is True:
        return "rolled back"
    return "result" if source.at("accepted") == index else "kept"


def _stage(source: Source, number: int, path: str, state: str) -> Stage:
    low, high = (source.figure(f"{path}.paired_interval.{end}", "points") for end in (0, 1))
    size = source.figure(f"{path}.size", "bytes")
    if state == "original" and size.value is None:
        size = source.figure("original.bytes", "bytes")
    return Stage(
        number=number,
        method=source.text(f"{path}.method") or state,
        options=told(source.mapping(f"{path}.options")),
        metric=source.figure(f"{path}.metric", "metric"),
        span=span(source, f"{path}.metric_detail"),
        drop=source.figure(f"{path}.drop", "points"),
        drop_span=None if low.value is None or high.value is None else (low, high),
        params=source.figure(f"{path}.params"),
        nonzeros=source.figure(f"{path}.nonzeros"),
        macs=source.figure(f"{path}.macs", "short"),
        size=size,
        seconds=source.figure(f"{path}.seconds", "seconds"),
        state=state,
        why=source.text(f"{path}.why"),
        notes=tuple(str(note) for note in source.items(f"{path}.notes")),
        skipped=len(source.mapping(f"{path}.skipped")),
    )


def charts(source: Source, stages: list[Stage]) -> list[Chart]:
    """Size and metric along the chain."""
    kept = [stage.state != "rolled back" for stage in stages]
    name = source.text("result.metric_detail.name") or "metric"
    spans = [(None, None) if s.span is None else (s.span[0].value, s.span[1].value) for s in stages]
    drawn = (
        chart("size on disk", [Point(s.size, None, None, k) for s, k in zip(stages, kept, strict=True)], may_log=True),
        chart(
            f"{name} on valid",
            [Point(s.metric, *ends, k) for s, ends, k in zip(stages, spans, kept, strict=True)],
            may_log=False,
        ),
    )
    return [one for one in drawn if one is not None]
