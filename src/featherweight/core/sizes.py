"""Expressions on the sizes of inputs, as nested tuples: ("eq", ("mod", ("size", input, dimension), 4), 0)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import product
from typing import Any

import numpy as np

from featherweight.core.operators import PLAIN, SIZES
from featherweight.errors import BadData, TraceError

NAMES = {
    "Add": "add", "Mul": "mul", "Pow": "pow", "PowByNatural": "pow", "FloorDiv": "floordiv", "CleanDiv": "floordiv",
    "Mod": "mod", "PythonMod": "mod", "Equality": "eq", "Unequality": "ne", "StrictLessThan": "lt", "LessThan": "le",
    "StrictGreaterThan": "gt", "GreaterThan": "ge", "Max": "max", "Min": "min", "And": "and", "Or": "or", "Not": "not",
    "IntTrueDiv": "truediv", "FloatTrueDiv": "truediv", "CeilToInt": "ceil", "ceiling": "ceil", "FloorToInt": "floor",
    "floor": "floor", "TruncToInt": "trunc", "ToFloat": "float",
}  # fmt: skip


def expression(expr: Any, symbols: Mapping[Any, Any]) -> Any:
    """A symbolic expression of torch as nested tuples.

    Raises:
        TraceError: it holds a function or a symbol that a file has no word for.
    """
    if expr in symbols:
        return symbols[expr]
    if expr.is_Integer or expr is True or expr is False or (expr.is_Boolean and not expr.args):
        return bool(expr) if expr.is_Boolean else int(expr)
    if expr.is_Float or expr.is_Rational:
        return float(expr)
    name = NAMES.get(type(expr).__name__)
    if name is None or not expr.args:
        raise TraceError(f"the model's sizes depend on {expr}, which a file cannot hold")
    inner = [expression(arg, symbols) for arg in expr.args]
    if name in ("add", "mul") and len(inner) > 2:
        found = inner[0]
        for part in inner[1:]:
            found = (name, found, part)
        return found
    return (name, *inner)


def evaluate_size(expression: Any, sizes: Sequence[Sequence[Any]]) -> Any:
    """The value of an expression on the sizes of inputs; False where it has none (a division by zero).

    >>> evaluate_size(("eq", ("mod", ("size", 0, 1), 4), 0), [(2, 12)])
    True
    >>> evaluate_size(("eq", ("mod", 4, ("size", 0, 0)), 0), [(0, 12)])
    False
    """
    try:
        return _value(expression, sizes)
    except BadData:
        return False


def _value(expression: Any, sizes: Sequence[Sequence[Any]]) -> Any:
    if not isinstance(expression, tuple):
        return expression
    name, *rest = expression
    if name == "size":
        return sizes[rest[0]][rest[1]]
    return SIZES[name](*(_value(inner, sizes) for inner in rest))


SIGNS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "truediv": "/", "pow": "**",
}  # fmt: skip


def told(expression: Any) -> str:
    """An expression on sizes for people.

    >>> told(("eq", ("mod", ("size", 0, 2), 4), 0))
    'size 2 of input 0 % 4 == 0'
    """
    if not isinstance(expression, tuple):
        return str(expression)
    name, *rest = expression
    if name == "size":
        return f"size {rest[1]} of input {rest[0]}"
    tight = name in ("mul", "floordiv", "mod", "truediv", "pow")
    parts = [f"({told(r)})" if tight and isinstance(r, tuple) and r[0] in ("add", "sub") else told(r) for r in rest]
    return f" {SIGNS[name]} ".join(parts) if name in SIGNS else f"{name}({', '.join(parts)})"


# --- which of them say something --------------------------------------------------------------------------------------

MANY = 1 << 14  # combinations of sizes that are tried
ARRAYS: dict[str, Callable[..., Any]] = {
    **PLAIN,
    "and": lambda *parts: reduce(np.logical_and, parts),
    "or": lambda *parts: reduce(np.logical_or, parts),
    "not": np.logical_not,
    "max": lambda *parts: reduce(np.maximum, parts),
    "min": lambda *parts: reduce(np.minimum, parts),
    "ceil": np.ceil,
    "floor": np.floor,
    "trunc": np.trunc,
    "float": lambda value: value * 1.0,
    "pow": lambda base, exponent: np.asarray(base, dtype=np.float64) ** exponent,
}


def independent(conditions: Sequence[Any], sizes: Sequence[Sequence[int]]) -> tuple[Any, ...]:
    """Without the conditions that hold wherever the others do, the longest first, as far as a grid of sizes can tell.

    The grid has every size up to twice the one that was traced, and the neighbours of powers of two beyond.
    """
    used = sorted({place for c in conditions for place in places(c)})
    if not used or len(conditions) < 2:
        return tuple(conditions)
    grid = _grid([int(sizes[i][d]) for i, d in used])
    held: dict[int, dict[int, Any]] = {}
    for column, (i, d) in enumerate(used):
        held.setdefault(i, {})[d] = grid[:, column]
    with np.errstate(all="ignore"):
        true = [np.broadcast_to(np.asarray(_on_arrays(c, held), dtype=bool), len(grid)) for c in conditions]
    kept = list(range(len(conditions)))
    for number in sorted(kept, key=lambda n: -len(str(conditions[n]))):
        others = [n for n in kept if n != number]
        if others and bool(true[number][np.logical_and.reduce([true[n] for n in others])].all()):
            kept = others
        elif not others and bool(true[number].all()):
            kept = []
    return tuple(conditions[n] for n in kept)


def places(expression: Any) -> Iterator[tuple[int, int]]:
    """The (input, dimension) that an expression reads."""
    if isinstance(expression, tuple):
        if expression[0] == "size":
            yield expression[1], expression[2]
        else:
            for part in expression[1:]:
                yield from places(part)


def _grid(traced: Sequence[int]) -> Any:
    """Combinations of sizes: all of those that are worth trying, or a seeded choice of them."""
    powers = [2**k + d for k in range(1, 18) for d in (-1, 0, 1)]
    each = [np.unique([*range(1, 2 * n + 9), *powers]) for n in traced]
    if np.prod([float(len(e)) for e in each]) <= MANY:
        return np.array(list(product(*each)))
    generator = np.random.default_rng(0)
    return np.stack([generator.choice(e, MANY) for e in each], 1)


def _on_arrays(expression: Any, held: Mapping[int, Mapping[int, Any]]) -> Any:
    if not isinstance(expression, tuple):
        return expression
    name, *rest = expression
    if name == "size":
        return held[rest[0]][rest[1]]
    return ARRAYS[name](*(_on_arrays(inner, held) for inner in rest))
