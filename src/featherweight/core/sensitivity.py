"""Sensitivity: what pruning one layer alone costs the metric and saves, for a grid of ratios; measured once a process.

A scan is one evaluation for every layer and ratio that differ, without retraining. What was measured is kept in memory
under a hash of the network's state, the validation data and the scores that say what goes first, so that a second
budget, or a second method of the same process, takes it over. It is not written to disk; the report holds its rows.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import log2
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from featherweight.core.progress import track
from featherweight.core.task import Task, evaluate

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""What is tried on every layer."""
REMEMBERED = 8  # scans

Quantity = Literal["units", "macs", "params"]


@dataclass(frozen=True)
class Left:
    """What is left of a whole network.

    Args:
        units: weights, or channels, of the layers that are scanned.
        params: parameters that are not zero.
        macs: multiply-accumulates of one sample; masks leave them as they are.
        bytes: 4 for every parameter that is not zero, and where weights are masked the entropy of where they are.
    """

    units: float
    params: float
    macs: float
    bytes: float


@dataclass(frozen=True)
class Row:
    """One layer alone at one ratio: the metric on the validation data, and what is left of the network."""

    layer: str
    ratio: float
    metric: float
    left: Left


@dataclass(frozen=True)
class Curve:
    """One layer alone, from nothing removed to the most that was tried.

    Args:
        ratios: fractions removed, rising from 0.
        drops: what each costs, in units of the metric: from 0, and never falling, since noise is no gain.
        saved: the fraction of the whole network's quantity that each saves, from 0.
    """

    ratios: tuple[float, ...]
    drops: tuple[float, ...]
    saved: tuple[float, ...]


Allocate = Callable[[Mapping[str, Curve], float], dict[str, float]]
"""(curves by layer, fraction of the whole to be saved) -> the ratio of every layer, one of its curve's."""


@dataclass(frozen=True)
class Sensitivity:
    """A scan: the untouched network's metric and size, and a row for every layer and ratio."""

    name: str
    metric: float
    higher_is_better: bool
    whole: Left
    rows: tuple[Row, ...]

    def curves(self, quantity: Quantity = "units") -> dict[str, Curve]:
        """Every layer's curve, saving counted in `quantity`; ratios that remove nothing more are left out."""
        return {layer: self._curve([row for row in self.rows if row.layer == layer], quantity) for layer in self.layers}

    @property
    def layers(self) -> list[str]:
        """The layers that were scanned, in order."""
        return list(dict.fromkeys(row.layer for row in self.rows))

    def _curve(self, rows: Sequence[Row], quantity: Quantity) -> Curve:
        whole = float(getattr(self.whole, quantity))
        ratios, drops, saved = [0.0], [0.0], [0.0]
        for row in rows:
            worse = self.metric - row.metric if self.higher_is_better else row.metric - self.metric
            gain = 1 - float(getattr(row.left, quantity)) / whole
            if gain > saved[-1]:
                ratios.append(row.ratio)
                drops.append(max(worse, drops[-1]))
                saved.append(gain)
        return Curve(tuple(ratios), tuple(drops), tuple(saved))

    def told(self, chosen: Mapping[str, float]) -> dict[str, Any]:
        """The JSON-able table of a report, with the ratio that was chosen for every layer."""
        layers = [
            {
                "path": layer,
                "chosen": chosen.get(layer),
                "points": [
                    {"ratio": row.ratio, "metric": row.metric, **asdict(row.left)}
                    for row in self.rows
                    if row.layer == layer
                ],
            }
            for layer in self.layers
        ]
        return {"name": self.name, "metric": self.metric, "whole": asdict(self.whole), "layers": layers}


def mask_bytes(size: int, kept: int) -> float:
    """What it takes to say which entries of a weight are kept: the entropy of its mask, in bytes.

    >>> mask_bytes(800, 400)
    100.0
    """
    share = kept / size
    return 0.0 if share in (0, 1) else -size * (share * log2(share) + (1 - share) * log2(1 - share)) / 8


Trial = Callable[[str, float], tuple[nn.Module, Left]]
"""(layer, ratio) -> the network with only that layer pruned, a copy, and what is left of it."""

_known: OrderedDict[Any, Sensitivity] = OrderedDict()


def scan(
    model: nn.Module,
    task: Task,
    whole: Left,
    layers: Sequence[str],
    trial: Trial,
    *,
    scores: Mapping[str, Tensor],
    told: str,
    ratios: Sequence[float] = RATIOS,
) -> Sensitivity:
    """Tries every ratio on every layer alone, evaluated on `task.valid`; taken over if it was measured before.

    Args:
        whole: what there is of the untouched network.
        scores: what the trial goes by.
        told: what else the trial depends on, such as its grain, in words.

    Raises:
        BadData: the validation data are empty, or have no labels.
    """
    key = _key(model, task, scores, [told, *layers, *map(str, ratios)]), task.metric, task.evaluate
    if key not in _known:
        before = evaluate(model, task)
        rows: list[Row] = []
        for layer, ratio in track(
            [(one, r) for one in layers for r in ratios], "sensitivity", len(layers) * len(ratios)
        ):
            smaller, left = trial(layer, ratio)
            last = rows[-1] if rows and rows[-1].layer == layer else Row(layer, 0.0, before.value, whole)
            same = left == last.left  # rounding makes several ratios the same network
            metric = last.metric if same else evaluate(smaller, task, label=f"{layer} at {ratio:.0%}").value
            rows.append(Row(layer, ratio, metric, left))
        _known[key] = Sensitivity(task.metric.name, before.value, task.metric.higher_is_better, whole, tuple(rows))
        while len(_known) > REMEMBERED:
            _known.popitem(last=False)
    _known.move_to_end(key)
    return _known[key]


def _key(model: nn.Module, task: Task, scores: Mapping[str, Tensor], words: Sequence[str]) -> str:
    found = hashlib.sha256("\0".join(words).encode())
    for name, tensor in [*model.state_dict().items(), *scores.items()]:
        _add(found, name, tensor)
    for batch in task.valid:
        for leaf in tree_leaves(list(batch.items()) if hasattr(batch, "items") else batch):
            if isinstance(leaf, Tensor):
                _add(found, "batch", leaf)
    return found.hexdigest()


def _add(found: Any, name: str, tensor: Tensor) -> None:
    found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
