"""Signal to quantization noise, layer by layer: what rounding a layer's weights and its inputs each costs its outputs.

`10 log10(sum y^2 / sum (y' - y)^2)` in decibels; six of them are about a bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, log10
from typing import Any

from torch import Tensor, nn

from featherweight.core.forms import activation_form
from featherweight.core.grids import Place
from featherweight.core.task import Batch, Task
from featherweight.core.walk import inputs_and_outputs, plain


@dataclass(frozen=True)
class Noise:
    """One layer's signal-to-noise ratios in decibels, infinite where nothing is rounded.

    `weights`, `inputs` and `both` feed it what the float network does, and so show its own part alone; `network` is
    what arrives in the quantized network, behind the noise of all layers before it.
    """

    layer: str
    weights: float
    inputs: float
    both: float
    network: float

    def told(self) -> dict[str, Any]:
        """A JSON-able row; None for infinity."""
        return {key: None if value == inf else value for key, value in asdict(self).items()}


def decibels(signal: Tensor, found: Tensor) -> float:
    """The ratio of a signal's power to that of the difference.

    >>> round(decibels(Tensor([1.0, 1.0]), Tensor([1.1, 1.1])), 3)
    20.0
    """
    power, noise = (float(v.double().square().sum()) for v in (signal, found - signal))
    return inf if noise == 0 else 10 * log10(max(power, 1e-300) / noise)


def noises(
    original: nn.Module, quantized: nn.Module, task: Task, batch: Batch, paths: Sequence[str], places: Sequence[Place]
) -> list[Noise]:
    """The noise of every layer on one batch, the worst (by `both`) first.

    Args:
        original: the float network whose layers were quantized.
        places: where grids stand in the quantized network.
    """
    grids = reading(quantized, places)
    arrived: dict[str, Tensor] = {}
    inputs_and_outputs(quantized, task, batch, paths, lambda path, _, output: arrived.update({path: output}))
    rows: list[Noise] = []

    def see(path: str, value: Tensor, output: Tensor) -> None:
        rounded = grids[path](value) if path in grids else value
        layer, exact = quantized.get_submodule(path), original.get_submodule(path)
        found = plain(layer, value), plain(exact, rounded), plain(layer, rounded), arrived.pop(path, output)
        rows.append(Noise(path, *(decibels(output, one) for one in found)))

    inputs_and_outputs(original, task, batch, paths, see)
    return sorted(rows, key=lambda row: row.both)


def reading(model: nn.Module, places: Sequence[Place]) -> Mapping[str, nn.Module]:
    """The grid on which each layer's input lies."""
    found: dict[str, nn.Module] = {}
    for place in places:
        path, at = place.sites[0]
        form = activation_form(model.get_submodule(path), at)
        found |= dict.fromkeys(place.readers, form) if form is not None else {}
    return found
