"""Changes to a wiring: what it does is the same, on other results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from featherweight.core.wired import Fields, Held, Ref, Step, Wiring


@dataclass(frozen=True)
class Pick:
    """Entries of a result along a dimension, those that a buffer names, in the place of that result at some steps."""

    steps: tuple[int, ...]
    result: int
    dim: int
    index: str


def renumbered(value: Any, numbers: Mapping[int, int]) -> Any:
    """A wiring's step or argument, with other numbers for the results that it refers to."""
    match value:
        case Ref():
            return Ref(numbers[value.number])
        case Step():
            return Step(value.target, renumbered(value.args, numbers), renumbered(value.kwargs, numbers))
        case Fields():
            return Fields(value.names, [renumbered(v, numbers) for v in value])
        case dict():
            return type(value)((k, renumbered(v, numbers)) for k, v in value.items())
        case tuple() | list():
            return type(value)(renumbered(v, numbers) for v in value)
    return value


def picking(wiring: Wiring, picks: Sequence[Pick]) -> Wiring:
    """The wiring in which some steps get a part of a result; each part is taken once, before the first of them."""
    first, before = len(wiring.inputs), defaultdict(list)
    for pick in picks:
        before[min(pick.steps)].append(pick)
    numbers = {i: i for i in range(first)}
    parts: dict[tuple[int, int], int] = {}  # (step, result) -> the part that it gets
    made: list[Step] = []
    for i, step in enumerate(wiring.steps):
        for pick in before[i]:
            parts |= {(user, pick.result): first + len(made) for user in pick.steps}
            made.append(Step("aten.index_select.default", (Ref(numbers[pick.result]), pick.dim, Held(pick.index))))
        own = {result: part for (user, result), part in parts.items() if user == i}
        numbers[first + i] = first + len(made)
        made.append(renumbered(step, numbers | own))
    return replace(wiring, steps=tuple(made), output=renumbered(wiring.output, numbers))
