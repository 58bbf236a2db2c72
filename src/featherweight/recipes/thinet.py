"""ThiNet: channels whose removal changes the next layer's output least, one by one; the rest rescaled to repair it.

Jian-Hao Luo, Jianxin Wu, Weiyao Lin, "ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression", ICCV
2017, arXiv:1707.06342. An output of the next layer is a sum over its input channels, `y = sum_c x_c` (less its bias,
eq. 3); the set T that goes minimises `sum (sum_{c in T} x_c)^2` (eq. 6), found greedily (algorithm 1), and one scale
for each channel that stays is found by least squares, `w = (X^T X)^-1 X^T y` (eq. 7), and absorbed into its weights.

Departs from the paper: the sum over samples is over all filters at the sampled positions, not over one drawn filter
each; the target is the output of the network as it was given or last fine-tuned, so what earlier layers lost is
repaired too; of channels that several layers read (a residual sum, a concatenation) the relative errors of all
readers are added, where the paper prunes only inside residual blocks; kept channels are rounded up.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.layerwise import Contributions, Refit, prune_layerwise
from featherweight.core.task import Task


def greedy(found: Contributions, count: int) -> Tensor:
    """The places (count,) of the channels that go, in the order in which they do: each raises the error least.

    The error of the channels S that stay is `E - 2 t S + S G S`; without k it is larger by `2 (t_k - G_k S) + G_kk`.
    """
    gram, target = found.gram.numpy(), found.target.numpy()
    missing = target - gram.sum(1)  # what is left of the target, times each channel
    gone: list[int] = []
    for _ in range(count):
        rise = 2 * missing + gram.diagonal()
        rise[gone] = np.inf
        gone.append(int(rise.argmin()))
        missing = missing + gram[:, gone[-1]]
    return torch.tensor(gone, dtype=torch.long)


@recipe(
    paper="Luo et al., ICCV 2017, arXiv:1707.06342",
    family="prune",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"epochs": 0, "finetune": 1, "round_to": 1, "calibration_batches": 2},
)
def thinet(
    model: nn.Module,
    task: Task,
    *,
    prune_ratio: Fraction = 0.5,
    refit: Refit = "scalar",
    ridge: Amount = 1e-4,
    positions: Count = 10,
    calibration_batches: Count = 16,
    round_to: Count = 16,
    epochs: Amount = 1,
    finetune: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = "sgd",
) -> nn.Module:
    """Removes channels, front to back, that the next layer's output misses least, and rescales the others to repair it.

    Args:
        prune_ratio: fraction of the channels of every group that goes, before rounding.
        refit: how the layers that read the channels are repaired: "scalar" (one scale a channel, the paper's), "full"
            (all their weights) or "none".
        ridge: pull towards the weights that are there, as a share of the mean square of the inputs.
        positions: output positions drawn from every sample.
        calibration_batches: how many batches of the calibration (or training) data the sums are over.
        round_to: wider layers keep a multiple of this many channels; 1 removes exactly the fraction.
        epochs: passes of fine-tuning after every group.
        finetune: passes at the end.
        lr: learning rate of both.
        optimizer: of both, as in `fit`.

    Raises:
        TraceError: the network cannot be traced.
        CompressionError: no channel could be removed.
    """
    return prune_layerwise(
        model,
        task,
        greedy,
        prune_ratio=prune_ratio,
        refit=refit,
        ridge=ridge,
        positions=positions,
        calibration_batches=calibration_batches,
        round_to=round_to,
        epochs=epochs,
        finetune=finetune,
        lr=lr,
        optimizer=optimizer,
    )
