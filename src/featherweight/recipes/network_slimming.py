"""Network slimming: train batch-norm scales towards zero, remove the channels with the smallest, fine-tune."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive
from featherweight.catalogue import recipe
from featherweight.core.channels import Channels, channel_groups, remove_channels
from featherweight.core.fit import Optimizers
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.task import Task
from featherweight.core.widths import check_some, rounded, smallest
from featherweight.errors import BadOption

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


@recipe(
    paper="Liu et al., ICCV 2017, arXiv:1708.06519",
    family="prune",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"epochs": 1, "finetune": 1, "round_to": 1},
)
def network_slimming(
    model: nn.Module,
    task: Task,
    *,
    prune_ratio: Fraction = 0.5,
    penalty: Amount = 1e-4,
    epochs: Amount = 10,
    finetune: Amount = 10,
    lr: Positive = 0.05,
    optimizer: Optimizers = "sgd",
    round_to: Count = 16,
    coupled: Literal["max", "mean", "sum"] = "max",
) -> nn.Module:
    """Minimises `loss + penalty sum |gamma|` (eq. 1) by subgradient, then removes channels below one global threshold.

    Departs from the paper: channels that a residual sum couples have one score, the largest |gamma| of their norms,
    and go together, where the paper keeps the sum whole and selects behind it; kept channels are rounded up, since
    runtimes compute whole vectors of them; fine-tuning starts at the learning rate of training;
    one pass, run the method again for more.

    Args:
        prune_ratio: fraction of all channels below the threshold; rounding and the rule that no layer is emptied
            let some of them stay.
        penalty: strength of the pull on the scales, lambda.
        epochs: passes of sparse training.
        finetune: passes after the removal.
        lr: learning rate of both.
        optimizer: of both, as in `fit`.
        round_to: wider layers keep a multiple of this many channels: ONNX Runtime computes 16 at once with AVX-512, 8
            with AVX2; 1 removes exactly what the threshold says.
        coupled: how the scores of coupled norms become one: max, mean or sum.

    Raises:
        BadOption: the network has no batch norm with scales.
        TraceError: the network cannot be traced.
        CompressionError: no channel could be removed.
    """
    norms = scaled_norms(model)

    def pull(progress: float) -> None:
        for norm in norms.values():
            if norm.weight.grad is not None:
                norm.weight.grad.add_(norm.weight.detach().sign(), alpha=penalty)

    task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, after_backward=pull, label="sparse training")

    masked = masked_names(model)
    channels = channel_groups(bake(model), task.inputs())
    doomed = rounded(channels, smallest(channel_scores(channels, norms, coupled), prune_ratio), round_to)
    check_some(len(doomed), channels, round_to)
    remove_channels(model, doomed, channels=channels)
    mask_zeros(model, masked)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def scaled_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """The batch norms that have trainable scales, by path.

    Raises:
        BadOption: there are none.
    """
    norms = {p: m for p, m in model.named_modules() if isinstance(m, BatchNorm) and m.affine}
    if not norms:
        raise BadOption(
            "network_slimming ranks channels by the scales of batch norms, and the model has none: choose a method "
            "that ranks weights, such as magnitude_iterative, or one that factorizes them, such as tucker2_vbmf"
        )
    return norms


def channel_scores(channels: Channels, norms: Mapping[str, BatchNorm], coupled: str) -> Tensor:
    """One score per channel (count,), from the |gamma| of the norms that it passes; infinite where it passes none."""
    members = [(channels.axes.get((f"{path}.weight", 0)), norm.weight.detach().abs()) for path, norm in norms.items()]
    found = [(ids[ids >= 0], scale.cpu().double()[ids >= 0]) for ids, scale in members if ids is not None]
    blank = torch.full((channels.count,), torch.inf, dtype=torch.float64)
    if not found:
        return blank
    where, values = torch.cat([ids for ids, _ in found]), torch.cat([scale for _, scale in found])
    kind = {"max": "amax", "mean": "mean", "sum": "sum"}[coupled]
    return blank.scatter_reduce(0, where, values, kind, include_self=False)
