"""A grid on the input of every quantized layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from featherweight.catalogue import ingredient
from featherweight.core.grids import Place
from featherweight.core.task import Task


@ingredient("place")
def layer_inputs(model: nn.Module, task: Task, layers: Mapping[str, nn.Module]) -> list[Place]:
    """One place a layer, each with a grid of its own.

    >>> layer_inputs(nn.Sequential(nn.Linear(2, 2)), None, {"0": nn.Linear(2, 2)})
    [Place(sites=(('0', 'input'),), clamp=(-inf, inf), readers=('0',))]
    """
    return [Place(((path, "input"),), readers=(path,)) for path in layers]
