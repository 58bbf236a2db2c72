"""What there is: methods, coders, executors and ingredients, found by walking ROOMS.

Nothing heavy is imported here, so that listing names is cheap; `entries()` imports the rooms it walks.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, TypeVar

from featherweight import allowed
from featherweight.errors import BadOption, UnknownName, unknown, within

F = TypeVar("F", bound=Callable[..., Any])

ROOMS = (
    "featherweight.ingredients",
    "featherweight.recipes",
    "featherweight.coding.coders",
    "featherweight.coding.codecs",
    "featherweight.runtime.executors",
)
VERBS = ("prune", "quantize", "factorize", "share", "distill", "rewrite")


@dataclass(frozen=True)
class Option:
    """One keyword of a method: its name, default, meaning and annotation."""

    name: str
    default: Any
    meaning: str
    hint: Any = field(default=Any, repr=False)

    def schema(self) -> dict[str, Any]:
        """The JSON schema of what a recipe may say, with default and meaning."""
        return {**allowed.schema(self.hint), "default": plain(self.default), "description": self.meaning}


@dataclass(frozen=True)
class Entry:
    """One id of the catalogue with its facts. Calling it calls the method: `entry(model, task, **options)`."""

    id: str
    family: str
    paper: str
    function: Callable[..., Any] = field(repr=False)
    kind: str = "method"
    needs: frozenset[str] = frozenset()
    shrinks: frozenset[str] = frozenset()
    small: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    coder: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    module: str = ""
    slot: str = ""  # of a part: what it fills

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.function(*args, **{**self.defaults, **options})

    @property
    def doc(self) -> str:
        """The first line of the docstring: of the module that makes the method, or of its function."""
        text = inspect.getdoc(self.function) if not self.defaults else sys_module_doc(self.module)
        return (text or "").strip().split("\n")[0]

    def options(self) -> list[Option]:
        """The keyword options that a user may set, with this method's defaults and the meaning in the docstring."""
        meanings, hints = documented(self.function), allowed.hints(self.function)
        found = []
        for name, parameter in inspect.signature(self.function).parameters.items():
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                continue
            default = self.defaults.get(name, parameter.default)
            if callable(default):  # an ingredient that makes this method what it is
                default = getattr(default, "__name__", repr(default))
            default = None if default is inspect.Parameter.empty else default
            found.append(Option(name, default, meanings.get(name, ""), hints.get(name, Any)))
        return found

    def facts(self) -> dict[str, Any]:
        """The JSON-able row of `featherweight methods --json`."""
        return {
            "id": self.id,
            "aliases": list(self.aliases),
            "family": self.family,
            "kind": self.kind,
            "slot": self.slot or None,
            "paper": self.paper,
            "needs": sorted(self.needs),
            "shrinks": sorted(self.shrinks),
            "summary": self.doc,
            "options": [
                {
                    "name": o.name,
                    "default": plain(o.default),
                    "allowed": allowed.told(allowed.schema(o.hint)),
                    "meaning": o.meaning,
                }
                for o in self.options()
            ],
        }


def plain(value: Any) -> Any:
    """A JSON-able view of an option's value."""
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(key): plain(held) for key, held in value.items()}
    return getattr(value, "__name__", repr(value))


def sys_module_doc(module: str) -> str:
    return inspect.getdoc(importlib.import_module(module)) or "" if module else ""


def documented(function: Callable[..., Any]) -> dict[str, str]:
    """The meanings in the `Args:` section of a docstring, one per line (`name: meaning`), continued by indentation."""
    meanings: dict[str, str] = {}
    lines = (inspect.getdoc(function) or "").split("\n")
    inside, last, indent = False, "", 0
    for line in lines:
        if line.strip() == "Args:":
            inside = True
        elif inside and line and not line.startswith(" "):
            break
        elif inside and line.strip():
            depth = len(line) - len(line.lstrip())
            name, colon, meaning = line.strip().partition(": ")
            if colon and name.isidentifier() and (not last or depth <= indent):
                last, indent, meanings[name] = name, depth, meaning
            elif last:
                meanings[last] += " " + line.strip()
    return meanings


def recipe(
    *,
    paper: str,
    family: str,
    kind: str = "method",
    needs: set[str] | None = None,
    shrinks: set[str] | None = None,
    small: Mapping[str, Any] | None = None,
    aliases: tuple[str, ...] = (),
    coder: str | None = None,
    rules: tuple[allowed.Rule, ...] = (),
) -> Callable[[F], F]:
    """Declares a function `(model, task, *, options) -> model` to be a method whose id is the function's name.

    Args:
        paper: authors, venue, year, arXiv number.
        needs: what the task must have: "labels", "train", "calibration", "teacher".
        shrinks: what the contract measures: "weights" (zeros), "bits" (coded bytes), "channels", "factors" (MACs).
        small: options that make the contract tests fast.
        coder: the entropy coder that belongs to the paper, used for the file unless another is asked for.
        rules: what refuses options that do not go together.
    """

    def declare(function: F) -> F:
        function = allowed.checked(*rules)(function)
        function.__entry__ = Entry(  # type: ignore[attr-defined]
            id=function.__name__,
            family=family,
            paper=paper,
            function=function,
            kind=kind,
            needs=frozenset(needs or ()),
            shrinks=frozenset(shrinks or ()),
            small=dict(small or {}),
            aliases=aliases,
            coder=coder,
            module=function.__module__,
        )
        return function

    return declare


def method(
    verb: str,
    *,
    paper: str,
    needs: set[str] | None = None,
    shrinks: set[str] | None = None,
    small: Mapping[str, Any] | None = None,
    aliases: tuple[str, ...] = (),
    coder: str | None = None,
    **defaults: Any,
) -> Entry:
    """The method that a paper describes, made from a verb: the verb by name, the paper's defaults, and its facts.

    Assign it to a module-level name: that name is its id.
    """
    if verb not in VERBS:
        raise unknown("verb", verb, VERBS)
    return Entry(
        id="",
        family=verb,
        paper=paper,
        function=partial(call_verb, verb),
        needs=frozenset(needs or ()),
        shrinks=frozenset(shrinks or ()),
        small=dict(small or {}),
        aliases=aliases,
        coder=coder,
        defaults=defaults,
    )


def call_verb(verb: str, *args: Any, **options: Any) -> Any:
    return verb_function(verb)(*args, **options)


def verb_function(verb: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"featherweight.{verb}"), verb)


def ingredient(slot: str, *, paper: str = "", family: str = "", kind: str = "part", **facts: Any) -> Callable[[F], F]:
    """Declares a pure function that fills one slot of a verb (`score`, `schedule`, `grid`, `rank`, ...).

    Args:
        paper: makes the function an id of the catalogue of its own, of the kind "part": what other ids take as an
            option.
        family: of the part, such as "prune".
        kind: "part", or "block" of what takes the place of a layer.
    """

    def declare(function: F) -> F:
        function.__ingredient__ = (slot, facts)  # type: ignore[attr-defined]
        if paper:
            part = Entry(function.__name__, family, paper, function, kind=kind, module=function.__module__, slot=slot)
            function.__entry__ = part  # type: ignore[attr-defined]
        return function

    return declare


@cache
def _discovered() -> tuple[dict[str, Entry], dict[str, dict[str, Callable[..., Any]]]]:
    entries: dict[str, Entry] = {}
    ingredients: dict[str, dict[str, Callable[..., Any]]] = {}
    for module in _modules():
        for name, value in vars(module).items():
            if isinstance(value, Entry):
                if value.id or name.startswith("_"):
                    continue
                verb = value.function.args[0]  # type: ignore[attr-defined]
                found = replace(value, id=name, function=verb_function(verb), module=module.__name__)
                entries[name] = found
            elif getattr(value, "__module__", None) == module.__name__:
                if hasattr(value, "__entry__"):
                    entries[name] = value.__entry__
                if hasattr(value, "__ingredient__"):
                    ingredients.setdefault(value.__ingredient__[0], {})[name] = value
    entries |= {verb: _verb_entry(verb) for verb in VERBS if importlib.util.find_spec(f"featherweight.{verb}")}
    return dict(sorted(entries.items())), ingredients


def _verb_entry(verb: str) -> Entry:
    """A verb as it is: what runs it chooses all of its ingredients, as no paper did."""
    return Entry(verb, verb, "", verb_function(verb), kind="verb")


def _modules() -> list[Any]:
    found = []
    for room in ROOMS:
        package = importlib.import_module(room)
        found.append(package)
        for info in pkgutil.walk_packages(package.__path__, room + "."):
            found.append(importlib.import_module(info.name))
    return found


def entries(kind: str | None = None, family: str | None = None) -> dict[str, Entry]:
    """Every entry by id, optionally of one kind or family."""
    known = _discovered()[0]
    return {
        i: e for i, e in known.items() if (kind is None or e.kind == kind) and (family is None or e.family == family)
    }


def entry(name: str, kind: str | None = None) -> Entry:
    """The entry of an id or alias; an unknown name is answered with the nearest ones.

    Raises:
        UnknownName: there is no such id.
    """
    known = entries(kind) | (entries("verb") if kind == "method" else {})
    by_alias = {alias: e for e in known.values() for alias in e.aliases}
    if name in known:
        return known[name]
    if name in by_alias:
        return by_alias[name]
    if (part := entries("part").get(name)) is not None:
        takers = ", ".join(list(takers_of(part.slot))[:3])
        raise UnknownName(f"{name} is a part, no {kind}: pass it as an option ({part.slot}={name!r}) to {takers}")
    if kind == "method" and name in entries("block"):
        raise UnknownName(f"{name} is a block, no method: rewrite layers with it (rewrite with block={name!r})")
    if kind == "method" and name in entries("executor"):
        raise UnknownName(f"{name} is an executor, no method: compress first, then accelerate the result")
    if kind == "method" and name in entries("codec"):
        raise UnknownName(f"{name} is a codec for tensors in transit, no method: use featherweight.codec({name!r})")
    raise unknown(kind or "method", name, [*known, *by_alias])


def ingredients(slot: str) -> dict[str, Callable[..., Any]]:
    """What fills a slot, by name."""
    return dict(_discovered()[1].get(slot, {}))


def takers_of(slot: str) -> dict[str, str]:
    """The methods with an option that takes the ingredients of a slot: id -> name of the option; or the verbs."""
    found = {}
    for name, one in (entries("method") | (entries("verb") if slot == "block" else {})).items():
        for option in one.options():
            marks = [mark for hint in allowed.alternatives(option.hint) for mark in getattr(hint, "__metadata__", ())]
            if any(isinstance(mark, Slot) and mark.name == slot for mark in marks):
                found[name] = option.name
    return found


def fill(slot: str, given: str | Callable[..., Any]) -> Callable[..., Any]:
    """The ingredient of a slot: a function as it is, a name looked up.

    Raises:
        UnknownName: no ingredient of that slot has this name.
    """
    if callable(given):
        return given
    known = ingredients(slot)
    if given not in known:
        raise unknown(slot, given, known)
    return known[given]


@dataclass(frozen=True)
class Slot:
    """Marks an option that takes the name of an ingredient: `Annotated[str, Slot("score")] | Score`."""

    name: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.literal_schema(sorted(ingredients(self.name)))


def check_option(found: Entry, name: str, value: Any) -> None:
    """Refuses an option that the method does not have, or a value that it does not take; see `check_options`."""
    names = {option.name for option in found.options()}
    if name not in names:
        with within(str(name)):
            raise unknown(f"option of {found.id}", str(name), names)
    allowed.check_value(found.function, name, value)


def check_options(found: Entry, options: Mapping[str, Any]) -> None:
    """Refuses what the method does not take: an option that it does not have, a value outside its range.

    Raises:
        UnknownName: the method has no such option (the nearest are named), or an option no such word.
        BadOption: a required option is missing, a value is outside its range, or options do not go together.
    """
    for name, value in options.items():
        check_option(found, name, value)
    for name, parameter in inspect.signature(found.function).parameters.items():
        required = parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        if required and name not in options and name not in found.defaults:
            raise BadOption(f"{found.id} needs the option {name}: pass {name}=...")
    allowed.check_together(found.function, {**found.defaults, **options})
