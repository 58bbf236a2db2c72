"""Featherweight makes trained PyTorch networks small and fast, and proves it.

    import featherweight as fw
    result = fw.compress(model, task, "int8")

Every name is imported when it is first used, so that `featherweight --help` does not wait for PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from featherweight.errors import FeatherweightError

if TYPE_CHECKING:
    from featherweight import export, report, runtime, zoo
    from featherweight.catalogue import Entry
    from featherweight.coding import codec, inspect, load, save, unpack
    from featherweight.core.examine import examine
    from featherweight.core.fit import fit
    from featherweight.core.task import Metric, Task, accuracy, evaluate
    from featherweight.core.tracking import tracking
    from featherweight.core.wired import Wired
    from featherweight.core.wiring import wire
    from featherweight.figures import measure
    from featherweight.pipeline import Result, compress
    from featherweight.prune import sensitivity
    from featherweight.running import run
    from featherweight.runtime import accelerate

_WHERE = {
    "Task": "core.task",
    "Metric": "core.task",
    "accuracy": "core.task",
    "evaluate": "core.task",
    "fit": "core.fit",
    "compress": "pipeline",
    "Result": "pipeline",
    "run": "running",
    "tracking": "core.tracking",
    "measure": "figures",
    "sensitivity": "prune",
    "save": "coding",
    "codec": "coding",
    "load": "coding",
    "inspect": "coding",
    "unpack": "coding",
    "accelerate": "runtime",
    "examine": "core.examine",
    "wire": "core.wiring",
    "Wired": "core.wired",
}
_ROOMS = ("export", "report", "runtime", "zoo")

__all__ = [
    "FeatherweightError",
    "Metric",
    "Result",
    "Task",
    "Wired",
    "accelerate",
    "accuracy",
    "codec",
    "compress",
    "evaluate",
    "examine",
    "export",
    "fit",
    "inspect",
    "load",
    "measure",
    "methods",
    "report",
    "run",
    "runtime",
    "save",
    "sensitivity",
    "tracking",
    "unpack",
    "wire",
    "zoo",
]


def methods(kind: str | None = None, family: str | None = None) -> dict[str, Entry]:
    """Every id of the catalogue with its facts, optionally of one kind or family."""
    from featherweight.catalogue import entries

    return entries(kind, family)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(f"featherweight.{_WHERE[name]}"), name)
    elif name in _ROOMS:
        value = import_module(f"featherweight.{name}")
    else:
        raise AttributeError(f"module 'featherweight' has no attribute {name!r}")
    globals()[name] = value
    return value
