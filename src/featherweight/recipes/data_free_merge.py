"""Data-free parameter pruning: of two neurons that are nearly the same one goes, and the other takes over its outputs.

Suraj Srinivas, R. Venkatesh Babu, "Data-free parameter pruning for Deep Neural Networks", BMVC 2015, arXiv:1507.06149.
With w_i what makes neuron i (its weights and bias) and a_i what reads it, neurons with w_i = w_j become one by
`a_i <- a_i + a_j`. Otherwise, the activation having slope one at most, the output moves by no more than
`E(y - y')^2 <= a_j^2 |w_i - w_j|^2 E|x|^2`, so the pair with the least `s_ij = <a_j^2> |w_i - w_j|^2` is merged (<.>
the mean over the neurons that read), its row and column brought up to date, and so on.

Departs from the paper: filters of convolutions are merged as well as neurons, x being the patch under the kernel; batch
norm is folded into the layers before it first; where the ratio is not given the number of merges is the knee of the
curve of least saliencies (farthest below its chord), and kept neurons are rounded up. Channels that several layers make
(residual sums) are left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive
from featherweight.catalogue import recipe
from featherweight.core.channels import Channels, channel_groups, remove_channels
from featherweight.core.fit import Optimizers
from featherweight.core.fold import fold_batchnorm
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.layerwise import Stage
from featherweight.core.ledger import note, skip
from featherweight.core.merging import makers, merge, mergeable, outgoing
from featherweight.core.task import Task
from featherweight.core.widths import NO_CHANNELS, check_some, rounded
from featherweight.errors import BadOption

Merge = tuple[int, int]
"""(place of the member that goes, place of the one that takes over)."""


@recipe(
    paper="Srinivas and Babu, BMVC 2015, arXiv:1507.06149",
    family="prune",
    shrinks={"channels"},
    small={"prune_ratio": 0.25, "round_to": 1},
)
def data_free_merge(
    model: nn.Module,
    task: Task,
    *,
    prune_ratio: Fraction | None = None,
    normalise: bool = False,
    round_to: Count = 16,
    finetune: Amount = 0,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Merges those neurons or filters of every layer of which the output changes least, by a bound; looks at no data.

    Args:
        prune_ratio: fraction of the neurons of every layer that go; where the saliencies bend up when left out.
        normalise: compares directions: with a ReLU, neurons that are multiples of each other are the same.
        round_to: wider layers keep a multiple of this many; 1 removes exactly what was asked for.
        finetune: passes at the end (the paper: none).
        lr: learning rate of the fine-tuning.
        optimizer: its optimizer, as in `fit`.

    Raises:
        BadOption: there are no neurons that could be merged.
        TraceError: the network cannot be traced.
        CompressionError: none was.
    """
    fold_batchnorm(model, task.inputs())
    masked = masked_names(model)
    channels = channel_groups(bake(model), task.inputs())
    gone = torch.empty(0, dtype=torch.long)
    found = [stage for stage in mergeable(model, channels, task, scaled=normalise) if one_maker(stage, channels)]
    if not found:
        raise BadOption(NO_CHANNELS)
    for stage in found:
        rows, readers = made(model, stage, channels), outgoing(model, stage)
        merges, saliencies = sequence(rows, readers, normalise)
        count = knee(saliencies) if prune_ratio is None else int(prune_ratio * len(rows))
        order = torch.tensor([member for member, _ in merges[:count]], dtype=torch.long)
        doomed = rounded(channels, stage.members[order], round_to)
        sizes = rows.norm(dim=1).clamp_min(1e-30)
        for member, into in merges[:count]:
            if stage.members[member] in doomed:
                merge(model, stage, member, into, float(sizes[member] / sizes[into]) if normalise else 1.0)
        gone = torch.cat([gone, doomed])
        note(f"{stage.name}: {len(doomed)} of {len(rows)} neurons merged into others")
    check_some(len(gone), channels, round_to)
    remove_channels(model, gone, channels=channels)
    mask_zeros(model, masked)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune") if finetune else model


def one_maker(stage: Stage, channels: Channels) -> bool:
    """Whether one layer alone makes the channels; it is said if not."""
    layers = {maker.name.rpartition(".")[0] for maker in makers(stage, channels)}
    if len(layers) > 1:
        skip(stage.name, f"its channels are made by more than one layer ({', '.join(sorted(layers))})")
    return len(layers) == 1


def made(model: nn.Module, stage: Stage, channels: Channels) -> Tensor:
    """The weights and the bias that make each member, (members, numbers), float64."""
    return torch.cat([maker.rows(model) for maker in makers(stage, channels)], 1).to("cpu", torch.float64)


def sequence(rows: Tensor, readers: Tensor, normalise: bool) -> tuple[list[Merge], Tensor]:
    """All merges, the least saliency first, until one neuron is left; and these saliencies.

    Args:
        rows: what makes each neuron, (neurons, numbers).
        readers: what reads each, (neurons, numbers): `<a^2>` is their mean of squares.
        normalise: compares `w / |w|`, and reads with `|w| a`.
    """
    readers = readers.clone()
    if normalise:
        sizes = rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
        rows, readers = rows / sizes, readers * sizes
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    distance.fill_diagonal_(torch.inf)
    saliency = readers.square().mean(1) * distance  # row: who takes over, column: who goes
    saliency.fill_diagonal_(torch.inf)
    merges, least = [], []
    for _ in range(len(rows) - 1):
        into, member = divmod(int(saliency.argmin()), len(rows))
        merges.append((member, into))
        least.append(float(saliency[into, member]))
        readers[into] += readers[member]
        distance[member], distance[:, member] = torch.inf, torch.inf
        saliency[member], saliency[:, member] = torch.inf, torch.inf
        there = distance[:, into].isfinite()
        saliency[there, into] = readers[into].square().mean() * distance[there, into]
    return merges, torch.tensor(least, dtype=torch.float64)


def knee(saliencies: Tensor) -> int:
    """How many merges come before the bend: the point of the curve that is farthest below its chord.

    >>> knee(torch.tensor([0.0, 0.1, 0.2, 0.3, 5.0, 10.0]))
    4
    """
    if len(saliencies) < 3:
        return int((saliencies <= 0).sum())
    curve = saliencies.double().cummax(0).values
    along = torch.linspace(0, 1, len(curve), dtype=torch.float64)
    up = (curve - curve[0]) / (curve[-1] - curve[0]).clamp_min(1e-300)
    return int((along - up).argmax()) + 1
