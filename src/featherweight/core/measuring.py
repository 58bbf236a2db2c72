"""What methods may ask to be timed, or weighed: whoever stands above the core says how, methods only ask.

`compress` times with ONNX Runtime, and weighs the file that it would write. In a plain call of a method nothing is
timed, and methods that need it say so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from featherweight.core import processes
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

    Of several processes the main one times, and all go by that.

    Raises:
        MissingNeed: nobody times here.
    """
    stopwatch = _stopwatch.get()
    if stopwatch is None:
        raise MissingNeed("this method times networks: run it by compress, or inside core.measuring.timing(stopwatch)")
    return processes.main_only(lambda: stopwatch(original, result, example_inputs))


_scales: ContextVar[Callable[[nn.Module], int] | None] = ContextVar("scales", default=None)


@contextmanager
def weighing(scales: Callable[[nn.Module], int]) -> Iterator[None]:
    """Tells methods inside the block how many bytes the file of a network takes."""
    token = _scales.set(scales)
    try:
        yield
    finally:
        _scales.reset(token)


def weight(model: nn.Module, otherwise: Callable[[nn.Module], int]) -> int:
    """The bytes of a network's file, as whoever runs the method counts them, or as the method does otherwise."""
    return processes.main_only(lambda: (_scales.get() or otherwise)(model))


def interleaved(
    calls: Mapping[str, Callable[[], Any]], *, seconds: float = 2.0, warmup: int = 5, least: int = 30
) -> dict[str, Any]:
    """Times several calls in turn, A B A B ..., so that a machine whose speed drifts does not favour one of them.

    Returns, per name, an array of times in milliseconds; all have the same length (at least `least` rounds).
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: np.array(values) for name, values in times.items()}
