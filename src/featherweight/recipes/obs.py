"""Optimal Brain Surgeon: removes the weight that the second-order loss misses least, and moves all others to repair it.

Babak Hassibi, David G. Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992. To
remove weight q of a quadratic with Hessian H costs `s_q = w_q^2 / (2 [H^-1]_qq)` and moves the weights by
`dw = -(w_q / [H^-1]_qq) H^-1 e_q` (eq. 5). Its inverse is built example by example, `H^-1 <- H^-1 - H^-1 X (P +
X^T H^-1 X)^-1 X^T H^-1` from `I / alpha` (eq. 17), X the gradients of the outputs times the root of the loss's
Hessian there, so a network with many outputs or with cross entropy is as good as one with squared error.

`mode="layers"` is its form for larger networks (Xin Dong, Shangyu Chen, Sinno Jialin Pan, "Learning to Prune Deep
Neural Networks via Layer-wise Optimal Brain Surgeon", NIPS 2017, arXiv:1705.07565): the error of a layer's output, for
which `H = X X^T / n` of the layer's inputs, the same for every row of its weight, and rows are independent.

Departs from the paper: after a removal H^-1 is down-dated, `H^-1 -= H^-1 e_q e_q^T H^-1 / [H^-1]_qq`, and computed anew
every round instead of after each weight; the number of weights is given (with `tolerance`, also when to stop); layers
take the inputs behind the layers that were pruned before and the outputs of the original network; a hundredth of a
row goes at a time (`step`), exactly, but chosen by scores from before the step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian

from featherweight.allowed import Amount, Count, Fraction, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.forms import bake
from featherweight.core.layerwise import Sums, called, kept_by_masks, unfit, with_bias
from featherweight.core.ledger import note, skip
from featherweight.core.masks import largest
from featherweight.core.reconstruct import Moments, augmented, patterns, put
from featherweight.core.site import PerLayer, Site, per_layer
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task, device_of, loss_of, prediction, to_device
from featherweight.errors import BadOption

MOST = 8192
"""Weights of which a network's inverse Hessian is held: half a gibibyte."""


def whole_network(options: Mapping[str, Any]) -> None:
    """Refuses a fraction for each layer, or an error of a layer, where the whole network is ranked."""
    if options["mode"] == "network" and isinstance(options["sparsity"], Mapping):
        raise BadOption('mode="network" ranks all weights together, but sparsity names a fraction for each layer')
    if options["mode"] == "network" and options.get("tolerance") is not None:
        raise BadOption('tolerance is an error of a layer\'s output: leave it out with mode="network"')


@recipe(
    paper="Hassibi and Stork, NIPS 1992",
    family="prune",
    needs={"calibration"},
    shrinks={"weights"},
    small={"calibration_batches": 2, "sparsity": 0.6},
    rules=(whole_network,),
)
def obs(
    model: nn.Module,
    task: Task,
    *,
    mode: Literal["layers", "network"] = "layers",
    sparsity: PerLayer[Fraction] = 0.9,
    tolerance: Amount | None = None,
    rounds: Count = 1,
    step: Share = 0.01,
    alpha: Positive = 1e-4,
    positions: Count = 10,
    calibration_batches: Count = 16,
    finetune: Amount = 0,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    where: WhereWeighted = None,
) -> nn.Module:
    """Removes weights one after the other, each time the one that costs least, the others moving to make up for it.

    Args:
        mode: "layers" repairs the output of every layer by itself; "network" the loss, for at most 8192 weights, and
            needs labels where the loss does.
        sparsity: fraction of the weights removed, of every layer (of the whole network in that mode); or layer patterns
            with a fraction each.
        tolerance: a layer loses no more weights than raise its output's error to this share of the output's variance.
        rounds: how often the Hessian is computed anew, an equal number of weights removed with each.
        step: the share of a row's weights (in "network": of all) that goes before the inverse is brought up to date: 0
            is one at a time, 1 ranks all once. A row of n columns costs about n^3 operations with any small step.
        alpha: what is added to the Hessian's diagonal, in "layers" as a share of its mean.
        positions: output positions drawn from every sample.
        calibration_batches: how many batches of the calibration (or training) data the Hessians are from.
        finetune: passes of fine-tuning at the end.
        lr: its learning rate.
        optimizer: its optimizer, as in `fit`.
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: the network has too many weights for its mode.
        MissingNeed: the mode "network", a loss that needs labels, and batches without.
    """
    found, goals = per_layer(model, "sparsity", sparsity, where)
    keeps = {path: site.keep for path, site in found.items()}
    original, others = copy.deepcopy(model), kept_by_masks(model)
    bake(model)
    for turn in range(1, rounds + 1):
        now = {path: goal * turn / rounds for path, goal in goals.items()}
        if mode == "network":
            whole(model, task, keeps, next(iter(now.values())), calibration_batches, step=step, alpha=alpha)
        else:
            sums = Sums(model, original, task, positions, calibration_batches)
            layer_by_layer(model, task, keeps, now, sums, step=step, alpha=alpha, tolerance=tolerance)
    for (path, name), keep in others.items():
        Site(path, model.get_submodule(path), name).set_mask(model, keep)
    for path, keep in keeps.items():
        if not keep.all():
            Site(path, model.get_submodule(path)).set_mask(model, keep)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune") if finetune else model


# --- layers ----------------------------------------------------------------------------------------------------------


def layer_by_layer(
    model: nn.Module,
    task: Task,
    keeps: dict[str, Tensor],
    sparsity: Mapping[str, float],
    sums: Sums,
    **settings: Any,
) -> None:
    """Prunes the weights of every layer, front to back, in place; `keeps` are the masks before and after."""
    order = called(model, task)
    reasons = {path: unfit(model, path, order) for path in keeps}
    for path, why in reasons.items():
        if why:
            skip(path, why)
    for path in order:
        if reasons.get(path, "not chosen"):
            continue
        layer = model.get_submodule(path)
        moments, keep = sums.of(path), keeps[path].flatten(1)
        bias = layer.bias is not None
        weight, pruned = prune_rows(moments, augmented(layer), keep, bias, sparsity[path], **settings)
        put(layer, weight)
        keeps[path] = pruned.view_as(keeps[path])
        error = float(moments.error(augmented(layer)).sum() / moments.energy.sum().clamp_min(1e-30))
        note(f"{path}: {float((~pruned).double().mean()):.1%} of its weights removed, its output moves by {error:.2%}")


def prune_rows(
    moments: Moments,
    weight: Tensor,
    keep: Tensor,
    bias: bool,
    sparsity: float,
    *,
    step: float = 0,
    alpha: float = 0.0,
    tolerance: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The weight (outputs, columns + 1) after a removal, and what it keeps (outputs, columns).

    It starts from the least-squares optimum, where the error is exactly quadratic, and ends at the one on what is left,
    which is where the removals lead (`removed`).
    """
    start = moments.refit(weight, with_bias(keep, bias), alpha)
    damped = moments.xx / moments.n
    damped.diagonal().add_(alpha * float(damped.diagonal()[:-1].mean()))
    cost = torch.full(keep.shape, -torch.inf, dtype=torch.float64)
    place = torch.zeros(keep.shape, dtype=torch.long)
    for here, rows in patterns(with_bias(keep, bias)):
        inverse = torch.linalg.inv(damped[here][:, here])
        for row in rows.tolist():
            order, costs = trace(start[row, here], inverse, step, len(here) - int(bias))
            cost[row, here[order]], place[row, here[order]] = costs, torch.arange(len(order))
    kept = largest({"": ranks(cost, place)}, {"": sparsity}, within={"": keep})[""]
    gone = ~kept
    if tolerance is not None:
        rises = torch.where(gone & keep, cost, torch.inf).flatten().sort()
        most = tolerance * float(moments.energy.sum()) - float(moments.error(start).sum())
        affordable = int((2 * rises.values.cumsum(0) <= most).sum())
        gone = ~keep
        gone.view(-1)[rises.indices[:affordable]] = True
    new = moments.refit(torch.where(with_bias(~gone, True), start, 0.0), with_bias(~gone, bias), alpha)
    return new, ~gone


def trace(weight: Tensor, inverse: Tensor, step: float, count: int, most: int | None = None) -> tuple[Tensor, Tensor]:
    """The order in which the first `count` weights (n,) go (`most` of them), and by how much the error rises with each.

    Weights beyond `count` (the bias) move, but never go. Costs never fall along the order: a weight that is cheaper
    only after another went cannot go before it. What goes in one step shares what the step costs, in proportion to the
    scores from before it.
    """
    weight, inverse, left = weight.clone(), inverse.clone(), torch.arange(len(weight))
    order: list[Tensor] = []
    costs: list[Tensor] = [torch.zeros(1, dtype=torch.float64)]
    size, most = max(1, int(step * count)), count if most is None else most
    while (going := min(size, most - sum(map(len, order)))) > 0:
        scores = torch.where(left < count, saliency(weight, inverse), torch.inf)
        chosen = scores.argsort(stable=True)[:going]
        order.append(left[chosen])
        cost = scores[chosen]
        if sum(map(len, order)) < most:
            cost = cost * (removed(weight, inverse, chosen) / cost.sum().clamp_min(1e-300))
        costs.append(cost.clamp_min(float(costs[-1][-1])))
        left[chosen] = count
        alive = inverse.diagonal() > 0
        if int(alive.sum()) < 0.7 * len(alive):
            weight, inverse, left = weight[alive], inverse[alive][:, alive], left[alive]
    return torch.cat([torch.empty(0, dtype=torch.long), *order]), torch.cat(costs)[1:]


def saliency(weight: Tensor, inverse: Tensor) -> Tensor:
    """`s_q = w_q^2 / (2 [H^-1]_qq)`: the rise of the error if weight q goes and the others follow (eq. 5)."""
    spread = inverse.diagonal()
    return torch.where(spread > 0, weight.square() / (2 * spread), torch.inf)


def removed(weight: Tensor, inverse: Tensor, gone: Tensor) -> Tensor:
    """Removes a set Q of weights, in place in the weights (n,) and in the inverse (n, n), and returns what it costs.

    `dw = -H^-1[:,Q] (H^-1[Q,Q])^-1 w_Q`, cost `w_Q^T (H^-1[Q,Q])^-1 w_Q / 2`; of one weight, eq. 5.
    """
    columns = inverse[:, gone]
    factor = torch.linalg.cholesky(columns[gone])
    share = torch.cholesky_solve(weight[gone][:, None], factor)
    cost = weight[gone] @ share[:, 0] / 2
    half = torch.linalg.solve_triangular(factor, columns.mT, upper=False)
    inverse.addmm_(half.mT, half, alpha=-1)
    inverse[gone], inverse[:, gone] = 0, 0
    weight -= (columns @ share)[:, 0]
    weight[gone] = 0
    return cost


def ranks(cost: Tensor, place: Tensor) -> Tensor:
    """The place of every removal among all, the cheapest first; of equal ones that which came earlier in its row."""
    order = np.lexsort((place.flatten().numpy(), cost.flatten().numpy()))
    found = torch.empty(cost.numel(), dtype=torch.float64)
    found[torch.from_numpy(order)] = torch.arange(cost.numel(), dtype=torch.float64)
    return found.view_as(cost)


# --- the whole network -----------------------------------------------------------------------------------------------


def whole(
    model: nn.Module, task: Task, keeps: dict[str, Tensor], sparsity: float, batches: int, *, step: float, alpha: float
) -> None:
    """Removes the weights that the loss misses least, of all layers, one by one, in place; `keeps` as in the layers."""
    params = [model.get_submodule(path).weight for path in keeps]
    alive = torch.cat([keep.flatten() for keep in keeps.values()]).nonzero().flatten()
    if len(alive) > MOST:
        raise BadOption(
            f'mode="network" holds an inverse Hessian of all weights, at most {MOST}, and {len(alive)} were chosen: '
            'choose fewer with where, or mode="layers"'
        )
    total = sum(keep.numel() for keep in keeps.values())
    count = int(sparsity * total + 1e-9) - (total - len(alive))
    roots = (root[alive] for root in loss_roots(model, task, params, batches))
    inverse = inverse_hessian(roots, len(alive), sample_count(task, batches), alpha)
    flat = torch.cat([p.detach().flatten() for p in params]).double().cpu()  # type: ignore[operator]
    weight = flat[alive]
    order, _ = trace(weight, inverse, step, len(weight), max(0, min(count, len(weight) - 1)))
    removed(weight, inverse, order)
    new, kept = torch.zeros_like(flat), torch.zeros(total, dtype=torch.bool)
    new[alive] = weight
    kept[alive] = True
    kept[alive[order]] = False
    sizes = [keep.numel() for keep in keeps.values()]
    for param, part, path, mask in zip(params, new.split(sizes), keeps, kept.split(sizes), strict=True):
        with torch.no_grad():
            param.copy_(part.view_as(param))  # type: ignore[operator]
        keeps[path] = mask.view_as(keeps[path])


def inverse_hessian(roots: Iterable[Tensor], size: int, examples: int, alpha: float) -> Tensor:
    """`(alpha I + sum_k X_k X_k^T / P)^-1`, float64, by recursion over the examples' X_k (size, outputs), eq. 17."""
    inverse = torch.eye(size, dtype=torch.float64) / alpha
    for root in roots:
        x = root.double()
        moved = inverse @ x
        middle = x.mT @ moved
        middle.diagonal().add_(examples)
        inverse -= moved @ torch.linalg.solve(middle, moved.mT)
    return inverse


def samples(task: Task, batches: int) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Any]]:
    """The samples of the first batches, each as a batch of one."""
    for batch in islice(task.calibrating(), batches):
        args, kwargs, target = task.split(batch)
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        for i in range(len(tensors[0])):
            one = [v[i : i + 1] if isinstance(v, Tensor) else v for v in args]
            named = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            yield tuple(one), named, target[i : i + 1] if isinstance(target, Tensor) else target


def sample_count(task: Task, batches: int) -> int:
    """How many samples the first batches hold."""
    return sum(1 for _ in samples(task, batches))


def loss_roots(model: nn.Module, task: Task, params: list[Any], batches: int) -> Iterator[Tensor]:
    """For every sample `X = J^T B^(1/2)` (weights, outputs): J of the outputs, B the loss's Hessian at the outputs.

    For cross entropy `B = diag(p) - p p^T`; for half a squared error the identity. X X^T is the Gauss-Newton matrix.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for args, kwargs, target in samples(task, batches):
            moved, named, wanted = to_device((args, kwargs, target), device_of(model))
            output = prediction(model(*moved, **named))
            bend = hessian(lambda z, wanted=wanted: loss_of(task, z, wanted), output.detach())
            values, vectors = torch.linalg.eigh(bend.reshape(output.numel(), -1).double().cpu())
            rows = [torch.autograd.grad(z, params, retain_graph=True, allow_unused=True) for z in output.flatten()]
            jacobian = torch.stack([_flat(row, params) for row in rows], 1).double().cpu()
            yield jacobian @ vectors * values.clamp_min(0).sqrt()
    finally:
        for module, training in modes.items():
            module.training = training


def _flat(grads: Iterable[Tensor | None], params: Iterable[Tensor]) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, params, strict=True)])
