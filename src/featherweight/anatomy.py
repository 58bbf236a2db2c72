"""What a report shows of every layer: its share of the time, how its weights lie, what it costs the metric alone."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.core.task import Score, Task, drop, eval_mode, evaluate
from featherweight.figures import batched, threads_of_torch

BINS = 40
MOST_DISTINCT = 2**20  # elements above which distinct values are not counted: sorting them takes too long
WARMUP, LEAST, MOST = 2, 3, 200  # rounds of the profile

# --- time -------------------------------------------------------------------------------------------------------------


def shares(model: nn.Module, example_inputs: Any, *, seconds: float = 0.5, threads: int = 1) -> dict[str, Any]:
    """Each module's own share of the time of one call in PyTorch, measured by forward hooks on every module.

    A module's own time is that between its hooks less that of the modules it calls: the path "" and those of blocks
    stand for functions called in their own code. A layer whose `forward` is not called through the module (a fused
    attention's projection) counts with its caller. The hooks' own time is in there: a share is not a latency.

    Returns:
        {"how", "threads", "batch", "runs", "milliseconds", "layers": {path: share}}; shares add up to 1.
    """
    args, kwargs = batched(example_inputs, 1)
    rounds: list[dict[str, float]] = []
    with threads_of_torch(threads), eval_mode(model), _stopwatch(model) as spent:
        end = 0.0
        for count in range(WARMUP + MOST):
            if count == WARMUP:
                end = time.perf_counter() + seconds
            if count >= WARMUP + LEAST and time.perf_counter() >= end:
                break
            spent.clear()
            model(*args, **kwargs)
            if count >= WARMUP:
                rounds.append(dict(spent))
    median = {path: float(np.median([r.get(path, 0.0) for r in rounds])) for path in rounds[0]}
    total = sum(median.values()) or 1.0
    return {
        "how": "PyTorch forward hooks, median of the runs; time of a module less that of the modules it calls",
        "threads": threads,
        "batch": 1,
        "runs": len(rounds),
        "milliseconds": 1e3 * total,
        "layers": {path: value / total for path, value in median.items()},
    }


@contextmanager
def _stopwatch(model: nn.Module) -> Iterator[dict[str, float]]:
    """Adds up the seconds that every module spends in its own code, by path, while the block runs the model."""
    spent: dict[str, float] = defaultdict(float)
    open_calls: list[list[float]] = []  # start, and the time of the modules called since
    handles = []

    def leave(path: str) -> None:
        start, inner = open_calls.pop()
        took = time.perf_counter() - start
        spent[path] += took - inner
        if open_calls:
            open_calls[-1][1] += took

    for path, module in model.named_modules():

        def after(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            leave(path)

        def before(module: nn.Module, args: Any) -> None:
            open_calls.append([time.perf_counter(), 0.0])

        handles += [module.register_forward_pre_hook(before, prepend=True), module.register_forward_hook(after)]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


# --- weights ----------------------------------------------------------------------------------------------------------


def histograms(original: nn.Module, result: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Histograms of the weights of every layer, of the original and of the result, over one range where both have it.

    Returns:
        For each of the two, by path: {"low", "high", "bins", "zeros", "count", "distinct"}. Exact zeros are counted
        apart and are not in the bins; `distinct` is None for a weight too large to sort.
    """
    old, new = _weights(original), _weights(result)
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    for path in {**old, **new}:
        both = [w for w in (old.get(path), new.get(path)) if w is not None]
        low, high = min(float(w.min()) for w in both), max(float(w.max()) for w in both)
        for held, made in ((old, before), (new, after)):
            if path in held:
                made[path] = _histogram(held[path], low, high)
    return before, after


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The weight of each module that owns one, finite values only: its largest floating tensor, once where tied."""
    seen: set[int] = set()
    found = {}
    for path, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point() and p.numel()]
        weight = max(own, key=lambda p: p.numel(), default=None)
        if weight is None or id(weight) in seen:
            continue
        seen.add(id(weight))
        flat = weight.detach().flatten().float().cpu()
        flat = flat[torch.isfinite(flat)]
        if len(flat):
            found[path] = flat
    return found


def _histogram(flat: Tensor, low: float, high: float) -> dict[str, Any]:
    kept = flat[flat != 0]
    span = (low, high) if high > low else (low - 0.5, high + 0.5)
    bins = torch.histc(kept, BINS, *span) if len(kept) else torch.zeros(BINS)
    return {
        "low": span[0],
        "high": span[1],
        "bins": [int(count) for count in bins],
        "zeros": len(flat) - len(kept),
        "count": len(flat),
        "distinct": len(torch.unique(flat)) if len(flat) <= MOST_DISTINCT else None,
    }


# --- sensitivity ------------------------------------------------------------------------------------------------------


def sensitivity(
    original: nn.Module, result: nn.Module, task: Task, before: Score, *, seconds: float, once: float
) -> dict[str, Any]:
    """What every layer costs alone: the drop on `valid` when only it takes its compressed weights in the original.

    Layers are tried from the largest on while the time lasts. Layers that training moved together can look worse alone
    than they are together; layers of another shape or kind than in the original cannot be tried.

    Args:
        before: the original's score on `valid`.
        seconds: how long all of it may take.
        once: seconds that one evaluation took.

    Returns:
        {"how", "why", "layers": {path: points}}; `why` says what is missing, or is empty.
    """
    how = "drop on valid, in points, when this layer alone takes its compressed weights in the original network"
    trial = copy.deepcopy(original).eval()
    pairs = list(_comparable(trial, result))
    found: dict[str, float] = {}
    end = time.perf_counter() + seconds
    for path, mine, theirs in pairs:
        if time.perf_counter() + once > end:
            break
        with _swapped(mine, theirs):
            found[path] = 100 * drop(before, evaluate(trial, task, "valid", f"{path} alone"))
    missing = len(pairs) - len(found)
    why = f"{missing} of {len(pairs)} layers were not tried: {seconds:.2g} s were given, one takes {once:.2g} s"
    return {"how": how, "why": why if missing else "", "layers": found}


def _comparable(
    trial: nn.Module, result: nn.Module
) -> Iterator[tuple[str, Mapping[str, Tensor], Mapping[str, Tensor]]]:
    """Layers with other weights but the same shapes in both, largest first: path, own tensors there and here."""
    kept = dict(result.named_modules())
    rows = [(path, _own(module), _own(kept[path])) for path, module in trial.named_modules() if path in kept]
    for path, mine, theirs in sorted(rows, key=lambda row: -sum(t.numel() for t in row[1].values())):
        same_kind = {k: (t.shape, t.dtype) for k, t in mine.items()} == {
            k: (t.shape, t.dtype) for k, t in theirs.items()
        }
        if mine and same_kind and not all(torch.equal(mine[k], theirs[k]) for k in mine):
            yield path, mine, theirs


def _own(module: nn.Module) -> dict[str, Tensor]:
    held = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return {name: tensor.data for name, tensor in held.items()}


@contextmanager
def _swapped(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[None]:
    """Writes their values into my tensors for the length of the block."""
    before = {name: tensor.clone() for name, tensor in mine.items()}
    try:
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])
        yield
    finally:
        for name, tensor in mine.items():
            tensor.copy_(before[name])


# --- together ---------------------------------------------------------------------------------------------------------


def describe(
    report: dict[str, Any],
    original: nn.Module,
    result: nn.Module,
    was: Mapping[str, Mapping[str, Any]],
    *,
    inputs: Any,
    task: Task,
    before: Score,
    seconds: float,
    once: float,
) -> None:
    """Adds to a report's layers what this room measures, and the rows of layers that the result no longer has.

    Args:
        was: rows of the original's cost by path.
        seconds: for the time profiles of both networks, and again for the sensitivity.
    """
    old_hist, new_hist = histograms(original, result)
    old_time, new_time = (shares(net, inputs, seconds=seconds / 2) for net in (original, result))
    alone = sensitivity(original, result, task, before, seconds=seconds, once=once)
    for row in report["layers"]:
        path = row["path"]
        row |= {"latency_share": new_time["layers"].get(path), "histogram": new_hist.get(path)}
        row["sensitivity"] = alone["layers"].get(path)
        if row["original"] is not None:
            row["original"] |= {"latency_share": old_time["layers"].get(path), "histogram": old_hist.get(path)}
    kept = {row["path"] for row in report["layers"]}
    report["layers_gone"] = [
        {"path": path, **row, "latency_share": old_time["layers"].get(path), "histogram": old_hist.get(path)}
        for path, row in was.items()
        if path not in kept
    ]
    named = kept | set(was)
    report["profile"] = {
        name: {k: v for k, v in told.items() if k != "layers"}
        | {"elsewhere": sum(v for path, v in told["layers"].items() if path not in named)}
        for name, told in (("original", old_time), ("result", new_time))
    }
    report["sensitivity"] = {"how": alone["how"], "why": alone["why"], "tried": len(alone["layers"])}
