"""Sparse connections by neural correlation: layer after layer, from the last to the first."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.capture import UNCALLED, called
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note, skip
from featherweight.core.masks import settle, told
from featherweight.core.site import PerLayer, Site, per_layer
from featherweight.core.study import Study
from featherweight.core.surgery import WhereLinearOrConv2d
from featherweight.core.task import Task, eval_mode, run
from featherweight.errors import BadData, BadOption

TYPES = (nn.Linear, nn.Conv2d)


@recipe(
    paper="Sun et al., CVPR 2016, arXiv:1512.01891",
    family="prune",
    needs={"labels", "train"},
    shrinks={"weights"},
    small={"epochs": 1, "finetune": 1, "calibration_batches": 2},
)
def neural_correlation(
    model: nn.Module,
    task: Task,
    *,
    sparsity: PerLayer[Fraction] = 0.88,
    upper: Share = 0.75,
    positions: Count = 64,
    calibration_batches: Count = 8,
    epochs: Amount = 8,
    finetune: Amount = 4,
    lr: Positive = 0.01,
    optimizer: Optimizers = "sgd",
    where: WhereLinearOrConv2d = None,
) -> nn.Module:
    """Keeps, of each neuron's connections, mostly those whose two ends are correlated; retrains; goes a layer back.

    Yi Sun, Xiaogang Wang, Xiaoou Tang, "Sparsifying Neural Network Connections for Face Recognition", CVPR 2016. For
    the connection of neuron `i` (activation a) with neuron `k` of the layer before (activation b),
    `r = E[(a - mu_a)(b - mu_b)] / (sigma_a sigma_b)`; in convolutions, the mean of |r| over the positions that share
    the weight. Connections with positive and with negative r are chosen apart: sorted by |r| and halved, a share
    `upper` of what is kept is drawn at random from the upper half, the rest from the lower. One layer at a time, the
    last first, each time from the denser network, with retraining in between.

    Departs from the paper: it sparsifies fully and locally connected layers first and some convolutions later; here all
    chosen layers take their turn from the last to the first. Positions of a convolution are a sample of `positions` of
    them where there are more. Where a half has too few connections the other gives more. What an earlier method masked
    stays masked.

    Args:
        sparsity: fraction of every neuron's connections removed; or layer patterns with a fraction each.
        upper: share of the kept connections that comes from the half with the higher correlations, lambda.
        positions: at how many positions of a convolution correlations are taken, at most.
        calibration_batches: batches over which correlations are taken; labels are not looked at.
        epochs: retraining after all layers together.
        finetune: epochs after the last layer, the learning rate falling to zero.
        lr: learning rate of both.
        optimizer: "sgd" (default), "adam" or "adamw".
        where: which linear and 2d convolution layers; all when left out.

    Raises:
        BadOption: an option outside its range, or no chosen layer is called.
        BadData: activations are not finite, or a layer sees inputs of several sizes.
    """
    found, goals = per_layer(model, "sparsity", sparsity, where, types=TYPES)
    found = in_turn(model, task, found)
    for turn, (path, site) in enumerate(found.items(), 1):
        r = correlations(model, task, site, calibration_batches, positions)
        keep = select(r.flatten(1), site.keep.flatten(1), 1 - goals[path], upper).view_as(site.keep)
        site.set_mask(model, keep)
        note(f"{path}: mean |r| {float(r.abs().mean()):.3f}, of what is kept {float(r[keep].abs().mean()):.3f}")
        task.fit(model, task, epochs=epochs / len(found), lr=lr, optimizer=optimizer, decay="constant",
                 label=f"retrain {turn}/{len(found)}: {path}")  # fmt: skip
    settle(model, found)
    note(told(found))
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def in_turn(model: nn.Module, task: Task, found: Mapping[str, Site]) -> dict[str, Site]:
    """The layers by the order in which a pass through the model calls them, the last first; without others.

    Raises:
        BadOption: it calls none of them.
    """
    order = {module: place for place, module in enumerate(called(model, task.inputs()))}
    for path, site in found.items():
        if site.module not in order:
            skip(path, UNCALLED)
    able = {path: site for path, site in found.items() if site.module in order}
    if not able:
        raise BadOption(f"no chosen layer has inputs and outputs to correlate: {next(iter(found))}: {UNCALLED}")
    return dict(sorted(able.items(), key=lambda one: -order[one[1].module]))


# --- correlations -----------------------------------------------------------------------------------------------------


def correlations(model: nn.Module, task: Task, site: Site, batches: int, positions: int) -> Tensor:
    """r of every connection, of the weight's shape, float64, in [-1, 1]; 0 where one of the ends never changes.

    In convolutions (and linear layers that see several rows of a sample) the mean of |r| over positions.
    """
    study = Study(model, task, [site.path], batches)
    sums = _Sums()
    inputs: list[Tensor] = []

    def remember(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        inputs.append((args[0] if args else kwargs["input"]).detach())

    def see(path: str, output: Tensor) -> Tensor:
        ends = study.activated(path, output)
        both = _by_position(site.module, inputs.pop(0), ends, positions)
        if sums.count and both[0].shape[1] != len(sums.centre[0]):
            raise BadData(f"{path} sees inputs of several sizes, whose positions do not correspond: pass data of one "
                          "size, or leave the layer out by where=")  # fmt: skip
        sums.add(*both)
        return output

    with eval_mode(model), study.seen(see):  # which traces the model: the hook comes after
        handle = site.module.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            for batch in study.batches():
                run(model, task, batch)
        finally:
            handle.remove()
    r = sums.correlation()  # (positions, groups, outputs of a group, inputs of a group)
    if not torch.isfinite(r).all():
        raise BadData(f"the activations around {site.path} are not finite: check the data and the weights")
    return (r.squeeze(0) if len(r) == 1 else r.abs().mean(0)).reshape(site.weight.shape)


def _by_position(layer: nn.Module, inputs: Tensor, outputs: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The ends of connections: outputs (samples, positions, groups, o), inputs (samples, positions, groups, i).

    Of many positions every so-manyth, at most `most` of them.
    """
    if isinstance(layer, nn.Conv2d):
        inputs = _patches(layer, inputs).movedim(-1, 1)  # (samples, positions, inputs times kernel)
        outputs = outputs.flatten(2).movedim(-1, 1)
    else:
        inputs, outputs = (t.reshape(len(t), -1, t.shape[-1]) for t in (inputs, outputs))
    groups = getattr(layer, "groups", 1)
    step = -(-inputs.shape[1] // most)
    inputs, outputs = (t[:, ::step].double().unflatten(2, (groups, -1)) for t in (inputs, outputs))
    return outputs, inputs


def _patches(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """What each position of a convolution sees, (samples, inputs times kernel, positions)."""
    across = [side for pair in reversed(_padding(layer)) for side in pair]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, across, mode=mode) if any(across) else inputs
    return F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)


def _padding(layer: nn.Conv2d) -> list[tuple[int, int]]:
    """Before and after, for height and width."""
    if layer.padding == "valid":
        return [(0, 0), (0, 0)]
    if layer.padding == "same":  # torch puts the odd one after
        whole = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(one // 2, one - one // 2) for one in whole]
    return [(int(p), int(p)) for p in layer.padding]


class _Sums:
    """Sums over samples from which correlations follow, taken relative to the first samples' means: they stay small."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    def add(self, a: Tensor, b: Tensor) -> None:
        if not self.count:
            self.centre = a.mean(0), b.mean(0)
        a, b = a - self.centre[0], b - self.centre[1]
        both = torch.einsum("npgo,npgi->pgoi", a, b)
        new = [a.sum(0), b.sum(0), a.square().sum(0), b.square().sum(0), both]
        self.sums = [old + one for old, one in zip(self.sums, new, strict=True)] if self.count else new
        self.count += len(a)

    def correlation(self) -> Tensor:
        """(positions, groups, o, i)."""
        a, b, aa, bb, ab = (one.cpu() / self.count for one in self.sums)
        covariance = ab - a.unsqueeze(3) * b.unsqueeze(2)
        spread = ((aa - a.square()).clamp_min(0).unsqueeze(3) * (bb - b.square()).clamp_min(0).unsqueeze(2)).sqrt()
        still = ((aa - a.square()) <= 1e-12 * aa).unsqueeze(3) | ((bb - b.square()) <= 1e-12 * bb).unsqueeze(2)
        return torch.where(still, 0.0, covariance / spread).clamp(-1, 1)


# --- selection --------------------------------------------------------------------------------------------------------


def select(r: Tensor, allowed: Tensor, share: float, upper: float) -> Tensor:
    """Which connections of each neuron stay, (neurons, connections): `round(share K)` of its K, at least one.

    Of those with r >= 0 and of those below, a number in proportion; of each, `upper` of them from the half with the
    larger |r|, at random.
    """
    total = max(1, round(share * r.shape[1]))
    positive, negative = allowed & (r >= 0), allowed & (r < 0)
    wanted = torch.minimum(allowed.sum(1), torch.tensor(total))
    of_positive = (wanted * positive.sum(1) / allowed.sum(1).clamp_min(1)).round().long()
    keep = torch.zeros_like(allowed)
    for group, count in ((positive, of_positive), (negative, wanted - of_positive)):
        keep |= _from_halves(r.abs(), group, count, upper)
    return keep


def _from_halves(size: Tensor, group: Tensor, count: Tensor, upper: float) -> Tensor:
    """`count` of the group's members in each row: a share from its upper half, the rest from its lower one."""
    place = _places(torch.where(group, -size, torch.inf))
    members = group.sum(1)
    half = (members + 1) // 2
    top = group & (place < half.unsqueeze(1))
    from_top = torch.minimum((upper * count).round().long(), half)
    from_top = torch.maximum(from_top, count - (members - half))  # what the lower half cannot give
    return _drawn(top, from_top) | _drawn(group & ~top, count - from_top)


def _drawn(candidates: Tensor, count: Tensor) -> Tensor:
    """`count` candidates of each row, at random."""
    luck = torch.where(candidates, torch.rand(candidates.shape), torch.inf)
    return candidates & (_places(luck) < count.unsqueeze(1))


def _places(values: Tensor) -> Tensor:
    """The place of each entry in its sorted row."""
    return values.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
