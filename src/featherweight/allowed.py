"""What the options of a method may be: kinds of values with their ranges, checked before any work is done.

An option's annotation is the one place that says it. `checked` holds callers in Python to it, the catalogue whole
chains before the first method starts, and `schema` the editors of recipes.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from functools import cache, wraps
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval
from pydantic import BeforeValidator

from featherweight.errors import BadOption, unknown, within

F = TypeVar("F", bound=Callable[..., Any])
Rule = Callable[[Mapping[str, Any]], None]
"""Refuses options that do not go together; it is given all of them, defaults included."""

Fraction = Annotated[float, Interval(ge=0, lt=1)]
"""What is removed: never everything."""
Share = Annotated[float, Interval(ge=0, le=1)]
Positive = Annotated[float, Gt(0)]
Amount = Annotated[float, Ge(0)]
"""Epochs, and weights of loss terms."""
Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]
"""How many of something, perhaps none."""
Bits = Annotated[int, Interval(ge=1, le=16)]

File = Annotated[str, BeforeValidator(lambda given: os.fspath(given) if isinstance(given, os.PathLike) else given)]
"""Where a file or a folder stands, as text or as a path."""


def checked(*rules: Rule) -> Callable[[F], F]:
    """Checks the options of every call against their annotations and, together, by the rules.

    Raises:
        BadOption: a value outside its range, of the wrong type, or refused by a rule.
        UnknownName: a word that is none of those allowed.
    """

    def declare(function: F) -> F:
        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            for name, value in options.items():
                check_value(call, name, value)
            check_together(call, options)
            return function(*args, **options)

        call.__rules__ = rules  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return declare


def check_value(function: Callable[..., Any], name: str, value: Any) -> None:
    """Refuses the value of an option that a `checked` function does not allow."""
    known = hints(function)
    if name in known:
        with within(name):
            admit(name, known[name], value)


def check_together(function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuses options that a `checked` function does not allow together."""
    for rule in getattr(function, "__rules__", ()):
        rule({**_defaults(function), **options})


def hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of the keyword options of a `checked` function; none of any other."""
    return _hints(function) if hasattr(function, "__rules__") else {}


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    found = get_type_hints(function, include_extras=True)
    return {name: found[name] for name in _defaults(function, every=True) if name in found}


def _defaults(function: Callable[..., Any], *, every: bool = False) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    return {p.name: p.default for p in keywords if every or p.default is not p.empty}


def admit(name: str, hint: Any, value: Any) -> None:
    """Refuses a value that an annotation does not allow.

    >>> admit("sparsity", Fraction | Mapping[str, Fraction], {"conv1": 1.2})
    Traceback (most recent call last):
    featherweight.errors.BadOption: sparsity['conv1']=1.2: must be a fraction in [0, 1)
    >>> from typing import Literal
    >>> admit("scope", Literal["layer", "global"], "globl")
    Traceback (most recent call last):
    featherweight.errors.UnknownName: unknown scope 'globl': did you mean 'global'?
    """
    from pydantic import ValidationError

    try:
        _adapter(hint).validate_python(value)
    except ValidationError:
        inner = next((get_args(h)[1] for h in alternatives(hint) if get_origin(h) is Mapping), None)
        if inner is not None and isinstance(value, Mapping):
            for key, held in value.items():
                with within(key):
                    admit(f"{name}[{key!r}]", inner, held)
        found = schema(hint)
        if isinstance(value, str) and (words := _words(found)):
            raise unknown(name, value, words) from None
        given = text if len(text := repr(value)) <= 80 else text[:77] + "..."
        raise BadOption(f"{name}={given}: must be {told(found)}") from None


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union; anything else is its only member."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


@cache
def _adapter(hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, strict=True, allow_inf_nan=False))


def schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of what a recipe may say; {} where only Python can say it."""
    from pydantic.errors import PydanticInvalidForJsonSchema

    try:
        return dict(_adapter(hint).json_schema())
    except PydanticInvalidForJsonSchema:
        return {}


def told(found: Mapping[str, Any]) -> str:
    """A JSON schema in words.

    >>> told(schema(Bits | Mapping[str, Bits]))
    'a whole number from 1 to 16, or a mapping with a whole number from 1 to 16 for each layer pattern'
    """
    if "anyOf" in found:
        return ", or ".join(told(one) for one in found["anyOf"] if one.get("type") != "null")
    if words := _words(found):
        return "one of " + ", ".join(words) if len(words) > 1 else words[0]
    match found.get("type"):
        case "integer" | "number":
            return _number(found)
        case "object" if found.get("additionalProperties") is True:
            return "a mapping"
        case "object":
            return f"a mapping with {told(found.get('additionalProperties', {}))} for each layer pattern"
        case kind:
            such = f" such as {', '.join(found['examples'])}" if "examples" in found else ""
            return _PLAIN.get(kind or "", "a Python object") + such


_PLAIN = {"array": "a list", "boolean": "true or false", "string": "text", "null": "nothing"}


def _words(found: Mapping[str, Any]) -> list[str]:
    """The words that a schema lists, of all alternatives."""
    listed = [*found.get("enum", ()), *([found["const"]] if "const" in found else ())]
    return [*map(str, listed), *(word for one in found.get("anyOf", ()) for word in _words(one))]


def _number(found: Mapping[str, Any]) -> str:
    low, above = found.get("minimum"), found.get("exclusiveMinimum")
    high, below = found.get("maximum"), found.get("exclusiveMaximum")
    if found["type"] == "integer":
        span = f" from {low} to {high}" if high is not None else f" of at least {low}" if low is not None else ""
        return "a whole number" + span
    if high is None and below is None:
        span = f" above {above}" if above is not None else f" of at least {low}" if low is not None else ""
        return "a finite number" + span
    start, end = f"[{low}" if above is None else f"({above}", f"{high}]" if below is None else f"{below})"
    return f"a {'fraction' if (high or below) == 1 else 'number'} in {start}, {end}"
