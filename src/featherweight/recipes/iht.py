"""Skinny networks by iterative hard thresholding: dense and sparse training in turns."""

from __future__ import annotations

from typing import Literal

from torch import nn

from featherweight.allowed import Amount, Count, Fraction, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.masks import hidden, largest, masks, set_masks, settle, told
from featherweight.core.site import PerLayer, per_layer
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task
from featherweight.prune import ranks_apart


@recipe(
    paper="Jin et al., 2016, arXiv:1607.05423",
    family="prune",
    needs={"labels", "train"},
    shrinks={"weights"},
    rules=(ranks_apart,),
    small={"cycles": 2, "epochs": 2, "finetune": 1},
)
def iht(
    model: nn.Module,
    task: Task,
    *,
    sparsity: PerLayer[Fraction] = 0.9,
    scope: Literal["layer", "global"] = "layer",
    cycles: Count = 3,
    epochs: Amount = 12,
    dense_share: Share = 0.5,
    finetune: Amount = 4,
    lr: Positive = 0.01,
    optimizer: Optimizers = "sgd",
    where: WhereWeighted = None,
) -> nn.Module:
    """Trains all weights, keeps the k largest and trains these, restores the others from zero, and so on.

    Xiaojie Jin, Xiaotong Yuan, Jiashi Feng, Shuicheng Yan, "Training Skinny Deep Neural Networks with Iterative Hard
    Thresholding Methods", 2016. It minimises the loss with at most `k` weights: one cycle trains all connections, sets
    all but the k largest to zero (the Euclidean projection), trains the support alone, then restores every connection,
    at zero, for the next cycle. It ends on a thresholded network.

    Departs from the paper: how the epochs are divided is given by shares, not by rounds until nothing improves; the
    optimizer starts anew in every phase; after the last cycle there are `finetune` epochs in which the learning rate
    falls to zero. What an earlier method masked stays masked.

    Args:
        sparsity: fraction of the weights at zero; or layer patterns with a fraction each, which are ranked apart.
        scope: "layer" keeps the same fraction of every layer, "global" ranks all weights together.
        cycles: how often all connections are trained, thresholded and trained again.
        epochs: training in all cycles together.
        dense_share: share of the epochs in which all connections are trained.
        finetune: epochs after the last cycle, on the support.
        lr: learning rate of all of it.
        optimizer: "sgd" (default), "adam" or "adamw".
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: an option outside its range.
        UnknownName: a pattern matches nothing.
    """
    found, goals = per_layer(model, "sparsity", sparsity, where)
    allowed, support = masks(found), masks(found)
    for cycle in range(cycles):
        set_masks(model, found, allowed)  # all connections; those that were cut start from zero
        task.fit(model, task, epochs=epochs / cycles * dense_share, lr=lr, optimizer=optimizer, decay="constant",
                 label=f"dense {cycle + 1}/{cycles}")  # fmt: skip
        before, size = support, {path: hidden(site).abs() for path, site in found.items()}
        support = largest(size, goals, within=allowed, together=scope == "global")
        set_masks(model, found, support)
        settle(model, found)
        task.fit(model, task, epochs=epochs / cycles * (1 - dense_share), lr=lr, optimizer=optimizer, decay="constant",
                 label=f"sparse {cycle + 1}/{cycles}")  # fmt: skip
        changed = sum(int((support[path] & ~before[path]).sum()) for path in found)
        note(f"cycle {cycle + 1}: {changed} weights came into the support")
    settle(model, found)
    note(told(found))
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")
