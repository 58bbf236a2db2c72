"""Progress of whatever takes long: a bar with the time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

_shown: ContextVar[bool] = ContextVar("progress", default=False)
LINE_EVERY = 10.0  # seconds between two plain lines


@contextmanager
def showing(shown: bool) -> Iterator[None]:
    """Turns progress on or off inside the block; it is off by default, so a library call prints nothing."""
    token = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(token)


def say(text: str) -> None:
    """One line on standard error, when progress is shown."""
    if _shown.get():
        print(text, file=sys.stderr, flush=True)  # noqa: T201 - this is where lines are printed


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yields the items and shows how far they are, with the time that is left."""
    if not _shown.get():
        yield from items
    elif sys.stderr.isatty():
        yield from _bar(items, label, total)
    else:
        yield from _lines(items, label, total)


def _bar(items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield from bar.track(items, total=total, description=label)


def _lines(items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= LINE_EVERY:
            last = now
            left = f", about {(now - start) / done * (total - done):.0f} s left" if total and done else ""
            say(f"{label}: {done}/{total or '?'}{left}")
        yield item
