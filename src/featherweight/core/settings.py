"""Functions with options that users set by name: an ingredient with some of its options filled in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar, get_type_hints

from torch import nn

from featherweight.allowed import admit
from featherweight.errors import unknown

F = TypeVar("F", bound=Callable[..., Any])


def with_settings(function: F, settings: Mapping[str, Any]) -> F:
    """The function with some of its keyword options set.

    Raises:
        UnknownName: it has no such option.
        BadOption: a value that it does not take.
    """
    name, known = name_of(function), keywords(function)
    for key, value in settings.items():
        if key not in known:
            raise unknown(f"option of {name}", key, known)
        admit(key, known[key], value)
    return partial(function, **settings) if settings else function  # type: ignore[return-value]


def keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword options of a function with their annotations; a module has none, as its constructor took them."""
    if isinstance(function, nn.Module):
        return {}
    function = plain(function)
    hints = get_type_hints(function, include_extras=True)
    found = inspect.signature(function).parameters.values()
    return {p.name: hints.get(p.name, Any) for p in found if p.kind is p.KEYWORD_ONLY}


def name_of(function: Callable[..., Any]) -> str:
    """How a function is called, or the kind of a module."""
    function = plain(function)
    return getattr(function, "__name__", type(function).__name__.lower())


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without the options that were set."""
    while isinstance(function, partial):
        function = function.func
    return function
