"""Dependent quantization: weights on the paths of a trellis, rounded for the coder that writes them.

Heiko Schwarz, Tung Nguyen, Detlev Marpe, Thomas Wiegand, "Hybrid Video Coding with Trellis-Coded Quantization", DCC
2019; Paul Haase et al., "Dependent Scalar Quantization for Neural Network Compression", ICIP 2020, as in the standard
ISO/IEC 15938-17. Two grids, the even and the odd multiples of a step d (zero is in both), take turns: the parity of
each level moves a machine of 4 or 8 states, whose state says which grid the next weight is on. Points lie as densely as
on one grid of step d, and cost as many bits as on one of step 2d. Of all paths the one with the least

    sum of (w / d - q)^2 + lambda * bits

is taken (Viterbi), as in rate-distortion optimised quantization, which is the same without a trellis (`rdoq`).

Departs from the paper: steps follow from one number for the whole network, the loss that may be added: with the
mean curvature h of a layer (diagonal Gauss-Newton), `d = sqrt(2 loss / (n kappa h))` for n weights, so that every layer
adds the same loss per weight; rates are frequencies of levels in groups of like rows and columns, counted anew in
each of three rounds, not the states of the coder; biases and norms stay as they are. `lambda` is the slope of the
rate-distortion curve at high rate, `2 ln 2` times the distortion kappa (in squares of a step).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge
from torch import nn

from featherweight.allowed import Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.curvature import ggn_diagonal
from featherweight.core.forms import attach
from featherweight.core.ledger import note
from featherweight.core.levels import LARGEST, FixedGrid, not_zero
from featherweight.core.site import Site, per_layer
from featherweight.core.study import Study
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task, cross_entropy
from featherweight.core.trellis import quantized
from featherweight.errors import BadOption

KAPPA = {1: 1 / 12, 4: 0.28, 8: 0.27}  # about the mean squared error in squares of a step; a path of no rate has 0.26
NonNegative = Annotated[float, Ge(0)]


@recipe(
    paper="Haase et al., ICIP 2020; ISO/IEC 15938-17",
    family="quantize",
    needs={"labels", "calibration"},
    shrinks={"bits"},
    small={"loss": 0.01, "calibration_batches": 2},
)
def trellis(
    model: nn.Module,
    task: Task,
    *,
    loss: Positive = 0.003,
    states: Literal[4, 8] = 8,
    rate: NonNegative = 0.1,
    calibration_batches: Count = 8,
    where: WhereWeighted = None,
) -> nn.Module:
    """Puts weights on the best paths of a trellis; `fw.save(coder="context_mixing")` codes levels, not points.

    Args:
        loss: by how much the mean loss may grow, foretold from its curvature; a smaller file for a larger one.
        states: of the trellis.
        rate: how much a bit counts, 1 for the slope of the rate-distortion curve (on a LeNet-300-100 the divergence of
            its outputs grew faster than squared error did, and 0.1 was best); 0 for the nearest path.
        calibration_batches: how many batches of the calibration (or training) data to look at.
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: the loss is so small that weights are more than 2^24 steps from zero.
        BadData: weights are not finite.
        CompressionError: every chosen layer is zero.
    """
    return rounded(model, task, loss, states=states, rate=rate, batches=calibration_batches, where=where)


def rounded(
    model: nn.Module, task: Task, loss: float, *, states: int, rate: float, batches: int, where: WhereWeighted
) -> nn.Module:
    """Steps from the curvature, then every layer's weights on the best path."""
    found = not_zero(per_layer(model, "loss", loss, where)[0])
    steps = steps_of(model, task, found, loss, kappa=KAPPA[states], batches=batches)
    for path, site in found.items():
        weight = (site.weight.double() * site.keep).cpu()
        if float(weight.abs().max()) / steps[path] > LARGEST:
            raise BadOption(f"loss={loss} puts weights of {path} more than 2^24 steps from zero: choose a larger one")
        slope = rate * 2 * math.log(2) * KAPPA[states]
        points = torch.from_numpy(quantized(weight.flatten(1).numpy(), steps[path], states, slope)).view(weight.shape)
        put(site, points, steps[path], model)
        note(f"{path}: step {steps[path]:.3g}, {float((points == 0).double().mean()):.1%} zeros")
    return model


def steps_of(
    model: nn.Module, task: Task, found: Mapping[str, Site], loss: float, *, kappa: float, batches: int
) -> dict[str, float]:
    """The step of each layer with which all weights together are foretold to add so much loss, each one as much."""
    draws = 1 if task.loss is cross_entropy else None
    data = Study(model, task, list(found), batches).batches()
    curvature = ggn_diagonal(model, task, found, data, draws=draws)
    mean = {path: float(one.mean()) for path, one in curvature.items()}
    least = 1e-6 * max(mean.values()) or 1e-12  # a layer that no sample moves still gets a step
    count = sum(site.weight.numel() for site in found.values())
    return {path: math.sqrt(2 * loss / (count * kappa * max(one, least))) for path, one in mean.items()}


def put(site: Site, points: torch.Tensor, step: float, root: nn.Module) -> None:
    """Weights at integer multiples of a step of their own type, on a grid that says so."""
    scale = torch.tensor(float(np.float32(step)), dtype=site.weight.dtype, device=site.weight.device)
    with torch.no_grad():
        site.held.copy_((points.to(scale.device).to(scale.dtype) * scale).view_as(site.held))
    most = max(int(points.abs().max()), 1)
    attach(site.module, FixedGrid(scale, -most, most), at=site.name, root=root)
