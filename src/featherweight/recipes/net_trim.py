"""Net-Trim: the sparsest weights that still give a layer's outputs, as a convex program for every neuron.

Alireza Aghasi, Afshin Abdi, Nam Nguyen, Justin Romberg, "Net-Trim: Convex Pruning of Deep Neural Networks with
Performance Guarantee", NIPS 2017, arXiv:1611.05162. For a layer `Y = ReLU(W^T X)` over samples X,
`min |U|_1  s.t.  |(U^T X - Y)_Omega|_F <= eps,  (U^T X)_Omega^c <= 0`, Omega where Y > 0: what the ReLU cuts off need
only stay negative. Of a layer without a ReLU behind it Omega is everything. With eps_j = eps |y_j| / |Y|_F the neurons
are independent; each is solved by ADMM (scaled duals a, b): `u = (I + X X^T)^-1 (z - a + X (v - b))`, `z = S_1/rho(u +
a)`, v the projection of `X^T u + b` on the constraints, `a += u - z`, `b += X^T u - v`, and z is the answer.

Departs from the paper: eps is a share of the outputs' norm; inputs and outputs are divided by one number, so that ADMM
converges alike for all layers (the program stays the same); biases are not penalised; `mode="cascade"` has the same eps
for every layer, where the paper lets it grow with what the layers before lost, so that the constraints may be out of
reach there and the nearest weights are taken. Convolutions are solved on sampled positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.flow import follow
from featherweight.core.fold import fold_batchnorm
from featherweight.core.forms import bake
from featherweight.core.layerwise import called, kept_by_masks, unfit, with_bias
from featherweight.core.ledger import note, skip
from featherweight.core.reconstruct import augmented, layer_rows, put
from featherweight.core.site import Site, sites
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task
from featherweight.errors import BadData, TraceError

TOLERANCE = 1e-6
"""Of the steps and the constraints, relative: where ADMM stops."""


@recipe(
    paper="Aghasi et al., NIPS 2017, arXiv:1611.05162",
    family="prune",
    needs={"calibration"},
    shrinks={"weights"},
    small={"calibration_batches": 2, "samples": 200, "iterations": 200},
)
def net_trim(
    model: nn.Module,
    task: Task,
    *,
    epsilon: Amount = 0.05,
    mode: Literal["parallel", "cascade"] = "parallel",
    fold: bool = True,
    rho: Positive = 10.0,
    iterations: Count = 1000,
    samples: Count = 2000,
    positions: Count = 10,
    calibration_batches: Count = 16,
    finetune: Amount = 0,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    where: WhereWeighted = None,
) -> nn.Module:
    """Replaces the weights of every layer by the sparsest ones that give the same outputs, but for `epsilon`.

    Args:
        epsilon: how far a layer's outputs may be off, as a share of their norm.
        mode: "parallel" gives every layer the inputs of the original network, "cascade" those behind the layers that
            were pruned before.
        fold: batch norm goes into the layers before it first, so that a ReLU stands behind them.
        rho: weight of the constraints in ADMM, over the mean size of the layer's weights; how fast it converges.
        iterations: at most so many of ADMM for a layer.
        samples: at most so many rows of inputs for a layer.
        positions: output positions drawn from every sample.
        calibration_batches: how many batches of the calibration (or training) data the rows are from.
        finetune: passes of fine-tuning at the end.
        lr: its learning rate.
        optimizer: its optimizer, as in `fit`.
        where: which layers; all linear and convolution layers when left out.

    Raises:
        UnknownName: a pattern matches nothing.
    """
    if fold:
        try:
            fold_batchnorm(model, task.inputs())
        except TraceError as error:
            note(f"batch norm is not folded: {error}")
    keeps = {path: site.keep for path, site in sites(model, where).items()}
    original, others = copy.deepcopy(model), kept_by_masks(model)
    bake(model)
    order, rectified = called(model, task), before_relu(model, task, list(keeps))
    for path in (path for path in keeps if unfit(model, path, order)):
        skip(path, unfit(model, path, order))
    for path in (path for path in order if path in keeps and not unfit(model, path, order)):
        layer = model.get_submodule(path)
        prefix, target = (original, None) if mode == "parallel" else (model, original)
        data = islice(task.calibrating(), calibration_batches)
        x, y = sampled(layer_rows(prefix, path, task, data, positions=positions, original=target), samples)
        omega = y > 0 if path in rectified else torch.ones_like(y, dtype=torch.bool)
        free = with_bias(keeps[path].flatten(1), layer.bias is not None)
        new = trim(x, y, omega, free, epsilon=epsilon, rho=rho, size=size_of(augmented(layer)), iterations=iterations)
        put(layer, new)
        keeps[path] = (new[:, :-1] != 0).view_as(keeps[path])
        zeros, off = float((new[:, :-1] == 0).double().mean()), missed(x, y, omega, new)
        note(f"{path}: {zeros:.1%} of its weights are zero, its outputs are off by {off:.2%}")
    for (path, name), keep in others.items():
        Site(path, model.get_submodule(path), name).set_mask(model, keep)
    for path in (path for path in keeps if not keeps[path].all()):
        Site(path, model.get_submodule(path)).set_mask(model, keeps[path])
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune") if finetune else model


def before_relu(model: nn.Module, task: Task, paths: list[str]) -> set[str]:
    """The layers whose outputs nothing but a ReLU reads."""
    flow = follow(model, task.inputs(), {path: model.get_submodule(path) for path in paths})
    found = set()
    for step in flow.steps:
        if step.layer is not None:
            reading = [other.name for other in flow.steps if set(step.makes) & set(other.reads)]
            if reading and set(reading) == {"relu"} and not set(step.makes) & flow.outputs:
                found.add(step.layer)
    return found


def sampled(rows: Iterable[tuple[Tensor, Tensor]], most: int) -> tuple[Tensor, Tensor]:
    """At most so many rows of inputs, with a one behind each, and of outputs; spread over all there are.

    Raises:
        BadData: there are none, or they are not finite.
    """
    x, y, keys = torch.empty(0), torch.empty(0), torch.empty(0)
    generator = torch.Generator().manual_seed(0)
    for inputs, outputs in rows:
        ones = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        x, y = (torch.cat([x, ones]), torch.cat([y, outputs])) if len(keys) else (ones, outputs)
        keys = torch.cat([keys, torch.rand(len(inputs), generator=generator)])
        if len(keys) > most:  # the lowest of random numbers: every row of the stream is as likely to stay
            stay = keys.argsort(stable=True)[:most].sort().values
            x, y, keys = x[stay], y[stay], keys[stay]
    if not len(keys):
        raise BadData("no rows to reconstruct a layer from: pass at least one batch of calibration data")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise BadData("the inputs or outputs of a layer are not finite: check the weights and the calibration data")
    return x, y


def trim(
    x: Tensor, y: Tensor, omega: Tensor, free: Tensor, *, epsilon: float, rho: float, size: float, iterations: int
) -> Tensor:
    """The augmented weight (outputs, columns + 1) with the least sum of sizes that meets the constraints, by ADMM.

    Args:
        x: inputs with a one behind each (rows, columns + 1).
        y: outputs before the ReLU (rows, outputs).
        omega: where the output must be met (rows, outputs); elsewhere it must not be positive.
        free: entries that may be other than zero, of the weight's shape; the last column is not penalised.
        epsilon: the bound, as a share of the norm of the outputs in omega.
        size: what weights are like, which sets the scale of rho.
    """
    scale = float((x.square().sum() / x.shape[1]).sqrt()) or 1.0
    x, y = x / scale, y / scale
    bound = epsilon * (y * omega).norm(dim=0)
    factor = torch.linalg.cholesky(x.mT @ x + torch.eye(x.shape[1], dtype=x.dtype))
    penalty = torch.full((x.shape[1], 1), size / rho, dtype=x.dtype)
    penalty[-1] = 0
    z, a = (torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype) for _ in range(2))
    v, b = projected(torch.zeros_like(y), y, omega, bound), torch.zeros_like(y)
    for _ in range(iterations):
        u = torch.cholesky_solve(z - a + x.mT @ (v - b), factor)
        before, reached = z, x @ u
        z = torch.where(free.mT, shrunk(u + a, penalty), 0.0)
        v = projected(reached + b, y, omega, bound)
        a += u - z
        b += reached - v
        apart = (u - z).norm() + (reached - v).norm()
        if float(apart + (z - before).norm()) <= TOLERANCE * float(z.norm() + v.norm()):
            break
    return z.mT


def shrunk(u: Tensor, by: Tensor) -> Tensor:
    """Every entry nearer to zero by so much."""
    return u.sign() * (u.abs() - by).clamp_min(0)


def projected(t: Tensor, y: Tensor, omega: Tensor, bound: Tensor) -> Tensor:
    """The nearest point that meets the constraints: within a ball around y in omega, not positive elsewhere."""
    off = torch.where(omega, t - y, 0.0)
    inside = (bound / off.norm(dim=0).clamp_min(1e-300)).clamp_max(1.0)
    return torch.where(omega, y + off * inside, t.clamp_max(0))


def size_of(weight: Tensor) -> float:
    """The mean size of a layer's weights."""
    return float(weight[:, :-1].abs().mean()) or 1.0


def missed(x: Tensor, y: Tensor, omega: Tensor, weight: Tensor) -> float:
    """How far the outputs are off, as a share of their norm: in omega, and by what is positive elsewhere."""
    reached = x @ weight.mT
    off = torch.where(omega, reached - y, reached.clamp_min(0))
    return float(off.norm() / (y * omega).norm().clamp_min(1e-300))
