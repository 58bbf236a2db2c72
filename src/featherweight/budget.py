"""Budgets in the user's units: `size<=1MB`, `latency<=0.5x`, `macs<=2M`, `params<=100k`, `drop<=0.5pt`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from featherweight.errors import BudgetError, unknown

# The units of each quantity as factors to its base: bytes, milliseconds, counts, points of the metric.
UNITS: dict[str, dict[str, float]] = {
    "size": {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30},
    "latency": {"us": 1e-3, "ms": 1, "s": 1e3},
    "macs": {"": 1, "k": 1e3, "m": 1e6, "g": 1e9},
    "params": {"": 1, "k": 1e3, "m": 1e6, "g": 1e9},
    "nonzeros": {"": 1, "k": 1e3, "m": 1e6, "g": 1e9},
    "drop": {"pt": 1},
}
_LIMIT = re.compile(r"^\s*([a-z]+)\s*<=\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Limit:
    """One upper bound: in base units, or relative to the original where `relative`."""

    quantity: str
    value: float
    relative: bool
    text: str

    def allowed(self, original: Mapping[str, float]) -> float:
        """The bound in base units."""
        return self.value * original[self.quantity] if self.relative else self.value

    def excess(self, figures: Mapping[str, float], original: Mapping[str, float]) -> float:
        """What was reached divided by what is allowed: at most 1 where the limit holds."""
        allowed = self.allowed(original)
        got = figures[self.quantity]
        if allowed == 0:
            return 1.0 if got <= 0 else float("inf")
        return max(got, 0.0) / allowed

    def holds(self, figures: Mapping[str, float], original: Mapping[str, float]) -> bool:
        """Whether the figures, in base units, are within the limit."""
        return figures[self.quantity] <= self.allowed(original) + 1e-12

    def told(self, figures: Mapping[str, float], original: Mapping[str, float]) -> str:
        """What was reached against what was asked, in the limit's own unit."""
        got = figures[self.quantity]
        if self.relative:
            return f"{self.quantity} is {got / original[self.quantity]:.4g}x, {self.text} was asked"
        unit = {"size": "bytes", "latency": "ms", "drop": "pt"}.get(self.quantity, "")
        return f"{self.quantity} is {got:.4g} {unit}".rstrip() + f", {self.text} was asked"


def parse(text: str | None) -> tuple[Limit, ...]:
    """The limits of a budget; several are separated by commas and must all hold.

    Raises:
        BudgetError: the text is no budget; the message says what is expected.

    >>> [limit.quantity for limit in parse("size<=0.1x, drop<=0.5pt")]
    ['size', 'drop']
    >>> parse("size<=1MB")[0].value
    1000000.0
    """
    return tuple(_limit(part) for part in text.split(",")) if text else ()


def _limit(text: str) -> Limit:
    found = _LIMIT.match(text)
    if not found:
        raise BudgetError(
            f"{text.strip()!r} is no budget: expected QUANTITY<=NUMBER UNIT, such as size<=1MB or drop<=0.5pt"
        )
    quantity, number, unit = found[1].lower(), float(found[2]), found[3].lower()
    if quantity not in UNITS:
        raise BudgetError(str(unknown("quantity in a budget", quantity, UNITS)))
    if unit == "x" and quantity != "drop":
        return Limit(quantity, number, True, text.strip())
    if unit not in UNITS[quantity]:
        units = ", ".join([u or "a plain number" for u in UNITS[quantity]] + (["x"] if quantity != "drop" else []))
        raise BudgetError(f"{text.strip()!r}: {quantity} is given in {units}")
    return Limit(quantity, number * UNITS[quantity][unit], False, text.strip())
