"""Structured sparsity learning: a group lasso empties filters, channels, shapes and whole layers while training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from featherweight.allowed import Amount, Count, Positive
from featherweight.catalogue import recipe
from featherweight.core.channels import channel_groups
from featherweight.core.columns import live_columns
from featherweight.core.emptied import remove_zero_branches, remove_zero_channels
from featherweight.core.fit import DECAYS, Optimizers
from featherweight.core.fold import fold_batchnorm
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.groups import Groups, makers, readers, shapes, wholes
from featherweight.core.ledger import note
from featherweight.core.residual import branches
from featherweight.core.site import sites
from featherweight.core.task import Task
from featherweight.errors import BadOption, CompressionError


@recipe(
    paper="Wen et al., NIPS 2016, arXiv:1608.03665",
    family="prune",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"filter_penalty": 0, "channel_penalty": 3.0, "epochs": 6, "finetune": 2, "lr": 0.02, "round_to": 1},
)
def ssl(
    model: nn.Module,
    task: Task,
    *,
    filter_penalty: Amount = 1e-3,
    channel_penalty: Amount = 1e-3,
    shape_penalty: Amount = 0.0,
    depth_penalty: Amount = 0.0,
    step: Literal["proximal", "gradient"] = "proximal",
    threshold: Amount = 1e-4,
    fold: bool = True,
    epochs: Amount = 20,
    finetune: Amount = 10,
    lr: Positive = 0.01,
    optimizer: Optimizers = "sgd",
    round_to: Count = 16,
) -> nn.Module:
    """Trains with `sum_kind penalty * sum_g ||w_g||` over groups of weights; removes the groups that are zero.

    Wei Wen, Chunpeng Wu, Yandan Wang, Yiran Chen, Hai Li, "Learning Structured Sparsity in Deep Neural Networks",
    NIPS 2016, eq. 2 to 5. Groups: the filters that make a channel; the weights that read it; the shape `W[:, i, y, x]`
    (the same place in every filter of a layer); the depth, all that a shortcut goes around. After every step of the
    optimizer the proximal step `w_g <- max(0, 1 - lr * penalty / ||w_g||) w_g`, kind after kind, makes exact zeros.
    Then channels whose filters, or whose readers, are zero are removed (what a filter of zeros still puts out, its
    bias, moves into the next layer), blocks lose branches that are zero, shapes that are zero are masked.

    Departs from the paper: by default a proximal step, where the paper descends a gradient and thresholds (that is
    step="gradient"); of groups that overlap (a filter and a shape) the proximal steps are taken in turn, which is not
    the proximal step of their sum but converges with the learning rate (Bertsekas, Math. Prog. 129, 2011); batch norms
    are folded first, because behind them the size of a filter means nothing; filters that a residual sum couples are
    one group; depth is a whole branch with its biases, where the paper takes layer by layer; under momentum the
    gradient of the loss counts `1 / (1 - momentum)` times, the penalty once; the strengths are ours.

    Args:
        filter_penalty: on the filters that make a channel; 0 leaves them alone.
        channel_penalty: on the weights that read a channel.
        shape_penalty: on the same place in every filter. Shapes are masked: runtimes that multiply matrices of
            patches can leave out their rows, others save only bytes.
        depth_penalty: on all weights and biases of a residual branch.
        step: "proximal" gives exact zeros, "gradient" adds the penalty's gradient, and groups end up near zero.
        threshold: with the gradient: groups whose weights have a root mean square below are zero in the end.
        fold: multiply batch norms into the layers before them first.
        epochs: passes of training with the penalty.
        finetune: passes after the removal, the learning rate falling to zero.
        lr: learning rate of both.
        optimizer: of both, as in `fit`.
        round_to: wider layers keep a multiple of this many channels; 1 removes all that are zero.

    Raises:
        BadOption: all penalties are zero, or there are no groups of a kind that has one.
        TraceError: the network cannot be traced.
        CompressionError: no group became zero.
    """
    masked = masked_names(model)
    bake(model)
    if fold:
        fold_batchnorm(model, task.inputs())
    strengths = {"filter": filter_penalty, "channel": channel_penalty, "shape": shape_penalty, "depth": depth_penalty}
    kinds = groups_of(model, task, [kind for kind, strength in strengths.items() if strength])
    mask_zeros(model, masked)

    def shrink(progress: float) -> None:
        for kind, groups in kinds.items():
            groups.shrink(model, lr * DECAYS["cosine"](progress) * strengths[kind])

    def pull(progress: float) -> None:
        for kind, groups in kinds.items():
            norms = groups.norms(model)
            groups.add_to_gradients(model, torch.where(norms > 0, strengths[kind] / norms, 0.0))

    task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="group lasso",
             after_backward=pull if step == "gradient" else None,
             after_step=shrink if step == "proximal" else None)  # fmt: skip
    if step == "gradient":
        for groups in kinds.values():
            norms = groups.norms(model)
            keep = norms > threshold * groups.entries(model).sqrt()
            groups.scale(model, groups.spared(keep.float(), norms))
    zeros = {kind: int(groups.zero(model).sum()) for kind, groups in kinds.items()}
    for kind, count in zeros.items():
        note(f"{kind}: {count} of {int((kinds[kind].entries(model) > 0).sum())} groups are zero")
    if not any(zeros.values()):
        raise CompressionError("no group of weights became zero: raise the penalties, lr or epochs")

    bake(model)
    if depth_penalty:
        remove_zero_branches(model, task)
    remove_zero_channels(model, task, round_to)
    mask_zeros(model, masked)
    if shape_penalty:
        mask_zero_shapes(model)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def groups_of(model: nn.Module, task: Task, kinds: Sequence[str]) -> dict[str, Groups]:
    """The groups of every kind: "filter", "channel", "shape", "depth".

    Raises:
        BadOption: there are no groups of a kind, or no kinds.
    """
    if not kinds:
        raise BadOption(
            "all penalties are zero: pass a filter_penalty, channel_penalty, shape_penalty or depth_penalty"
        )
    channels = channel_groups(model, task.inputs()) if {"filter", "channel"} & set(kinds) else None
    found: dict[str, Groups] = {}
    if channels is not None:
        found |= {"filter": makers(model, channels), "channel": readers(model, channels)}
    if "shape" in kinds:
        found["shape"] = shapes(sites(model))
    if "depth" in kinds:
        found["depth"] = wholes(model, [branch.layers for branch in branches(model, task.inputs())])
    for kind in kinds:
        if not (found[kind].entries(model) > 0).any():
            raise BadOption(f"the network has no groups of the kind {kind} that could be removed: {CURES[kind]}")
    return {kind: found[kind] for kind in kinds}


CURES = {
    "filter": "choose a method that masks weights, such as magnitude_iterative",
    "channel": "choose a method that masks weights, such as magnitude_iterative",
    "shape": "it has no linear or convolution layers",
    "depth": "depth_penalty needs blocks that are modules of their own and add a branch to a shortcut",
}


def mask_zero_shapes(model: nn.Module) -> None:
    """Masks the shapes that are zero in every filter of a layer, and tells how many there are."""
    for path, site in sites(model).items():
        gone = (site.weight == 0).all(0, keepdim=True) & (not isinstance(site.module, nn.ConvTranspose2d))
        if gone.any():
            site.set_mask(model, site.keep & ~gone.cpu().expand(site.weight.shape))
            left = int(live_columns(site.weight).sum())
            note(f"{path}: {left} of {gone.numel()} rows of the matrix of patches are left")
