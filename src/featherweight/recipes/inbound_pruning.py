"""Inbound pruning: every filter stops reading the inputs that bring it little more than a constant.

Adam Polyak, Lior Wolf, "Channel-level acceleration of deep face representations", IEEE Access 3, 2015: the first of
its two methods removes, for every filter, the input channels whose contribution is least active over data. Channel i
adds `X_oi = W[o, i] * x_i` to the output of filter o; its score is `Var(X_oi)` over samples and positions, and a
contribution that does not vary is a constant that the bias can take over.

Departs from the paper: its exact saliency could not be verified (possibly the variance over samples of the norm of a
contribution); the means of what is dropped go into the bias (compensation), and a layer without one gets one; variances
are taken over sampled positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.layerwise import Sums, called, unfit
from featherweight.core.ledger import note, skip
from featherweight.core.masks import largest, write
from featherweight.core.reconstruct import Moments, augmented
from featherweight.core.site import PerLayer, Site, per_layer
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task


@recipe(
    paper="Polyak and Wolf, IEEE Access 2015",
    family="prune",
    needs={"labels", "train"},
    shrinks={"weights"},
    small={"calibration_batches": 2, "epochs": 0, "finetune": 1},
)
def inbound_pruning(
    model: nn.Module,
    task: Task,
    *,
    sparsity: PerLayer[Fraction] = 0.5,
    compensate: bool = True,
    positions: Count = 10,
    calibration_batches: Count = 16,
    epochs: Amount = 1,
    finetune: Amount = 4,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    where: WhereWeighted = None,
) -> nn.Module:
    """Masks, layer by layer from the first, the kernels of every filter whose contribution varies least over data.

    Args:
        sparsity: fraction of its kernels that every filter loses (of a linear layer: of its weights); one stays. Or
            layer patterns with a fraction each.
        compensate: the mean of what is dropped goes into the bias.
        positions: output positions drawn from every sample.
        calibration_batches: how many batches of the calibration (or training) data the variances are from.
        epochs: passes of fine-tuning after every layer.
        finetune: passes at the end.
        lr: learning rate of both.
        optimizer: of both, as in `fit`.
        where: which layers; all linear and convolution layers when left out.

    Raises:
        UnknownName: a pattern matches nothing.
    """
    found, goals = per_layer(model, "sparsity", sparsity, where)
    order = called(model, task)
    for path in [path for path in found if unfit(model, path, order)]:
        skip(path, unfit(model, path, order))
        del found[path]
    for path in (path for path in order if path in found):
        site, layer = found[path], found[path].module
        moments = Sums(model, model, task, positions, calibration_batches).of(path)
        inputs, columns = site.weight.shape[1], site.weight[0].numel()
        kernels = torch.arange(inputs).repeat_interleave(columns // inputs)
        kept = most_active(variances(moments, augmented(layer), kernels), site.keep, goals[path])
        if compensate:
            take_over(model, site, constants(moments, augmented(layer), kept.flatten(1)))
        if not kept.all():
            site.set_mask(model, kept)
        note(f"{path}: {float((~kept).double().mean()):.1%} of its weights masked, by kernels")
        if epochs:
            task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label=path)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def variances(moments: Moments, weight: Tensor, kernels: Tensor) -> Tensor:
    """The variance of every contribution (outputs, input channels); `kernels` (columns,) is each column's channel.

    `Var(X_oi) = W[o, i] C_i W[o, i]^T`, C_i the covariance of the inputs under the kernel.
    """
    mean = moments.xx[-1, :-1] / moments.n
    covariance = moments.xx[:-1, :-1] / moments.n - torch.outer(mean, mean)
    found = []
    for channel in range(int(kernels.max()) + 1):
        at = (kernels == channel).nonzero().flatten()
        part = weight[:, at]
        found.append((part @ covariance[at][:, at] * part).sum(1))
    return torch.stack(found, 1).clamp_min(0)


def most_active(scores: Tensor, keep: Tensor, sparsity: float) -> Tensor:
    """What stays of a weight (outputs, channels, ...): of every filter its most active kernels, as many of each."""
    alive = keep.flatten(2).any(2) if keep.dim() > 2 else keep
    rows = {str(o): row for o, row in enumerate(scores)}
    kept = largest(rows, dict.fromkeys(rows, sparsity), within={o: alive[int(o)] for o in rows})
    return torch.stack(list(kept.values())).view(*scores.shape, *[1] * (keep.dim() - 2)) & keep


def constants(moments: Moments, weight: Tensor, kept: Tensor) -> Tensor:
    """The mean (outputs,) of the contributions that are dropped."""
    mean = moments.xx[-1, :-1] / moments.n
    return (weight[:, :-1] * ~kept) @ mean


def take_over(model: nn.Module, site: Site, constant: Tensor) -> None:
    """Adds constants to a layer's bias; a layer without one gets one."""
    layer, weight = site.module, site.weight
    if isinstance(layer.bias, Tensor):
        bias = Site(site.path, layer, "bias")
        write(bias, bias.weight + constant.to(weight))
    else:
        layer.bias = nn.Parameter(constant.to(weight))
        layer._fw_swapped = True  # type: ignore[assignment]  # the container rebuilds this layer with its new bias
