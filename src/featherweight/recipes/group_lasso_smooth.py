"""Smoothed group lasso: hidden neurons shrink under a penalty that is smooth at zero, those that are short go."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.channels import channel_groups
from featherweight.core.emptied import check_emptied, remove_zero_channels
from featherweight.core.fit import Optimizers
from featherweight.core.fold import fold_batchnorm
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.groups import makers, readers
from featherweight.core.ledger import note
from featherweight.core.task import Task
from featherweight.core.widths import NO_CHANNELS
from featherweight.errors import BadOption


@recipe(
    paper="Wang et al., IEEE TNNLS 2018",
    family="prune",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"penalty": 0.3, "vectors": "out", "threshold": 0.3, "epochs": 6, "finetune": 2, "lr": 0.02, "round_to": 1},
)
def group_lasso_smooth(
    model: nn.Module,
    task: Task,
    *,
    penalty: Positive = 1e-3,
    a: Positive = 1e-2,
    vectors: Literal["in", "out"] = "in",
    threshold: Amount | None = None,
    fold: bool = True,
    epochs: Amount = 20,
    finetune: Amount = 10,
    lr: Positive = 0.01,
    optimizer: Optimizers = "sgd",
    round_to: Count = 16,
) -> nn.Module:
    """Minimises `loss + penalty * sum_i h(||v_i||)` over the weight vectors `v_i` of hidden neurons, by its gradient.

    Jian Wang, Cai Xu, Xifeng Yang, Jacek M. Zurada, "A Novel Pruning Algorithm for Smoothing Feedforward Neural
    Networks Based on Group Lasso Method", IEEE Transactions on Neural Networks and Learning Systems 29(5), 2018. `h`
    is |x| from `a` on and a polynomial below it that meets it with equal value, slope and curvature,

        h(x) = -x^4 / (8 a^3) + 3 x^2 / (4 a) + 3 a / 8,

    so that gradient descent does not oscillate around zero. Then neurons whose vector is no longer than `threshold`
    are removed; what they still put out, a constant, moves into the next layer.

    Departs from the paper: its text was not at hand, the formulas are reconstructed from descriptions of it, the
    strengths are ours; stochastic gradients by default, where its proof of convergence is for full batches (with one
    batch as training data and plain SGD it is that); also filters of convolutions, those that a residual sum couples as
    one; batch norms are folded first, because behind them the length of a vector means nothing; fine-tuning at the end.

    Args:
        penalty: strength of the pull.
        a: where the smooth part begins.
        vectors: "in" (what a neuron or filter reads with) or "out" (the weights that read it).
        threshold: vectors no longer than this are removed; `a` when left out.
        fold: multiply batch norms into the layers before them first.
        epochs: passes of training with the penalty.
        finetune: passes after the removal, the learning rate falling to zero.
        lr: learning rate of both.
        optimizer: of both, as in `fit`.
        round_to: wider layers keep a multiple of this many neurons; 1 removes all that are short.

    Raises:
        BadOption: the network has no hidden neurons that could be removed.
        TraceError: the network cannot be traced.
        CompressionError: no vector became that short.
    """
    masked = masked_names(model)
    bake(model)
    if fold:
        fold_batchnorm(model, task.inputs())
    channels = channel_groups(model, task.inputs())
    groups = makers(model, channels) if vectors == "in" else readers(model, channels)
    if not (groups.entries(model) > 0).any():
        raise BadOption(NO_CHANNELS)
    mask_zeros(model, masked)

    def pull(progress: float) -> None:
        groups.add_to_gradients(model, penalty * slope_over_length(groups.norms(model), a))

    task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, after_backward=pull, label="smoothed group lasso")
    bake(model)
    norms, limit = groups.norms(model), a if threshold is None else threshold
    groups.scale(model, groups.spared((norms > limit).float(), norms))
    note(f"vectors from {float(norms[groups.entries(model) > 0].min()):.3g} to {float(norms.max()):.3g} long")
    check_emptied(remove_zero_channels(model, task, round_to), round_to)
    mask_zeros(model, masked)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def smoothed(x: Tensor, a: float) -> Tensor:
    """The penalty `h` of lengths.

    >>> smoothed(torch.tensor([0.0, 0.5, 1.0, 2.0]), 1.0).tolist()
    [0.375, 0.5546875, 1.0, 2.0]
    """
    return torch.where(x >= a, x, -(x**4) / (8 * a**3) + 3 * x**2 / (4 * a) + 3 * a / 8)


def slope_over_length(x: Tensor, a: float) -> Tensor:
    """`h'(x) / x`, by which a vector of length `x` is multiplied to give the gradient; finite at zero.

    >>> slope_over_length(torch.tensor([0.0, 1.0, 2.0]), 1.0).tolist()
    [1.5, 1.0, 0.5]
    """
    return torch.where(x >= a, 1 / x.clamp_min(a), -(x**2) / (2 * a**3) + 3 / (2 * a))
