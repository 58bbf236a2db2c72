"""What methods may ask to be timed: whoever stands above the core says how, methods only ask.

`compress` times with ONNX Runtime. In a plain call of a method nothing is timed, and methods that need it say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn

from featherweight.errors import MissingNeed


@dataclass(frozen=True)
class Timed:
    """Median latency of a network and of another beside it, in one interleaved run."""

    before: float  # milliseconds
    after: float  # milliseconds
    ratio: float  # median over the rounds


Stopwatch = Callable[[nn.Module, nn.Module, Any], Timed]
"""(original, result, example inputs) -> their times."""

_stopwatch: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


@contextmanager
def timing(stopwatch: Stopwatch) -> Iterator[None]:
    """Lets methods inside the block time networks."""
    token = _stopwatch.set(stopwatch)
    try:
        yield
    finally:
        _stopwatch.reset(token)


def latency(original: nn.Module, result: nn.Module, example_inputs: Any) -> Timed:
    """The latency of both, interleaved, at batch 1 on one thread unless whoever runs the method says otherwise.

    Raises:
        MissingNeed: nobody times here.
    """
    stopwatch = _stopwatch.get()
    if stopwatch is None:
        raise MissingNeed("this method times networks: run it by compress, or inside core.measuring.timing(stopwatch)")
    return stopwatch(original, result, example_inputs)
