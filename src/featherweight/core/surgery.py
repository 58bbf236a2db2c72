"""Choosing layers and changing a model: `targets`, `swap`, `taps`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from featherweight.allowed import alternatives
from featherweight.core.forms import foreign
from featherweight.core.ledger import skip
from featherweight.errors import BadOption, unknown, within

Where = nn.Module | str | type | Callable[[str, nn.Module], bool] | Sequence[Any] | AbstractSet[Any] | None
"""One way to choose layers: a module, an exact name, a glob, `re:...`, a type or its name, a predicate, or several."""

PLAIN: tuple[type[nn.Module], ...] = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Embedding),
)
"""The layers of which `altered` knows what they compute."""

WEIGHTED: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Layers:
    """Marks an option that chooses among the layers of these types; in a recipe, by patterns.

    A mapping given to any other option of such a method has layer patterns for keys.
    """

    types: tuple[type[nn.Module], ...]

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        patterns = {"type": "array", "items": {"type": "string"}, "minItems": 1}
        return {"anyOf": [{"type": "string"}, patterns, {"type": "null"}]}


@dataclass(frozen=True)
class Layer:
    """Marks an option that names one layer, of the network that is compressed or of its teacher."""

    of: Literal["student", "teacher"]


WhereWeighted = Annotated[Where, Layers(WEIGHTED)]
WhereConv2d = Annotated[Where, Layers((nn.Conv2d,))]
WhereLinearOrConv2d = Annotated[Where, Layers((nn.Linear, nn.Conv2d))]
WhereLinearConv2dOrEmbedding = Annotated[Where, Layers((nn.Linear, nn.Conv2d, nn.Embedding))]


def targets(
    model: nn.Module, where: Where = None, types: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
) -> dict[str, nn.Module]:
    """The layers of given types that `where` chooses, by path; all of them when it is None. Shared modules appear once.

    Layers with weights that are of no given type, or whose weight something else computes, are reported as skipped.

    Raises:
        UnknownName: a pattern matches nothing (the nearest paths are named).
        BadOption: the model has no layer of these types, or `where` chooses only layers that cannot be worked on.
    """
    # named_modules yields each shared module once, at its first path
    layers = {path: m for path, m in model.named_modules() if isinstance(m, types)}
    names = " or ".join(t.__name__ for t in types)
    for path, module in model.named_modules():
        if isinstance(module, WEIGHTED) and not isinstance(module, types):
            skip(path, f"a {type(module).__name__}: this method works on {names}")
    refused = {path: reason for path, m in layers.items() if (reason := foreign(m))}
    for path, reason in refused.items():
        skip(path, reason)
    if where is None:
        if not layers:
            raise BadOption(f"the model has no {names} layer, which this method works on: choose another method")
        return _able(layers, refused)
    chosen: dict[str, nn.Module] = {}
    for pattern in where if isinstance(where, (list, tuple, set)) else [where]:
        matched = {path: m for path, m in layers.items() if _matches(pattern, path, m)}
        if not matched:
            raise unknown("layer pattern", str(getattr(pattern, "__name__", pattern)), layers, f"among {names} layers")
        chosen |= matched
    for path in layers.keys() - chosen.keys():
        skip(path, "not chosen by where=")
    return _able({path: m for path, m in layers.items() if path in chosen}, refused)


def patterns(where: Where, options: Mapping[str, Any]) -> Where:
    """What chooses the layers: `where`, or the keys of the option that names its layers itself.

    Raises:
        BadOption: both do.
    """
    for name, value in options.items():
        if isinstance(value, Mapping):
            if where is not None:
                raise BadOption(
                    f"{name} names its layers itself: leave where= out, or pass one {name} for all of where"
                )
            return list(value)
    return where


def find_layers(model: nn.Module, teacher: nn.Module, hints: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuses layers that are not there, for the options that `hints` mark with `Layers` or `Layer`.

    Raises:
        UnknownName: a pattern matches nothing, or a network has no such layer.
        BadOption: there is no layer to work on, or two options name the layers.
    """
    for name, hint in hints.items():
        for mark in (m for one in alternatives(hint) for m in getattr(one, "__metadata__", ()) if isinstance(m, Layer)):
            known = [path for path, _ in (model if mark.of == "student" else teacher).named_modules() if path]
            if options.get(name) is not None and options[name] not in known:
                with within(name):
                    raise unknown(f"layer of the {mark.of}", str(options[name]), known)
        for types in (mark.types for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Layers)):
            named = next((key for key, value in options.items() if isinstance(value, Mapping)), name)
            with within(named):
                targets(model, patterns(options.get(name), options), types)


def _able(layers: dict[str, nn.Module], refused: dict[str, str]) -> dict[str, nn.Module]:
    able = {path: m for path, m in layers.items() if path not in refused}
    if not able:
        path = next(iter(layers))
        raise BadOption(f"no layer that was chosen can be worked on: {path}: {refused[path]}")
    return able


def altered(layer: nn.Module) -> str:
    """Why a layer may not be exchanged for the plain operator of its type, or changed as one; empty if it may.

    A subclass that computes something else (a convolution that standardises its weight) may carry forms all the same.
    """
    kind = next((t for t in PLAIN if isinstance(layer, t)), None)
    if kind is None:
        return f"a {type(layer).__name__} is none of {', '.join(t.__name__ for t in PLAIN)}"
    for name in ("forward", "_conv_forward"):
        if name in vars(layer) or getattr(type(layer), name, None) is not getattr(kind, name, None):
            return f"{type(layer).__name__} computes something else than {kind.__name__}: it has a {name} of its own"
    return ""


def _matches(pattern: Any, path: str, module: nn.Module) -> bool:
    if isinstance(pattern, nn.Module):
        return module is pattern or any(module is m for m in pattern.modules())
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if callable(pattern):
        return bool(pattern(path, module))
    if isinstance(pattern, str) and pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], path) is not None
        except re.error as error:
            raise BadOption(f"layer pattern {pattern!r} is no regular expression: {error}") from None
    return path == pattern or fnmatchcase(path, str(pattern)) or pattern in {t.__name__ for t in type(module).__mro__}


def swap(model: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """Puts `new` in the place of the module at `path`, at every path where that module stands, and returns `new`.

    The place is marked, so that the container can rebuild it inside the user's own class.

    Raises:
        BadOption: the path is the model itself.
    """
    if not path:
        raise BadOption("the whole model cannot be swapped for another inside itself: wrap it in nn.Sequential")
    old = model.get_submodule(path)
    new.train(old.training)
    new._fw_swapped = True  # type: ignore[assignment]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
    return new


@contextmanager
def taps(model: nn.Module, paths: Sequence[str], at: str = "output") -> Iterator[dict[str, Tensor]]:
    """Collects, at every call of the model, the outputs (or inputs) of the modules at these paths.

    Raises:
        UnknownName: a path is no module of the model.
    """
    known = dict(model.named_modules())
    seen: dict[str, Tensor] = {}
    handles = []
    for path in paths:
        if path not in known:
            raise unknown("layer", path, [p for p in known if p])
        handles.append(known[path].register_forward_hook(_tap(seen, path, at)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tap(seen: dict[str, Tensor], path: str, at: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        value = args[0] if at == "input" else output
        seen[path] = value[0] if isinstance(value, tuple) else value

    return hook
