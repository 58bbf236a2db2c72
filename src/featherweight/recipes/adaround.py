"""AdaRound: whether a weight is rounded up or down is learned, layer by layer, from a few unlabelled samples.

Markus Nagel, Rana Ali Amjad, Mart van Baalen, Christos Louizos, Tijmen Blankevoort, "Up or down? Adaptive rounding for
post-training quantization", ICML 2020, arXiv:2004.10568. With `s` the step of a weight's grid and `f` the activation
behind the layer, eq. 21 to 25:

    W~ = s clip(floor(W / s) + h(V), -top, top),    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)
    min_V |f(W x + b) - f(W~ x^ + b)|^2 + lambda sum (1 - |2 h(V) - 1|^beta)

`x` is the layer's input in the float network and `x^` that behind the layers which are quantized already; `beta` falls
from 20 to 2 by a cosine, after a fifth of the steps without the second term, and drives every `h` to 0 or 1.

Departs from the paper: the first term is divided by what rounding to nearest gives and multiplied by the number of
weights, so that one `lambda` suits all layers and bits; sampled positions of the outputs stand for whole feature maps;
1,000 steps, not 10,000; the bias takes up what mean error is left (Nagel et al., ICCV 2019); activations are on grids
of eight bits while weights are learned, and float with `act_bits=None`. Masked weights stay zero.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from featherweight.allowed import Bits, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.biases import add_to_bias
from featherweight.core.decibels import decibels
from featherweight.core.forms import attach, forms_of, mask_of, originals
from featherweight.core.grids import SymmetricGrid
from featherweight.core.ledger import note, show, skip
from featherweight.core.levels import FixedGrid
from featherweight.core.progress import track
from featherweight.core.reconstruct import gather
from featherweight.core.site import PerLayer, per_layer
from featherweight.core.study import Study
from featherweight.core.surgery import WhereLinearOrConv2d, altered
from featherweight.core.task import Task
from featherweight.core.walk import inputs_and_outputs, joined, plain, walk
from featherweight.quantize import LAYERS, quantize
from featherweight.recipes.int8 import fold, report

Rounded = Annotated[int, Interval(ge=2, le=8)]
BATCH = 256  # rows of one step
WARM = 0.2  # of the steps without the regulariser
HOT, COLD = 20.0, 2.0  # beta
LOW, WIDTH = -0.1, 1.2  # of the rectified sigmoid


@recipe(
    paper="Nagel et al., ICML 2020, arXiv:2004.10568",
    family="quantize",
    needs={"calibration"},
    shrinks={"bits"},
    small={"iterations": 30, "rows": 128, "calibration_batches": 2},
)
def adaround(
    model: nn.Module,
    task: Task,
    *,
    weight_bits: PerLayer[Rounded] = 4,
    act_bits: Bits | None = 8,
    iterations: Count = 1000,
    rows: Count = 2048,
    lr: Positive = 1e-2,
    regularizer: Positive = 0.1,
    calibrator: Literal["minmax", "percentile", "mse", "entropy"] = "minmax",
    calibration_batches: Count = 16,
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Folds batch norms, puts weights and activations on grids, and learns which way each weight is rounded.

    Args:
        weight_bits: bits of a weight, 2 to 8; or layer patterns with bits each.
        act_bits: bits of an activation, or None for float activations.
        iterations: steps of Adam for each layer.
        rows: how many positions of a layer's outputs, over all samples, are learned from.
        lr: learning rate of these steps.
        regularizer: the factor `lambda` of the term that drives every weight to one of its two neighbours.
        calibrator: how a range of activations follows from what was seen; see `int8`.
        calibration_batches: how many batches of the calibration (or training) data to look at.
        where: which layers; all Linear and Conv2d layers when left out.

    Raises:
        CompressionError: nothing is left to quantize.
    """
    fold(model, task)
    original = copy.deepcopy(model)
    chosen = list(per_layer(model, "weight_bits", weight_bits, where, types=LAYERS)[0])
    # 1. Grids: weights with the least squared error, activations between layers as an integer runtime wants them.
    on_grid = {"acts": calibrator, "act_bits": act_bits, "place": "fused"} if act_bits is not None else {"acts": None}
    quantize(
        model,
        task,
        weights="symmetric_mse",
        weight_bits=weight_bits,
        calibration_batches=calibration_batches,
        where=None if isinstance(weight_bits, Mapping) else where,
        **on_grid,
    )
    # 2. What every layer of the float network puts out at some positions, behind its activation.
    batch = joined(task, calibration_batches)
    study = Study(original, task, chosen, calibration_batches)
    wanted: dict[str, Tensor] = {}

    def see(path: str, value: Tensor, output: Tensor) -> None:
        if reason := altered(original.get_submodule(path)):
            skip(path, f"its weights are rounded to nearest: {reason}")
            return
        wanted[path] = sampled(original.get_submodule(path), value, output, rows)[1]

    inputs_and_outputs(original, task, batch, chosen, see)
    # 3. Layer after layer, each behind the rounded ones before it: learn the rounding, then correct the bias.
    table: list[dict[str, Any]] = []
    steps = iter(track(range(len(wanted)), "learn to round", len(wanted)))

    def learn(path: str, layer: nn.Module, value: Tensor) -> None:
        if path in wanted:
            next(steps)
            seen, _ = sampled(layer, value, plain(layer, value), rows)
            rounding = Rounding.of(layer)
            target = wanted.pop(path)
            act = partial(study.activated, path)
            h = learned(rounding, seen, target, act, iterations=iterations, lr=lr, by=regularizer)
            before, after = (rounding.outputs(seen, one) for one in (rounding.nearest(), h))
            found = {name: decibels(act(target), act(one)) for name, one in (("nearest", before), ("learned", after))}
            table.append({"layer": path, **found})
            rounding.put(layer, h, model)
            add_to_bias(layer, (target - after).mean(0))

    walk(model, task, batch, chosen, learn)
    # 4. What came of it.
    show("rounding", table)
    gains = sorted(row["learned"] - row["nearest"] for row in table)
    if gains:
        note(
            f"the rounding of {len(table)} layers was learned: it gains {gains[len(gains) // 2]:.1f} dB on rounding to "
            f"nearest (median; from {gains[0]:.1f} to {gains[-1]:.1f})"
        )
    if act_bits is not None:
        report(original, model, task, chosen)
    return model


def sampled(layer: nn.Module, value: Tensor, output: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Inputs (rows, columns of all groups) and outputs (rows, outputs) of a layer at sampled positions, the same ones
    at every call."""
    positions = max(1, math.ceil(rows / len(value)))
    found = list(gather(layer, value, output, positions, torch.Generator().manual_seed(0)))
    x, y = (torch.cat([part[i].float() for part in found]) for i in (0, 1))
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:rows]
    return x[chosen], y[chosen]


@dataclass(frozen=True)
class Rounding:
    """A layer's weight between two integers: `step * clip(floor + h)`, all of shape (groups, outputs, columns)."""

    floor: Tensor
    rest: Tensor
    step: Tensor
    top: int
    bias: Tensor
    keep: Tensor

    @staticmethod
    def of(layer: nn.Module) -> Rounding:
        """From the grid that stands on the layer's weight."""
        grid = next(form for form in forms_of(layer) if isinstance(form, SymmetricGrid))
        weight, mask = originals(layer, "weight")[0].detach(), mask_of(layer)
        keep = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
        step = grid.scale(weight, mask).view(-1, *[1] * (weight.dim() - 1)).expand_as(weight)
        whole = (weight / step).clamp(-grid.top, grid.top)
        groups = getattr(layer, "groups", 1)
        floor, rest, step, keep = (
            v.reshape(groups, len(weight) // groups, -1) for v in (whole.floor(), whole - whole.floor(), step, keep)
        )
        bias = layer.bias.detach() if isinstance(layer.bias, Tensor) else weight.new_zeros(len(weight))
        return Rounding(floor, rest, step, grid.top, bias, keep)

    def nearest(self) -> Tensor:
        """The `h` of rounding to nearest."""
        return self.rest.round()

    def weight(self, h: Tensor) -> Tensor:
        """The weight, (groups, outputs, columns)."""
        return (self.floor + h).clamp(-self.top, self.top) * self.step * self.keep

    def outputs(self, x: Tensor, h: Tensor) -> Tensor:
        """What the layer puts out of rows (rows, columns of all groups): (rows, outputs)."""
        weight = self.weight(h)
        if len(weight) == 1:
            return F.linear(x, weight[0], self.bias)
        return torch.einsum("rgc,goc->rgo", x.view(len(x), len(weight), -1), weight).flatten(1) + self.bias

    @torch.no_grad()
    def put(self, layer: nn.Module, h: Tensor, model: nn.Module) -> None:
        """Fixes the integers that were found in the layer."""
        held = originals(layer, "weight")[0]
        grid = next(form for form in forms_of(layer) if isinstance(form, SymmetricGrid))
        scale = grid.scale(held, mask_of(layer))
        held.copy_(self.weight(h).view_as(held))
        attach(layer, FixedGrid(scale, -self.top, self.top, axis=0 if scale.dim() else None), root=model)


def soft(v: Tensor) -> Tensor:
    """The rectified sigmoid: 0 or 1 exactly for large `v`.

    >>> soft(torch.tensor([-9.0, 0.0, 9.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    return (v.sigmoid() * WIDTH + LOW).clamp(0, 1)


def learned(
    rounding: Rounding, x: Tensor, target: Tensor, activated: Any, *, iterations: int, lr: float, by: float
) -> Tensor:
    """Which weights are rounded up (0 or 1): never worse, on the rows that it learns from, than rounding to nearest.

    Args:
        x: rows of inputs behind what is quantized already.
        target: rows of the float layer's outputs.
        activated: what the network does with them next.
        by: the regulariser's factor.
    """
    wanted = activated(target)

    def error(h: Tensor, at: slice | Tensor = slice(None)) -> Tensor:
        return (activated(rounding.outputs(x[at], h)) - wanted[at]).square().sum(1).mean()

    nearest = rounding.nearest()
    unit = rounding.rest.numel() / error(nearest).clamp_min(1e-30)
    with torch.enable_grad():
        v = (((rounding.rest - LOW) / WIDTH).logit()).requires_grad_()
        adam = torch.optim.Adam([v], lr=lr)
        generator = torch.Generator().manual_seed(0)
        for step in range(iterations):
            at = torch.randint(len(x), (min(BATCH, len(x)),), generator=generator)
            h = soft(v)
            loss = unit * error(h, at)
            if (done := step / iterations) > WARM:
                beta = COLD + (HOT - COLD) * (1 + math.cos(math.pi * (done - WARM) / (1 - WARM))) / 2
                loss = loss + by * (1 - (2 * h - 1).abs().pow(beta)).sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
    found = (soft(v.detach()) >= 0.5).float()
    return found if float(error(found)) < float(error(nearest)) else nearest
