"""ISTA on batch-norm scales: a proximal step makes exact zeros of them, and channels that are constants are removed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.channels import Channels, channel_groups
from featherweight.core.emptied import check_emptied, remove_dead
from featherweight.core.fit import DECAYS, Optimizers
from featherweight.core.fold import norms_behind
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.groups import Groups, Part, makers, readers
from featherweight.core.ledger import note, skip
from featherweight.core.surgery import taps
from featherweight.core.task import Task, as_call, device_of, eval_mode, to_device
from featherweight.core.widths import removable
from featherweight.errors import BadOption

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
ALPHAS = (1.0, 0.1, 0.01, 0.001)


@recipe(
    paper="Ye et al., ICLR 2018, arXiv:1802.00124",
    family="prune",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"rho": 0.5, "alpha": 0.1, "epochs": 6, "finetune": 2, "lr": 0.02, "round_to": 1},
)
def ista_bn(
    model: nn.Module,
    task: Task,
    *,
    rho: Amount = 1e-3,
    alpha: Positive | None = 0.1,
    epochs: Amount = 20,
    finetune: Amount = 10,
    lr: Positive = 0.01,
    optimizer: Optimizers = "sgd",
    round_to: Count = 16,
) -> nn.Module:
    """Minimises `loss + rho * sum_l lambda_l ||gamma_l||_1` by proximal steps on the scales; channels at zero go.

    Jianbo Ye, Xin Lu, Zhe Lin, James Z. Wang, "Rethinking the Smaller-Norm-Less-Informative Assumption in Channel
    Pruning of Convolution Layers", ICLR 2018. With the learning rate mu, weights are trained as ever and scales by

        gamma <- S_{mu rho lambda_l}(gamma - mu grad),    S_t(x) = sign(x) max(|x| - t, 0),

    `lambda_l` being what a channel costs in memory: `[weights that make it + weights that read it + its map] / image`.
    Before training, gamma and beta are multiplied by `alpha` and the weights that read them divided by it, which leaves
    the network what it is and lets scales reach zero in fewer steps; afterwards this is undone. A channel with
    gamma = 0 is the constant `f(beta)`: it moves into the biases of its readers, or the running means of the batch
    norms behind them, and the channel is removed.

    Departs from the paper: `lambda_l` is given from memory of it; `alpha` is 0.1 unless its rule is asked for (scales
    learn `1 / alpha^2` times as fast, and with the rule's smaller ones our short runs diverge); channels that a
    residual sum couples are removed where all their scales are zero, and their costs add up; of every layer one channel
    stays; the constants are measured on calibration batches; where a convolution pads with zeros they are exact inside
    and approximate at the border; rounding keeps some channels whose scale is zero.

    Args:
        rho: strength of the pull; the paper begins where loss and penalty are of the same size.
        alpha: the factor; None takes that of 1, 0.1, 0.01, 0.001 which brings the scales nearest to
            `100 lr rho lambda_l`, the distance of a hundred steps.
        epochs: passes of sparse training.
        finetune: passes after the removal.
        lr: learning rate of both, falling to zero.
        optimizer: of the weights, as in `fit`; scales take plain steps.
        round_to: wider layers keep a multiple of this many channels; 1 removes all whose scale is zero.

    Raises:
        BadOption: the network has no batch norm with scales behind layers whose channels can be removed.
        TraceError: the network cannot be traced.
        CompressionError: no scale became zero.
    """
    masked = masked_names(model)
    bake(model)
    channels = channel_groups(model, task.inputs())
    norms = norms_of(model, task, channels)
    groups = scale_groups(model, task, channels, norms)
    costs = memory_costs(model, task, channels, groups)
    factor = nearest_alpha(model, groups, costs, 100 * lr * rho) if alpha is None else alpha
    factors = rescale(model, task, channels, groups, factor)
    note(f"scales of {int((factors != 1).sum())} of {channels.count} channels times {factor:g} while training")
    thresholds = {part.path: torch.cat([costs, torch.zeros(1)])[part.index] for part in groups.parts}
    mask_zeros(model, masked)

    def ista(progress: float) -> None:
        rate = lr * DECAYS["cosine"](progress)
        for path, norm in norms.items():
            if (gradient := norm.weight.grad) is not None:
                with torch.no_grad():
                    limits = rate * rho * thresholds[path].to(gradient)
                    norm.weight.copy_(soft(norm.weight - rate * gradient, limits))
                norm.weight.grad = None

    rest = [p for p in model.parameters() if all(p is not norm.weight for norm in norms.values())]
    task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, params=rest, after_step=ista, label="ISTA")
    bake(model)
    scale(model, channels, groups, 1 / factors)
    dead = groups.zero(model).nonzero().flatten()
    check_emptied(remove_dead(model, task, channels, dead, round_to), round_to)
    mask_zeros(model, masked)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def soft(x: Tensor, threshold: Tensor) -> Tensor:
    """`sign(x) max(|x| - threshold, 0)`; the largest stays as it is where nothing would be left.

    >>> soft(torch.tensor([1.0, -0.5, 0.25]), torch.tensor(0.5)).tolist()
    [0.5, -0.0, 0.0]
    """
    new = x.sign() * (x.abs() - threshold).clamp_min(0)
    if bool((new == 0).all()):
        first = x.abs().argmax()
        new[first] = x[first]
    return new


def norms_of(model: nn.Module, task: Task, channels: Channels) -> dict[str, BatchNorm]:
    """The batch norms with scales that alone read a layer whose channels can be removed, by path.

    Raises:
        BadOption: there are none.
    """
    behind = norms_behind(model, task.inputs())
    found = {path: model.get_submodule(path) for path in behind.values()}
    norms = {
        path: m for path, m in found.items() if isinstance(m, BatchNorm) and m.affine and removable(channels, path)
    }
    if not norms:
        bare = [path for path in channels.outputs if path not in behind and removable(channels, path)]
        raise BadOption(
            "ista_bn shrinks the scales of batch norms behind the layers that it prunes, and there are none behind "
            f"{', '.join(bare[:5]) or 'any layer'}: choose a method that ranks weights, such as pfec_l1 or ssl"
        )
    return norms


def scale_groups(model: nn.Module, task: Task, channels: Channels, norms: Mapping[str, BatchNorm]) -> Groups:
    """For every channel its scales: none for channels that a layer without such a batch norm makes too."""
    own, behind = torch.arange(channels.count + 1), norms_behind(model, task.inputs())
    for part in makers(model, channels).parts:
        if behind.get(part.path) not in norms:
            own[part.index] = -1
            skip(part.path, "no batch norm with scales reads it alone: its channels stay")
    own[-1] = -1
    parts = (Part(path, "weight", own[channels.axes[f"{path}.weight", 0]]) for path in norms)
    return Groups(tuple(parts), channels.count)


def memory_costs(model: nn.Module, task: Task, channels: Channels, groups: Groups) -> Tensor:
    """`lambda_l` of every channel (count,): weights that make and read it, and its maps, over the image's size."""
    maps = torch.zeros(channels.count + 1)
    args, kwargs = as_call(to_device(task.inputs(), device_of(model)))
    with eval_mode(model), taps(model, [part.path for part in groups.parts]) as seen:
        model(*args, **kwargs)
    for part in groups.parts:
        maps.index_add_(
            0, part.index.remainder(channels.count + 1), torch.full(part.index.shape, area(seen[part.path]))
        )
    image = next((area(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)), 1.0)
    return (makers(model, channels).entries(model) + readers(model, channels).entries(model) + maps[:-1]) / image


def area(x: Tensor) -> float:
    """Places of a map (batch, channels, ...); 1 where there are none."""
    return float(x[0, 0].numel()) if x.dim() > 2 else 1.0


def nearest_alpha(model: nn.Module, groups: Groups, costs: Tensor, distance: float) -> float:
    """Which of `ALPHAS` brings the scales, in the median, nearest to `distance` times their costs."""
    norms = groups.norms(model)
    ratio = (norms / (distance * costs).clamp_min(1e-30))[norms > 0].log()
    wanted = -float(ratio.median()) if len(ratio) and distance else 0.0
    return min(ALPHAS, key=lambda alpha: abs(math.log(alpha) - wanted))


def rescale(model: nn.Module, task: Task, channels: Channels, groups: Groups, alpha: float) -> Tensor:
    """Multiplies scales and shifts of channels by `alpha` and divides what reads them, in place; the factors (count,).

    Channels with which that would move the network's output, because the activation is not positively homogeneous,
    keep the factor 1, and are skipped.
    """
    eligible = groups.entries(model) > 0
    before = outputs_of(model, task)

    def holds(factors: Tensor) -> bool:
        scale(model, channels, groups, factors)
        if all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(before, outputs_of(model, task), strict=True)
        ):
            return True
        scale(model, channels, groups, 1 / factors)
        return False

    factors = torch.where(eligible, alpha, 1.0)
    if holds(factors):
        return factors
    factors = torch.ones(channels.count)
    for group in channels.groups:
        members = torch.tensor(group.channels)
        trial = torch.ones(channels.count)
        trial[members[eligible[members]]] = alpha
        if holds(trial):
            factors *= trial
        else:
            skip(group.layers[0], "its scales keep their size: what follows them is not positively homogeneous")
    return factors


def scale(model: nn.Module, channels: Channels, groups: Groups, factors: Tensor) -> None:
    """Multiplies scales and shifts of channels by their factors (count,), and divides what reads them, in place."""
    groups.scale(model, factors)
    replace(groups, parts=tuple(replace(part, name="bias") for part in groups.parts)).scale(model, factors)
    readers(model, channels).scale(model, 1 / factors)


def outputs_of(model: nn.Module, task: Task) -> list[Tensor]:
    args, kwargs = as_call(to_device(task.inputs(), device_of(model)))
    with eval_mode(model):
        return [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]
