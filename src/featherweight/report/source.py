"""Reading a report: figures that know where they stand in it, and how they are told to a person.

Reports of earlier versions lack some entries, and a report may come from a stranger: whatever is absent, not a number
or not finite is a `Figure` without a value, told as "not measured".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NONE = "not measured"


@dataclass(frozen=True)
class Figure:
    """A number of the page: `source` is the expression over report.json that it is the value of."""

    value: float | None
    text: str
    source: str
    exact: str = ""


class Source:
    """A report as it was read; `prefix` stands before the paths of its figures where a page shows two reports."""

    def __init__(self, root: Mapping[str, Any], prefix: str = "") -> None:
        self.root, self.prefix = root, prefix

    def at(self, path: str) -> Any:
        """The entry at a path such as "stages.0.metric"; None where there is none."""
        here: Any = self.root
        for key in path.split("."):
            if isinstance(here, Mapping):
                here = here.get(key)
            elif isinstance(here, Sequence) and not isinstance(here, str) and key.isdigit() and int(key) < len(here):
                here = here[int(key)]
            else:
                return None
        return here

    def text(self, path: str) -> str:
        """The entry as text; empty where there is none."""
        found = self.at(path)
        return "" if found is None else str(found)

    def mapping(self, path: str) -> Mapping[str, Any]:
        found = self.at(path)
        return found if isinstance(found, Mapping) else {}

    def items(self, path: str) -> list[Any]:
        found = self.at(path)
        return list(found) if isinstance(found, Sequence) and not isinstance(found, str) else []

    def rows(self, path: str) -> list[str]:
        """The paths of the entries of a list."""
        return [f"{path}.{index}" for index in range(len(self.items(path)))]

    def number(self, path: str) -> float | None:
        """The entry as a finite number; None for anything else."""
        found = self.at(path)
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
            return None
        return found

    def figure(self, path: str, kind: str = "count") -> Figure:
        """The number at a path."""
        return _figure(self.number(path), kind, self.prefix + path)

    def over(self, above: str, below: str, kind: str = "times") -> Figure:
        """One number divided by another."""
        top, bottom = self.number(above), self.number(below)
        value = None if top is None or not bottom else top / bottom
        return _figure(value, kind, f"{self.prefix}{above} / {self.prefix}{below}")

    def missing_share(self, part: str, whole: str) -> Figure:
        """What part of the whole is not there: 1 - part / whole."""
        top, bottom = self.number(part), self.number(whole)
        value = None if top is None or not bottom else 1 - top / bottom
        return _figure(value, "share", f"1 - {self.prefix}{part} / {self.prefix}{whole}")


def _figure(value: float | None, kind: str, source: str) -> Figure:
    if value is None:
        return Figure(None, NONE, source)
    text, exact = TELL[kind](value), EXACT[kind](value) if kind in EXACT else ""
    return Figure(value, text, source, "" if exact == text else exact)


# --- telling numbers --------------------------------------------------------------------------------------------------


def told_bytes(value: float) -> str:
    """Bytes in decimal units.

    >>> told_bytes(40056), told_bytes(999), told_bytes(1_724_320)
    ('40.1 kB', '999 B', '1.72 MB')
    """
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def told_short(value: float) -> str:
    """A large count in short.

    >>> told_short(2_293_000), told_short(861)
    ('2.29 M', '861')
    """
    return _scaled(value, ("", "k", "M", "G", "T"))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    place = 0
    while place < len(units) - 1 and abs(value) >= 999.5:
        value, place = value / 1000, place + 1
    digits = f"{value:.0f}" if place == 0 or abs(value) >= 99.95 else f"{value:.1f}" if abs(value) >= 9.995 else ""
    return f"{digits or f'{value:.2f}'} {units[place]}".rstrip()


def told_metric(value: float) -> str:
    """A metric: four decimals, or five significant digits where it is large.

    >>> told_metric(0.9731), told_metric(23456.789)
    ('0.9731', '23457')
    """
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.5g}"


def told_share(value: float) -> str:
    """A share as percents.

    >>> told_share(0.91876), told_share(0)
    ('91.9 %', '0.0 %')
    """
    return f"{100 * value:.1f} %"


def told_times(value: float) -> str:
    """A ratio.

    >>> told_times(42.57), told_times(0.9749), told_times(1)
    ('42.6×', '0.97×', '1.00×')
    """
    return f"{value:.1f}×" if value >= 9.995 else f"{value:.2f}×"


def told_points(value: float) -> str:
    """A signed difference in points.

    >>> told_points(-0.3), told_points(0.0)
    ('−0.30 pt', '0.00 pt')
    """
    sign = "" if f"{abs(value):.2f}" == "0.00" else "+" if value > 0 else "−"
    return f"{sign}{abs(value):.2f} pt"


TELL: dict[str, Callable[[float], str]] = {
    "bytes": told_bytes,
    "count": lambda v: f"{v:,.0f}",
    "short": told_short,
    "metric": told_metric,
    "share": told_share,
    "times": told_times,
    "points": told_points,
    "ms": lambda v: f"{v:.3f} ms" if v < 10 else f"{v:.1f} ms",
    "seconds": lambda v: f"{v:.1f} s",
    "weight": lambda v: f"{v:.3g}",
    "gap": lambda v: f"{v:.2g}",
}
EXACT: dict[str, Callable[[float], str]] = {
    "bytes": lambda v: f"{v:,.0f} bytes",
    "short": lambda v: f"{v:,.0f}",
}
