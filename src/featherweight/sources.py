"""Networks, data and weights by the words a user types: zoo names, `file.py:function`, `package.module:function`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight import coding, zoo
from featherweight.core.task import Task
from featherweight.errors import BadData, FeatherweightError, UnknownName
from featherweight.zoo.networks import parse_options


def network(spec: str) -> nn.Module:
    """The network of a zoo name (`lenet5`, `resnet:depth=20,width=0.5`), of a function that returns one, or of a file.

    Raises:
        UnknownName: there is no such network, file or function.
        BadData: the function returns something else.
        FormatError: the .fw file is damaged, or holds no graph.
    """
    if spec.endswith(".fw"):
        return coding.load(spec)
    if not is_function(spec):
        return zoo.build(spec)
    made = _called(spec)
    if not isinstance(made, nn.Module):
        raise BadData(f"{spec} returned a {type(made).__name__}: expected a torch.nn.Module")
    return made


def task(spec: str, *, batch_size: int = 128) -> Task:
    """The task of a zoo data set (`mnist5k`, `fashion_mnist:augment=shift+flip`) or of a function.

    The function returns a `Task` or a dictionary of its fields.

    Raises:
        UnknownName: there is no such data set, file or function.
        BadData: the function returns something else, or the data are absent.
    """
    if not is_function(spec):
        name, _, options = spec.partition(":")
        given = parse_options(options) if options else {}
        try:
            return zoo.task(name, **{"batch_size": batch_size, **given})  # type: ignore[arg-type]
        except TypeError as error:
            raise UnknownName(f"data set {name} has no such option: {error}") from None
    made = _called(spec)
    if isinstance(made, dict):
        made = Task(**made)
    if not isinstance(made, Task):
        raise BadData(f"{spec} returned a {type(made).__name__}: expected a featherweight.Task or a dictionary for one")
    return made


def method(spec: str) -> tuple[str, dict[str, Any]]:
    """A method and its options: `magnitude_iterative:sparsity=0.9,schedule=cubic`.

    >>> method("kmeans_share:weight_bits=4")
    ('kmeans_share', {'weight_bits': 4})
    """
    name, _, options = spec.partition(":")
    if is_function(":".join(spec.split(":", 2)[:2])):  # file.py:function:option=value
        inner, _, options = options.partition(":")
        name = f"{name}:{inner}"
    return name, parse_options(options) if options else {}


def save_weights(model: nn.Module, path: Path, made: str = "") -> None:
    """Writes a state dict as safetensors, through a temporary file; tied tensors once each name.

    Args:
        made: how the weights were made, kept in the file (`made_how`).
    """
    from safetensors.torch import save_file

    temporary = path.with_name(f".tmp-{path.name}")
    try:
        save_file(
            {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}, temporary, {"made": made}
        )
        temporary.replace(path)
    except OSError as error:
        raise BadData(f"{path} cannot be written ({error.strerror}): choose another folder") from None


def made_how(path: Path) -> str:
    """What `save_weights` was told about how the weights of a file were made; nothing for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as held:
            return str((held.metadata() or {}).get("made", ""))
    except (OSError, SafetensorError):
        return ""


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Loads a safetensors file or a torch state dict (weights only, never an arbitrary pickle) into a model.

    Raises:
        BadData: the file is absent, is neither, or does not fit the model.
    """
    state = read_weights(Path(path))
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).split("\n")[1:3])
        raise BadData(f"the weights in {path} do not fit the model: {reason}") from None
    return model


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a torch state dict."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise BadData(f"there is no weights file {path}: pass --weights FILE (safetensors or a torch state dict)")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        held = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise BadData(f"{path} is no safetensors file: {error}") from None
    except Exception as error:
        raise BadData(
            f"{path} cannot be read as weights only ({str(error).splitlines()[0][:120]}): save model.state_dict(), "
            "or use safetensors"
        ) from None
    if isinstance(held, dict) and isinstance(held.get("state_dict"), dict):
        held = held["state_dict"]
    if not isinstance(held, dict) or not all(isinstance(v, Tensor) for v in held.values()):
        raise BadData(f"{path} holds no state dict: save model.state_dict()")
    return held


def is_trained(spec: str) -> bool:
    """Whether a network of this word may come with weights of its own: from a file or from the user's function."""
    return spec.endswith(".fw") or is_function(spec)


def is_function(spec: str) -> bool:
    """Whether a word names a function (`file.py:function`) and not a network of the zoo with options."""
    where, colon, name = spec.partition(":")
    return (
        bool(colon)
        and name.isidentifier()
        and "=" not in name
        and (where.endswith(".py") or "." in where or "/" in where)
    )


def _called(spec: str) -> Any:
    """What the user's function returns; what goes wrong in it is told with its place."""
    try:
        return function(spec)()
    except FeatherweightError:
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}, line {where.lineno}"
        raise BadData(f"{spec} failed with {type(error).__name__}: {error} ({place})") from error


def function(spec: str) -> Callable[..., Any]:
    """The function of a word, `file.py:function` or `package.module:function`.

    Raises:
        UnknownName: there is no such file, module or function.
    """
    where, _, name = spec.rpartition(":")
    module = _from_file(Path(where)) if where.endswith(".py") else _from_package(where)
    found = getattr(module, name, None)
    if not callable(found):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UnknownName(f"{where} has no function {name!r}: it has {', '.join(sorted(known)[:8]) or 'none'}")
    return found


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise UnknownName(f"there is no file {path}: pass file.py:function with a path from here")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # a path that ends in .py always has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.parent.resolve()))  # so that it can import its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def _from_package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnknownName(
            f"there is no module {name} ({error}): pass package.module:function or file.py:function"
        ) from None
