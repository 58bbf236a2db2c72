"""Dependent quantization: weights on the paths of a trellis, rounded for the coder that writes them, with feedback.

Heiko Schwarz, Tung Nguyen, Detlev Marpe, Thomas Wiegand, "Hybrid Video Coding with Trellis-Coded Quantization", DCC
2019; Paul Haase et al., "Dependent Scalar Quantization for Neural Network Compression", ICIP 2020, as in the standard
ISO/IEC 15938-17. Two grids, the even and the odd multiples of a step d (zero is in both), take turns: the parity of
each level moves a machine of 4 or 8 states, whose state says which grid the next weight is on. Points lie as densely as
on one grid of step d, and cost as many bits as on one of step 2d. Of all paths the one with the least

    cost of the errors + lambda * bits

is taken (Viterbi), as in rate-distortion optimised quantization, which is the same without a trellis (`rdoq`).

Departs from the paper: there errors cost their squares and layers stand alone.

- The errors e of a row of a layer's weights cost `1/2 g e H e'`, with the Kronecker factors of the loss's curvature
  (`core/layer_error`), and each path feeds its errors into the weights that it has not rounded yet: the feedback of
  GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323), path by path (`core/trellis`). The bias comes last and takes back
  what the errors do to the mean.
- Layers are rounded in the order in which they run. Each is first fitted, by least squares with a ridge, to put out of
  what the layers before it now give it what the original layer gave (as in GPTAQ, Li et al., ICML 2025,
  arXiv:2504.02692); its moments are taken over at most 64 positions of a sample.
- Batch norms are folded first, where that is legal; biases of layers are put on a grid of their own.
- One number for the whole network, the loss that may be added, sets the slope `lambda = 2 ln 2 loss / n` for n weights
  at which every layer trades error for bits, and steps follow: those of the rate-distortion curve at high rate for the
  weights that are not about to become zero, rows with a larger g on finer ones by powers of the root of two. How
  far steps are from this formula (`WIDER`) was chosen on a ResNet-20 and a LeNet-300-100, `rate` on the latter.
- Rates are frequencies of levels in groups of like rows and columns, counted anew in each of three rounds, not the
  states of the coder.
- A layer whose weights are no product with columns of its inputs (a transposed convolution, one that code uses without
  calling it) has errors that cost their squares times its mean curvature.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, final

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from torch import Tensor, nn

from featherweight.allowed import Count, Positive
from featherweight.budget import parse
from featherweight.catalogue import recipe
from featherweight.coding.container import bare_bytes
from featherweight.core.cost import raw_bytes
from featherweight.core.curvature import ggn_diagonal, some_batches
from featherweight.core.fold import NORMS, fold_batchnorm
from featherweight.core.forms import along, attach, bake, has_forms
from featherweight.core.layer_error import Curvature, curvatures, joint_moments, no_columns
from featherweight.core.ledger import Ledger, note, recording, skip
from featherweight.core.levels import LARGEST, FixedGrid, not_zero
from featherweight.core.measuring import weight
from featherweight.core.site import Site, per_layer
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task, cross_entropy, drop, evaluate
from featherweight.core.trellis import Floats, Ints, Metric, quantized
from featherweight.core.walk import beside, joined, plain
from featherweight.errors import BadOption, TraceError

KAPPA = {1: 1 / 12, 4: 0.28, 8: 0.27}  # about the mean squared error in squares of a step; a path of no rate has 0.26
WIDER = 1.6  # than the step of the formula
DRAWS = 2  # classes of each sample for the curvature
ALIKE = 0.5  # share of the curvature that counts all samples alike
APART, OUTWARD, CLOSER, MOST = 8.0, 5, 5, 3.0  # the search: factor, steps outward and inward, the largest loss
DAMPING = 0.01  # of the mean diagonal of moments, added to it
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
    within: str | None = None,
    states: Literal[4, 8] = 8,
    rate: NonNegative = 1.0,
    calibration_batches: Count = 8,
    where: WhereWeighted = None,
) -> nn.Module:
    """Puts weights on the best paths of a trellis; `fw.save(coder="context_mixing")` codes levels, not points.

    Args:
        loss: by how much the mean loss may grow, foretold from its curvature; a smaller file for a larger one.
        within: in place of a loss: the least one whose file is small enough, such as "size<=40kB", or the largest one
            with which the metric on the validation data falls by no more, such as "drop<=0.5pt". `compress` says so of
            its own budget. Sizes are those of the file that it writes, in a plain call those of a bare file with
            context mixing.
        states: of the trellis.
        rate: how much a bit counts, 1 for the slope of the rate-distortion curve; 0 for the nearest path.
        calibration_batches: how many batches of the calibration (or training) data to look at.
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: the loss is so small that weights are more than 2^24 steps from zero.
        BadData: weights are not finite.
        CompressionError: every chosen layer is zero.
    """

    def at(one: nn.Module, much: float) -> nn.Module:
        return rounded(one, task, much, states=states, rate=rate, batches=calibration_batches, where=where)

    return at(model, loss) if within is None else aimed(model, task, within, at)


def aimed(model: nn.Module, task: Task, within: str, at: Callable[[nn.Module, float], nn.Module]) -> nn.Module:
    """The network at the loss with which a budget just holds; if none does, the nearest, and what binds is noted.

    Bytes and points are about straight lines over the logarithm of the loss: between a loss that is too small and one
    that is too large, the next one is on that line.

    Raises:
        BadOption: the budget is of something else than the size or the drop, or of both.
    """
    limits = parse(within)
    if len(limits) != 1 or limits[0].quantity not in ("size", "drop"):
        raise BadOption(
            f'within={within!r}: choose one of a size, such as "size<=40kB", and a drop, such as "drop<=0.5pt"'
        )
    limit, before = limits[0], evaluate(model, task)
    allowed = limit.allowed({"size": raw_bytes(bake(copy.deepcopy(model)))})
    falling = limit.quantity == "size"  # the file shrinks with the loss, the drop grows
    tried: dict[float, tuple[float, nn.Module]] = {}
    remarks: dict[float, Ledger] = {}

    def reach(much: float) -> float:
        with recording() as remarks[much]:
            one = at(copy.deepcopy(model), much)
        ready = bake(copy.deepcopy(one)).eval()
        got = float(weight(ready, bare_bytes)) if falling else 100 * drop(before, evaluate(ready, task))
        tried[much] = got, one
        note(f"{limit.quantity} at loss={much:.3g}: {got:.6g}")
        return got

    low, high = bracket(reach, allowed, falling)
    for _ in range(CLOSER if low is not None and high is not None else 0):
        assert low is not None
        assert high is not None
        if falling and 0.97 * allowed <= tried[high][0] <= allowed:
            break
        part = 0.5
        if falling:
            part = math.log(tried[low][0] / allowed) / max(math.log(tried[low][0] / tried[high][0]), 1e-9)
        much = math.exp(math.log(low) + min(max(part, 0.1), 0.9) * math.log(high / low))
        small = reach(much) <= allowed
        low, high = (low, much) if small == falling else (much, high)
    holding = [much for much, one in tried.items() if one[0] <= allowed]
    if holding:
        chosen = min(holding) if falling else max(holding)
    else:
        chosen = min(tried, key=lambda much: tried[much][0])
        losses = f"losses of {min(tried):.3g} to {max(tried):.3g}"
        note(f"{limit.text} is out of reach of rounding alone: at {losses} the nearest is {tried[chosen][0]:.6g}")
    for told in remarks[chosen].notes:
        note(told)
    for path, why in remarks[chosen].skipped.items():
        skip(path, why)
    return tried[chosen][1]


def bracket(reach: Callable[[float], float], allowed: float, falling: bool) -> tuple[float | None, float | None]:
    """Two losses of which one side is too small and the other too large, a factor apart; None where there is no end."""
    much = 0.003
    first = (reach(much) <= allowed) == falling  # too large a loss already
    for _ in range(OUTWARD):
        other = much / APART if first else much * APART
        if other > MOST:
            break
        if ((reach(other) <= allowed) == falling) != first:
            return (other, much) if first else (much, other)
        much = other
    return (None, much) if first else (much, None)


def rounded(
    model: nn.Module, task: Task, loss: float, *, states: int, rate: float, batches: int, where: WhereWeighted
) -> nn.Module:
    """Layer after layer: fitted to what it sees now, rounded with feedback, its bias last."""
    model = folded(model, task)
    found = not_zero(per_layer(model, "loss", loss, where)[0])
    original, data = bake(copy.deepcopy(model)), some_batches(task, batches)
    whole = [path for path, site in found.items() if whole_matrix(path, site)]
    known = curvatures(model, task, whole, data, draws=DRAWS, plain=ALIKE)
    left = {path: site for path, site in found.items() if path not in known}
    draws = 1 if task.loss is cross_entropy else None
    others = ggn_diagonal(model, task, left, data, draws=draws) if left else {}
    size = {path: float(one.inputs.diagonal(dim1=1, dim2=2).mean()) for path, one in known.items()}
    size |= {path: float(one.mean()) for path, one in others.items()}
    count = sum(site.weight.numel() for site in found.values())
    rounding = Rounding(model, loss, 2 * math.log(2) * loss / count, max(size.values()), states, rate)

    def change(path: str, layer: nn.Module, theirs: Tensor, ours: Tensor) -> None:
        before = original.get_submodule(path)
        rounding.fed_back(path, found[path], known[path], joint_moments(before, ours, plain(before, theirs)))

    for path in beside(model, original, task, joined(task, batches), known, change):
        rounding.fed_back(path, found[path], known[path], None)
    for path in others:
        rounding.squared(path, found[path], size[path])
    return model


def folded(model: nn.Module, task: Task) -> nn.Module:
    """The network with batch norms in the layers before them, as far as its graph can be traced."""
    if not any(isinstance(module, NORMS) for module in model.modules()):
        return model
    try:
        return fold_batchnorm(model, task.inputs())
    except TraceError as error:
        note(f"batch norms stay: {error}")
        return model


def whole_matrix(path: str, site: Site) -> bool:
    """Whether errors of a layer's weights can be told from its inputs; of others it is said that they cannot."""
    if reason := no_columns(site.module):
        skip(path, f"its errors are not fed back: {reason}")
    return not reason


@final
@dataclass(frozen=True)
class Rounding:
    """How the layers of a network are rounded: at the slope, in nats a bit, at which all of them trade error for bits.

    `largest` is the largest mean curvature of a layer: one that no sample moves is taken to have a millionth of it.
    """

    model: nn.Module
    loss: float
    slope: float
    largest: float
    states: int
    rate: float

    def fed_back(self, path: str, site: Site, curvature: Curvature, moments: tuple[Tensor, Tensor] | None) -> None:
        """Rounds a layer group by group; the errors of a row go into the weights, and the bias, that come later."""
        groups, free = len(curvature.inputs), bias_of(site.module)
        both, inputs = augmented(site, free), curvature.inputs
        if free is None:
            moments = None if moments is None or site.module.bias is not None else cut(*moments)
            inputs = inputs[:, :-1, :-1]
        goals = both if moments is None else fitted(both.unflatten(0, (groups, -1)), *moments).flatten(0, 1)
        columns = site.weight[0].numel()
        metrics = [
            Metric.of(damped(one, columns, self.largest).numpy(), outputs.numpy())
            for one, outputs in zip(inputs / 2, curvature.outputs.view(groups, -1), strict=True)
        ]
        costs = np.concatenate([one.outputs[:, None] * one.columns[:columns] for one in metrics])
        weight, kept = goals[:, :columns].numpy(), site.keep.flatten(1).numpy()
        scale = self.steps(path, weight, costs, site.weight)
        steps = np.broadcast_to(scale.double().cpu().numpy(), len(weight))
        rows = np.split(np.arange(len(weight)), groups)
        points = np.concatenate(
            [
                self._points(weight[own], steps[own], metric.first(columns), kept[own])
                for own, metric in zip(rows, metrics, strict=True)
            ]
        )
        self._put(path, site, torch.from_numpy(points), scale)
        if free is None:
            return
        now = points * steps[:, None]
        if moments is None:
            back = [(weight - now)[own] @ one.factor[columns, :columns] for own, one in zip(rows, metrics, strict=True)]
            bias = goals[:, columns] + torch.from_numpy(np.concatenate(back))
        else:
            bias = centred(torch.from_numpy(now).unflatten(0, (groups, -1)), *moments)
        self.bias(site, bias, float(np.mean([one.columns[columns] for one in metrics])))

    def steps(self, path: str, weight: Floats, costs: Floats, like: Tensor) -> Tensor:
        """The step of each row, or one in all where they agree, of the weight's type.

        At high rate all weights are to add the same loss, `cost step^2 kappa = slope / 2 ln 2`; those that will be
        zero do not count.
        """
        own = costs.mean(1)
        finest = 2 if weight.shape[1] >= 64 else 1  # powers of the root of two, or of two where a row is short
        relative = -0.5 * np.log2(np.maximum(own / max(own.mean(), 1e-300), 1e-3))
        relative = np.exp2(np.round(finest * relative) / finest)
        costs = costs * relative[:, None] ** 2
        alive = costs * (weight / relative[:, None]) ** 2 > 0.3 * self.slope
        mean = float(costs[alive].mean() if alive.any() else costs.mean())
        step = WIDER * math.sqrt(self.slope / (2 * math.log(2) * KAPPA[self.states] * mean))
        found = torch.from_numpy(step * relative).to(like.device, like.dtype)
        scale = found[0] if bool((found == found[0]).all()) else found
        if np.abs(weight).max() > LARGEST * float(scale.min()):
            raise self._told(path)
        return scale

    def bias(self, site: Site, bias: Tensor, cost: float) -> None:
        """A layer's bias on a grid whose step adds as much loss as that of a weight."""
        held: nn.Parameter = site.module.bias  # type: ignore[assignment]
        step = torch.tensor(math.sqrt(12 * self.slope / (2 * math.log(2) * cost))).to(held.device, held.dtype)
        points = (bias / step.double().cpu()).round()
        most = max(int(points.abs().max()), 1)
        if most > LARGEST or not float(step) > 0:
            return
        with torch.no_grad():
            held.copy_(points.to(held.device, held.dtype) * step)
        attach(site.module, FixedGrid(step, -most, most), at="bias", root=self.model)

    def squared(self, path: str, site: Site, curvature: float) -> None:
        """Rounds a layer whose errors cost their squares."""
        weight = (site.weight.double() * site.keep.to(site.weight.device)).cpu()
        flat = weight.flatten(1).numpy()
        cost = max(curvature, 1e-6 * self.largest, 1e-300) / 2
        scale = self.steps(path, flat, np.full(flat.shape, cost), site.weight)
        metric = Metric.plain(flat.shape[0], flat.shape[1], cost)
        points = self._points(flat, float(scale), metric, site.keep.flatten(1).numpy())
        self._put(path, site, torch.from_numpy(points), scale)

    def _points(self, weight: Floats, steps: Floats | float, metric: Metric, kept: NDArray[np.bool_]) -> Ints:
        return quantized(weight, steps, self.states, self.slope * self.rate, metric=metric, kept=kept)

    def _put(self, path: str, site: Site, points: Tensor, scale: Tensor) -> None:
        """Weights at integer multiples of steps of their own type, on a grid that says so."""
        most = max(int(points.abs().max()), 1)
        if most > LARGEST:
            raise self._told(path)
        axis = 0 if scale.dim() else None
        weight = points.view(site.weight.shape).to(scale.device, scale.dtype)
        with torch.no_grad():
            site.held.copy_((weight * along(scale, axis, weight.dim())).view_as(site.held))
        attach(site.module, FixedGrid(scale, -most, most, axis=axis), at=site.name, root=self.model)
        note(f"{path}: step {float(scale.min()):.3g}, {float((points == 0).double().mean()):.1%} zeros")

    def _told(self, path: str) -> BadOption:
        return BadOption(f"loss={self.loss} puts weights of {path} more than 2^24 steps from zero: choose a larger one")


def bias_of(layer: nn.Module) -> nn.Parameter | None:
    """A layer's bias, if it has one that no form holds."""
    bias = None if has_forms(layer, "bias") else layer.bias
    return bias if isinstance(bias, nn.Parameter) else None


def augmented(site: Site, bias: nn.Parameter | None) -> Tensor:
    """A layer's weights (outputs, columns), and its bias, if it is to be rounded, behind them; float64."""
    weight = (site.weight.double() * site.keep.to(site.weight.device)).flatten(1).cpu()
    return weight if bias is None else torch.cat([weight, bias.detach().double().cpu()[:, None]], 1)


def cut(xx: Tensor, yx: Tensor) -> tuple[Tensor, Tensor]:
    """Moments without those of the one that stands for a bias."""
    return xx[:, :-1, :-1], yx[:, :, :-1]


def damped(matrix: Tensor, columns: int, largest: float) -> Tensor:
    """With something added to the diagonal, so that it is positive; a bias, behind the columns, gets little."""
    mean = max(float(matrix.diagonal()[:columns].mean()), 1e-6 * largest, 1e-300)
    added = torch.full((len(matrix),), 1e-6 * mean, dtype=matrix.dtype)
    added[:columns] = DAMPING * mean
    return matrix + added.diag()


def fitted(weight: Tensor, xx: Tensor, yx: Tensor) -> Tensor:
    """The weights (groups, outputs, columns) that make `y` of `x` best, drawn to the given ones by a ridge."""
    ridge = DAMPING * xx.diagonal(dim1=1, dim2=2).mean(1)
    ready = xx + ridge[:, None, None].clamp_min(1e-12) * torch.eye(xx.shape[1], dtype=xx.dtype)
    return weight + torch.linalg.solve(ready, (yx - weight @ xx).mT).mT


def centred(weight: Tensor, xx: Tensor, yx: Tensor) -> Tensor:
    """The bias (outputs,) with which weights (groups, outputs, columns) put out `y` on average."""
    return ((yx[..., -1] - (weight @ xx[:, :-1, -1:])[..., 0]) / xx[:, -1:, -1]).flatten()
