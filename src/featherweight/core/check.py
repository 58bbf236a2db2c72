"""Checks of option values: each returns the value or raises `BadOption` in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from featherweight.errors import BadOption, unknown


def fraction(name: str, value: float, *, low: float = 0.0, high: float = 1.0) -> float:
    """A fraction removed, in `[low, high)`.

    >>> fraction("sparsity", 1.2)
    Traceback (most recent call last):
    featherweight.errors.BadOption: sparsity=1.2: must be a fraction in [0, 1), for example sparsity=0.5
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value < high:
        raise BadOption(f"{name}={value!r}: must be a fraction in [{low:g}, {high:g}), for example {name}=0.5")
    return float(value)


def whole(name: str, value: int, *, low: int = 0, high: int | None = None) -> int:
    """A whole number in `[low, high]`.

    >>> whole("weight_bits", 40, low=1, high=16)
    Traceback (most recent call last):
    featherweight.errors.BadOption: weight_bits=40: must be a whole number from 1 to 16
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        span = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise BadOption(f"{name}={value!r}: must be a whole number {span}")
    return value


def positive(name: str, value: float, *, zero: bool = False) -> float:
    """A finite number above zero (or at least zero)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 <= value < float("inf")) or (value == 0 and not zero):
        raise BadOption(f"{name}={value!r}: must be a finite number {'of at least' if zero else 'above'} 0")
    return float(value)


def one_of(name: str, value: str, choices: Sequence[str]) -> str:
    """One of a few words."""
    if value not in choices:
        raise unknown(name, str(value), choices)
    return value
