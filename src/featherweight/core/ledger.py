"""What happened to every layer: why one was left alone, and what else a reader of the report should know.

Methods call `skip` and `note` freely; outside of `recording()` both do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Ledger:
    """The remarks of one stage.

    `skipped` maps a layer's path to the reason it was left alone, `tables` hold what a method measured, JSON-able.
    """

    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tables: dict[str, Any] = field(default_factory=dict)


_open: ContextVar[Ledger | None] = ContextVar("ledger", default=None)


@contextmanager
def recording() -> Iterator[Ledger]:
    """Collects what `skip` and `note` are told inside the block."""
    ledger = Ledger()
    token = _open.set(ledger)
    try:
        yield ledger
    finally:
        _open.reset(token)


def skip(path: str, reason: str) -> None:
    """Says why the layer at `path` was left alone."""
    if (ledger := _open.get()) is not None:
        ledger.skipped[path] = reason


def note(text: str) -> None:
    """Says something about the stage as a whole; said once however often it is noted."""
    if (ledger := _open.get()) is not None and text not in ledger.notes:
        ledger.notes.append(text)


def show(name: str, table: Any) -> None:
    """Gives the report of the stage something that a method measured on its way, JSON-able, under a name."""
    if (ledger := _open.get()) is not None:
        ledger.tables[name] = table


def add(name: str, row: Any) -> None:
    """Gives the table of that name, a list, one more row."""
    if (ledger := _open.get()) is not None:
        ledger.tables.setdefault(name, []).append(row)


def is_open() -> bool:
    """Whether anybody listens."""
    return _open.get() is not None
