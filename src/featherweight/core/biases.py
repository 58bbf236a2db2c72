"""Bias correction: rounding shifts the mean of a layer's outputs, and its bias can take that back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from featherweight.core.task import Batch, Task
from featherweight.core.walk import by_channel, inputs_and_outputs, plain, walk


def correct_biases(
    model: nn.Module, original: nn.Module, task: Task, batch: Batch, paths: Sequence[str]
) -> dict[str, float]:
    """Gives every layer's outputs the mean that they have in `original`, channel by channel, first layers first.

    Source: Nagel et al., ICCV 2019, arXiv:1906.04721, sec. 4.3 and appendix D: `b += E[y] - E[y']`, `y'` behind the
    layers that are corrected already.

    Returns:
        The root mean square of what was added, relative to that of the layer's outputs, by path.
    """
    means: dict[str, Tensor] = {}
    sizes: dict[str, Tensor] = {}

    def see(path: str, value: Tensor, output: Tensor) -> None:
        rows = by_channel(original.get_submodule(path), output)
        means[path], sizes[path] = rows.mean(1), rows.square().mean()

    inputs_and_outputs(original, task, batch, paths, see)
    moved: dict[str, float] = {}

    def correct(path: str, layer: nn.Module, value: Tensor) -> None:
        if path in means:
            by = means[path] - by_channel(layer, plain(layer, value)).mean(1)
            add_to_bias(layer, by)
            moved[path] = float((by.square().mean() / sizes[path].clamp_min(1e-30)).sqrt())

    walk(model, task, batch, paths, correct)
    return moved


@torch.no_grad()
def add_to_bias(layer: nn.Module, by: Tensor) -> None:
    """Adds a number to each of a layer's outputs; a layer without a bias gets one."""
    if isinstance(layer.bias, Tensor):
        layer.bias.add_(by.to(layer.bias))
        return
    layer.bias = nn.Parameter(by.detach().to(layer.weight).clone())  # type: ignore[arg-type]
    layer._fw_swapped = True  # type: ignore[assignment]  # the container rebuilds the layer with a bias
