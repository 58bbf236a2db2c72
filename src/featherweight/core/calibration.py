"""Calibration: data that pass through a network while something watches, and what is odd about them, in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import deepcopy
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.core.forms import Form, attach
from featherweight.core.grids import ActivationGrid, Place, Seen
from featherweight.core.ledger import note
from featherweight.core.progress import track
from featherweight.core.task import Batch, Task, eval_mode, length, run
from featherweight.errors import BadData

USUAL = (1 - 0.9999) / 2  # what lies outside of this quantile and its mirror image is no usual value
FEW = 8  # the usual values of an 8-bit grid have at least 1/8 of its steps, or outliers rule it
TWICE = 2.0


def calibrate(model: nn.Module, task: Task, count: int) -> None:
    """Runs at most `count` calibration batches through the model and notes what is odd about them.

    Raises:
        BadData: there are none, they hold NaN or infinite values, or the model does not run on them.
    """
    data = task.calibrating()
    stats = _Stats()
    with eval_mode(model):
        for batch in track(islice(data, count), "calibrate", min(count, length(data) or count)):
            stats.add(task, batch)
            try:
                run(model, task, batch)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                reason = str(error).split("\n")[0]
                raise BadData(
                    f"the model does not run on a calibration batch of shapes {stats.shapes}: {reason}"
                ) from error
    if not stats.batches:
        raise BadData("the calibration data are empty: at least one batch is needed")
    _compare(stats, task)


def observed(model: nn.Module, task: Task, spots: Iterable[tuple[str, str]], count: int) -> dict[tuple[str, str], Seen]:
    """What passes at (module path, "input" or "output") in at most `count` calibration batches; the model stays.

    Raises:
        BadData: there are no batches, they hold NaN or infinite values, or the model does not run on them.
    """
    watched, seen = deepcopy(model), {spot: Seen() for spot in spots}
    for (path, at), watcher in seen.items():
        attach(watched.get_submodule(path), watcher, at)
    calibrate(watched, task, count)
    return seen


class _Stats:
    """Shape, limits, mean and deviation of the float inputs of batches."""

    def __init__(self) -> None:
        self.batches, self.n = 0, 0
        self.sum = self.squares = 0.0
        self.low, self.high = math.inf, -math.inf
        self.shapes: list[tuple[int, ...]] = []

    def add(self, task: Task, batch: Batch) -> _Stats:
        held = _inputs(task, batch)
        self.batches += 1
        self.shapes = [tuple(t.shape) for t in held]
        for value in (t.detach().double() for t in held if t.is_floating_point() and t.numel()):
            low, high = (float(v) for v in torch.aminmax(value))
            if not (math.isfinite(low) and math.isfinite(high)):
                raise BadData(
                    f"calibration batch {self.batches} holds NaN or infinite values: check how the data are prepared"
                )
            self.low, self.high = min(self.low, low), max(self.high, high)
            self.n += value.numel()
            self.sum += float(value.sum())
            self.squares += float(value.square().sum())
        return self

    @property
    def mean(self) -> float:
        return self.sum / max(self.n, 1)

    @property
    def deviation(self) -> float:
        return math.sqrt(max(self.squares / max(self.n, 1) - self.mean**2, 0.0))


def _inputs(task: Task, batch: Batch) -> list[Tensor]:
    args, kwargs, _ = task.split(batch)
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _compare(seen: _Stats, task: Task) -> None:
    """Notes calibration data that are constant, or of another shape or scale than the validation data."""
    if not seen.n:
        return
    if seen.high == seen.low:
        note(f"every calibration input is {seen.low:.4g}: ranges from a constant say nothing, pass real samples")
        return
    batch: Any = next(iter(task.valid), None)
    if batch is None:
        return
    other = _Stats().add(task, batch)
    if [s[1:] for s in seen.shapes] != [s[1:] for s in other.shapes]:
        note(f"calibration batches have the shapes {seen.shapes}, validation batches {other.shapes}")
    wide = max(seen.deviation, other.deviation)
    narrow = min(seen.deviation, other.deviation)
    if other.n and (wide > TWICE * narrow or abs(seen.mean - other.mean) > wide):
        note(
            f"calibration inputs have mean {seen.mean:.3g} and deviation {seen.deviation:.3g}, validation inputs "
            f"{other.mean:.3g} and {other.deviation:.3g}: prepare both alike, or the ranges will not fit"
        )


def remark(places: Iterable[Place], watchers: Iterable[Seen], grids: Iterable[Form]) -> None:
    """Notes places whose range a few outliers rule, and those where nothing but zeros passed."""
    for place, seen, grid in zip(places, watchers, grids, strict=True):
        path, at = place.sites[0]
        if not seen.parts or not isinstance(grid, ActivationGrid):
            continue
        if seen.low == seen.high:
            note(f"the {at} of {path} was {seen.low:.4g} throughout the calibration: its grid is a guess")
            continue
        values = seen.drawn.double()
        low, high = (float(torch.quantile(values, q)) for q in (USUAL, 1 - USUAL))
        levels = grid.high - grid.low + 1
        steps = (high - low) / float(grid.scale)
        if steps < levels / FEW and seen.high - seen.low > FEW * (high - low):
            note(
                f"outliers rule the {at} of {path}: 99.99 % of its values lie in [{low:.3g}, {high:.3g}], which gets "
                f"{max(steps, 0):.0f} of {levels} steps of the range [{seen.low:.3g}, {seen.high:.3g}]; "
                'calibrator="percentile" copes with that'
            )
