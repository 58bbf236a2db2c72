"""What of a model compression cannot carry, or carries only in part: said before any work is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from featherweight.core.task import as_call, device_of, eval_mode, to_device
from featherweight.core.trace import trace, uncached
from featherweight.core.wired import Wired
from featherweight.core.wiring import hooked
from featherweight.errors import FeatherweightError

SHOWN = 3  # names in one remark


def examine(model: nn.Module, example_inputs: Any) -> list[str]:
    """Remarks on a model, a sentence each; none where everything works.

    Args:
        example_inputs: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
    """
    modules = dict(model.named_modules())
    hooks = [path or "the model" for path, m in modules.items() if hooked(m)]
    extra = [path for path, m in modules.items() if type(m).get_extra_state is not nn.Module.get_extra_state]
    hidden = [f"{p}.{n}".lstrip(".") for p, m in modules.items() for n in m._non_persistent_buffers_set]
    whole = [n for n, p in model.named_parameters() if not p.is_floating_point()]
    found = [
        (hooks, "hooks", "a file without the class holds what they compute; load(into=) does not bring them back"),
        (extra, "extra state that is no tensor", "no file holds it"),
        ([] if isinstance(model, Wired) else hidden, "buffers that are not in the state dict", FRESH),
        (whole, "parameters that are no floats", "they are kept as they are and never compressed"),
    ]
    remarks = [f"{what} at {_named(paths)}: {then}" for paths, what, then in found if paths]
    return remarks + _gradients(model, example_inputs) + _graph(model, example_inputs)


FRESH = "a file holds them for use without the class; load(into=) takes those that the class makes"


def _named(paths: list[str]) -> str:
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(path or "the model" for path in paths[:SHOWN]) + more


def _graph(model: nn.Module, example_inputs: Any) -> list[str]:
    try:
        trace(model, example_inputs)
    except FeatherweightError as error:
        return [f"no channels, exact MACs, ONNX or file without the class: {error}"]
    return []


def _gradients(model: nn.Module, example_inputs: Any) -> list[str]:
    args, kwargs = to_device(as_call(example_inputs), device_of(model))
    with functions() as seen, eval_mode(model), uncached(model):
        try:
            model(*args, **kwargs)
        except Exception:  # the user's code may raise anything: whoever calls the model next says so
            return []
    if not seen:
        return []
    return [
        f"autograd functions of its own ({_named(sorted(seen))}): a file without the class computes their forward "
        "pass, and differentiates that"
    ]


@contextmanager
def functions() -> Iterator[set[str]]:
    """Collects the names of autograd functions, other than ours, that are applied inside the block."""
    seen: set[str] = set()
    own = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("featherweight."):
            seen.add(cls.__name__)
        return own.__func__(cls, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield seen
    finally:
        torch.autograd.Function.apply = own  # type: ignore[method-assign]
