"""Channel pruning by LASSO regression and least squares.

Yihui He, Xiangyu Zhang, Jian Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017,
arXiv:1707.06168. Channels are chosen by `min_beta 1/2N |Y - sum_i beta_i X_i W_i^T|^2 + lambda |beta|_1` (eq. 2, 3),
lambda raised until no more than c' of them are left; then W is found by least squares on the channels that stay
(eq. 4). Y are the outputs of the original network, X the inputs behind the layers that were pruned before.

Departs from the paper: LARS finds the whole path of the LASSO exactly, where the paper raises lambda step by step; (i)
and (ii) are done once, as the authors do in practice; sums over all sampled positions instead of a subset for the
LASSO; of channels that several layers read (a residual sum, a concatenation) the relative errors of all readers are
added and all are refitted, where the paper samples channels at the entry of a block and corrects its last layer; kept
channels are rounded up.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.layerwise import Contributions, Refit, prune_layerwise
from featherweight.core.task import Task


def lasso(found: Contributions, count: int) -> Tensor:
    """The places (count,) of the channels that go: those that the LASSO leaves at zero, late comers first.

    The path runs from no channels to all; its last point with no more than the wanted number of channels is taken (the
    least lambda that is enough), and what is missing there is filled up with those that are nonzero for longest.
    """
    size = lasso_path(found).abs()
    wanted = len(size) - count
    last = int(((size > 0).sum(0) <= wanted).nonzero().max())
    often = (size > 0).sum(1)
    order = sorted(range(len(size)), key=lambda c: (float(size[c, last]), int(often[c])))
    return torch.tensor(order[:count], dtype=torch.long)


def lasso_path(found: Contributions) -> Tensor:
    """The coefficients (channels, points) along the whole path, from all zero; for weights with |W_i|_F = 1."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import lars_path_gram

    unit = torch.where(found.sizes > 0, found.sizes.rsqrt(), 0.0)
    gram, target = unit[:, None] * found.gram * unit, unit * found.target
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of equal channels one enters, which is what we want
        path = lars_path_gram(target.numpy(), gram.numpy(), n_samples=1, method="lasso", alpha_min=0)[2]
    return torch.from_numpy(path)


@recipe(
    paper="He et al., ICCV 2017, arXiv:1707.06168",
    family="prune",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"finetune": 1, "round_to": 1, "calibration_batches": 2},
)
def lasso_channel(
    model: nn.Module,
    task: Task,
    *,
    prune_ratio: Fraction = 0.5,
    refit: Refit = "full",
    ridge: Amount = 1e-4,
    positions: Count = 10,
    calibration_batches: Count = 16,
    round_to: Count = 16,
    epochs: Amount = 0,
    finetune: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = "sgd",
) -> nn.Module:
    """Chooses channels, front to back, by LASSO on what they add to the next layer, and refits that by least squares.

    Args:
        prune_ratio: fraction of the channels of every group that goes, before rounding.
        refit: how the layers that read the channels are repaired: "full" (all their weights, the paper's), "scalar"
            (one scale a channel) or "none".
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
        lasso,
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
