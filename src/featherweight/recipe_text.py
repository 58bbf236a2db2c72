"""Recipes as text: YAML read as plain data that remembers its lines, and written so that it reads back the same.

Booleans are `true` and `false`, numbers as in YAML 1.2 (`1e-4` is one). Anchors, aliases and merge keys work; tags,
duplicate keys, and texts that are too long, too deep or unfold to too much are refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from featherweight.errors import BadRecipe, FeatherweightError

LONGEST = 100_000  # characters
MOST = 10_000  # values, aliases unfolded
DEEPEST = 32

_TAG = "tag:yaml.org,2002:"
_RULES: list[tuple[str, str, str]] = [  # the core schema of YAML 1.2, and the merge key of 1.1
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN"),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    ("float", r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$", "-+.0123456789"),
    ("merge", r"^<<$", "<"),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - as in the base class


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _RULES:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(_pattern), [*_first, *([""] if _name == "null" else [])])

Place = tuple[str | int, ...]


class Marks:
    """Where every key and value of a text stands: line and column from 1, by its place in the data."""

    def __init__(self, name: str = "") -> None:
        self.name, self.found = name, dict[Place, tuple[int, int]]()

    def told(self, place: Place) -> str:
        """The file, the line and column of the nearest part of a place that the text has, and the place itself."""
        line, column = self.line(place)
        parts = [self.name, f"line {line}, column {column}" if line else "", written(place)]
        return ", ".join(part for part in parts if part)

    def line(self, place: Place) -> tuple[int, int]:
        """Line and column of the nearest part of a place that the text has; (0, 0) if it has none."""
        near = next((place[:end] for end in range(len(place), 0, -1) if place[:end] in self.found), ())
        return self.found.get(near, (0, 0)) if near else (0, 0)

    @contextmanager
    def located(self, *, flags: frozenset[str] = frozenset()) -> Iterator[None]:
        """Adds to an error that knows its place where in the text that is; not where a flag stands above the text."""
        try:
            yield
        except FeatherweightError as error:
            if not error.place or not self.name or error.place[0] in flags:
                raise
            raise type(error)(f"{self.told(error.place)}: {error}") from error


def written(place: Place) -> str:
    """A place as a path.

    >>> written(("chain", 1, "options", "sparsity"))
    'chain[1].options.sparsity'
    """
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Marks]:
    """The data of a file and where they stand.

    Raises:
        BadRecipe: there is no such file, or it is no recipe; with line and column.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise BadRecipe(f"the recipe {path} cannot be read ({reason}): pass a YAML file") from None
    return parse(text, path.name)


def parse(text: str, name: str = "recipe") -> tuple[dict[str, Any], Marks]:
    """The data of a text and where they stand; see `read`."""
    if len(text) > LONGEST:
        raise BadRecipe(f"{name} is longer than {LONGEST:,} characters: that is no recipe")
    marks = Marks(name)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise BadRecipe(f"{name}{where}: this is no YAML: {_reason(error)}") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow has no mark
        raise BadRecipe(f"{name}: this is no YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise BadRecipe(f"{name} is nested too deeply: a recipe has at most {DEEPEST} levels") from None
    data = _Reader(marks).value(node, ()) if node is not None else None
    if not isinstance(data, dict):
        given = "nothing" if data is None else "a list" if isinstance(data, list) else "a single value"
        raise BadRecipe(f"{name} holds {given}: a recipe is a mapping with model:, data: and chain:")
    return data, marks


def _reason(error: yaml.MarkedYAMLError) -> str:
    told = ", ".join(part for part in (error.context, error.problem) if part)
    return told + (": write tabs as spaces" if "\\t" in told else "")


class _Reader:
    """Makes plain data of nodes, counting what aliases unfold to."""

    def __init__(self, marks: Marks) -> None:
        self.marks, self.count, self.constructor = marks, 0, yaml.constructor.SafeConstructor()

    def fail(self, node: Node, place: Place, message: str) -> BadRecipe:
        self.marks.found[place] = (node.start_mark.line + 1, node.start_mark.column + 1)
        return BadRecipe(f"{self.marks.told(place)}: {message}")

    def value(self, node: Node, place: Place) -> Any:
        self.count += 1
        if self.count > MOST:
            raise self.fail(node, place, f"the recipe unfolds to more than {MOST:,} values: use fewer aliases")
        if len(place) > DEEPEST:
            raise self.fail(node, place[:4], f"nested too deeply: a recipe has at most {DEEPEST} levels")
        self.marks.found.setdefault(place, (node.start_mark.line + 1, node.start_mark.column + 1))
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            return self.mapping(node, place)
        if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            return [self.value(item, (*place, index)) for index, item in enumerate(node.value)]
        if isinstance(node, ScalarNode) and node.tag.removeprefix(_TAG) in ("null", "bool", "int", "float", "str"):
            return self.scalar(node, place)
        tag = node.tag.replace(_TAG, "!!")
        raise self.fail(node, place, f"the tag {tag} is not allowed: recipes hold plain values only")

    def scalar(self, node: ScalarNode, place: Place) -> Any:
        try:
            if node.tag == _TAG + "int":
                return int(node.value, 0 if node.value[:2] in ("0x", "0o") else 10)
            if node.tag == _TAG + "float" and not node.value.lower().endswith(("inf", "nan")):
                return float(node.value)
            return self.constructor.construct_object(node)
        except (ValueError, KeyError):
            raise self.fail(node, place, f"{node.value[:40]!r} is no number that can be read") from None

    def mapping(self, node: MappingNode, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: list[Node] = []
        lines: dict[str, int] = {}
        for key, value in node.value:
            if key.tag == _TAG + "merge":
                merged += value.value if isinstance(value, SequenceNode) else [value]
                continue
            if not isinstance(key, ScalarNode):
                raise self.fail(key, place, "a key must be a word, not a list or a mapping")
            name = key.value
            if name in lines:
                message = f"{name} stands here a second time, first in line {lines[name]}: leave one of them"
                raise self.fail(key, (*place, name), message)
            lines[name] = key.start_mark.line + 1
            self.marks.found.setdefault((*place, name), (key.start_mark.line + 1, key.start_mark.column + 1))
            found[name] = self.value(value, (*place, name))
        for one in merged:
            if not isinstance(one, MappingNode):
                raise self.fail(one, place, "<<: merges mappings only")
            found = {**self.value(one, place), **found}  # marked where they are written, unless written again here
        return found


def dump(data: Mapping[str, Any]) -> str:
    """Data as YAML that `parse` reads back the same.

    >>> print(dump({"chain": [{"method": "int8"}], "until": "1e-4", "seed": 3}), end="")
    chain:
    - method: int8
    until: '1e-4'
    seed: 3
    """
    return yaml.dump(plain(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def plain(value: Any) -> Any:
    """Data with dictionaries and lists only, as a reader of YAML or JSON makes them."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value
