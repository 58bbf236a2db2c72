"""Every error that Featherweight raises on purpose. Catch `FeatherweightError` to catch them all.

A message says what was given, what was expected and what to do next, in one sentence: it is all that a user of the
command line sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any


class FeatherweightError(Exception):
    """Root of every error raised on purpose; the command line prints it in one line and exits with code 2.

    `place` is where in a recipe the trouble lies, as far as it is known: `("chain", 1, "options", "sparsity")`.
    """

    place: tuple[str | int, ...] = ()


class UnknownName(FeatherweightError):
    """A method, option, layer pattern, network or data set that does not exist."""


class BadOption(FeatherweightError):
    """A value outside its range or of the wrong type."""


class BadData(FeatherweightError):
    """Data or weights that are absent, empty, not finite or of the wrong shape."""


class MissingNeed(FeatherweightError):
    """A method needs something that the task does not have: labels, training data, calibration data, a teacher."""


class TraceError(FeatherweightError):
    """A model that `torch.export` cannot trace."""


class FormatError(FeatherweightError):
    """A file that is truncated, corrupt, too new, or not of the kind that was expected."""


class BudgetError(FeatherweightError):
    """A budget that cannot be parsed."""


class ExportError(FeatherweightError):
    """A model that cannot be written as ONNX, or whose export disagrees with it."""


class CompressionError(FeatherweightError):
    """A method that touched nothing, or left a model that no longer works."""


class BadRecipe(FeatherweightError):
    """A recipe that cannot be read, or that has several things wrong; each stands on a line of its own."""


@contextmanager
def within(*place: str | int) -> Iterator[None]:
    """Says of an error that leaves the block where it lies: each surrounding block adds what it knows in front."""
    try:
        yield
    except FeatherweightError as error:
        error.place = (*place, *error.place)
        raise


def unknown(kind: str, given: str, known: Iterable[str], hint: str = "") -> UnknownName:
    """An `UnknownName` that suggests the nearest names.

    >>> str(unknown("method", "magnitud", ["magnitude", "fpgm"]))
    "unknown method 'magnitud': did you mean 'magnitude'?"
    """
    names, given = sorted(known), given if len(given) <= 80 and given.isprintable() else f"{given[:80]!a}..."
    near = get_close_matches(given, names, n=3, cutoff=0.5)
    if near:
        advice = "did you mean " + " or ".join(repr(n) for n in near) + "?"
    elif names:
        shown = names if len(names) <= 12 else [*names[:12], "..."]
        advice = "expected one of " + ", ".join(shown)
    else:
        advice = "there is none to choose from"
    return UnknownName(f"unknown {kind} {given!r}: {advice}" + (f" ({hint})" if hint else ""))


def shown(value: Any) -> str:
    """A value from a file in a sentence: short, and without anything that a terminal would obey.

    >>> shown("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..."
    """
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = ascii(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 41 else f"{text[:38]}..."
