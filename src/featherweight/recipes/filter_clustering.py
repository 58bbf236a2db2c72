"""Filter clustering: filters that are alike become one, as they are, or after training has drawn them together.

(a) `mode="merge"`: the filters of a layer are clustered, the member nearest to each centre stays, and what reads the
others is added to what reads it; no data are looked at. With `normalise` directions are clustered, and what reads a
removed filter is added `|F_removed| / |F_kept|` times, which a ReLU allows (F with the bias).

(b) `mode="centripetal"`: Xiaohan Ding, Guiguang Ding, Yuchen Guo, Jungong Han, "Centripetal SGD for Pruning Very Deep
Convolutional Networks with Complicated Structure", CVPR 2019, arXiv:1904.03837. Every filter of a cluster H moves by
`F_j += tau (-mean_{k in H} dL/dF_k - eta F_j + eps (mean_{k in H} F_k - F_j))` (eq. 4), so that its members become the
same while the network trains, and trimming them loses nothing. Biases and batch norms of the filters move likewise.

Departs from the paper: of layers that a residual sum couples, the filters that make one channel are clustered together,
where the paper lets all follow one layer; momentum applies to the whole step; what distance is left at the end is
removed by taking the mean of each cluster, and said, batch norms taking their statistics anew; kept filters are
rounded up.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive
from featherweight.catalogue import recipe
from featherweight.core.channels import Channels, channel_groups, remove_channels
from featherweight.core.fit import Optimizers
from featherweight.core.fold import fold_batchnorm
from featherweight.core.forms import bake, mask_zeros, masked_names
from featherweight.core.layerwise import Stage
from featherweight.core.ledger import note
from featherweight.core.merging import Maker, makers, merge, mergeable
from featherweight.core.norms import settle_norms
from featherweight.core.task import Task
from featherweight.core.trace import weight_tensors
from featherweight.core.widths import NO_CHANNELS, check_some, fewer, rounded
from featherweight.errors import BadOption

Cluster = Literal["kmeans", "agglomerative", "even"]


@recipe(
    paper="Ding et al., CVPR 2019, arXiv:1904.03837",
    family="prune",
    shrinks={"channels"},
    small={"mode": "merge", "prune_ratio": 0.25, "round_to": 1, "finetune": 0},
)
def filter_clustering(
    model: nn.Module,
    task: Task,
    *,
    prune_ratio: Fraction = 0.5,
    mode: Literal["merge", "centripetal"] = "centripetal",
    cluster: Cluster = "kmeans",
    normalise: bool = False,
    epsilon: Amount = 3e-3,
    decay: Amount = 1e-4,
    momentum: Fraction = 0.9,
    epochs: Amount = 10,
    round_to: Count = 16,
    finetune: Amount = 4,
    lr: Positive = 0.05,
    optimizer: Optimizers = "sgd",
) -> nn.Module:
    """Clusters the filters of every layer, makes each cluster one filter, and fine-tunes.

    Args:
        prune_ratio: fraction of the filters of every layer that go: there are as many clusters as stay.
        mode: "merge" as they are (batch norm folded first); "centripetal" trains until those of a cluster are the same,
            and needs labels.
        cluster: "kmeans", "agglomerative" (average linkage), or "even": in the order of their numbers.
        normalise: clusters directions; only in "merge".
        epsilon: the pull towards the centre of the cluster.
        decay: weight decay of the centripetal training, eta.
        momentum: its momentum.
        epochs: passes of centripetal training.
        round_to: wider layers keep a multiple of this many filters; 1 removes exactly the fraction.
        finetune: passes at the end.
        lr: learning rate of both trainings.
        optimizer: of the fine-tuning, as in `fit`.

    Raises:
        BadOption: there are no filters that could be merged, or directions are to be compared while training.
        TraceError: the network cannot be traced.
        CompressionError: none was.
        MissingNeed: training without training data.
    """
    if normalise and mode == "centripetal":
        raise BadOption(
            'normalise compares directions, which training does not make one: leave it out, or mode="merge"'
        )
    if mode == "merge":
        fold_batchnorm(model, task.inputs())
    masked = masked_names(model)
    channels = channel_groups(bake(model), task.inputs())
    found = mergeable(model, channels, task, scaled=normalise)
    if not found:
        raise BadOption(NO_CHANNELS)
    how: dict[str, Any] = {"cluster": cluster, "mode": mode, "normalise": normalise}
    stays = [fewer(len(stage.members), prune_ratio, round_to) for stage in found]
    plans = [planned(model, stage, channels, stay=stay, **how) for stage, stay in zip(found, stays, strict=True)]
    if mode == "centripetal":
        train(model, task, plans, epsilon=epsilon, decay=decay, momentum=momentum, epochs=epochs, lr=lr)
    trims = [plan.trims(model, normalise) for plan in plans]
    order = torch.cat([plan.stage.members[[t.gone for t in some]] for plan, some in zip(plans, trims, strict=True)])
    gone = rounded(channels, order, round_to)
    for plan, some in zip(plans, trims, strict=True):
        for t in some:
            if plan.stage.members[t.gone] in gone:
                merge(model, plan.stage, t.gone, t.into, t.scale)
    check_some(len(gone), channels, round_to)
    remove_channels(model, gone, channels=channels)
    mask_zeros(model, masked)
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune") if finetune else model


@final
@dataclass(frozen=True)
class Plan:
    """The clusters of a stage: `labels` (members,) say to which each filter belongs, `makers` what makes filters."""

    stage: Stage
    makers: list[Maker]
    labels: Tensor

    def means(self, rows: Tensor) -> Tensor:
        """The mean of its cluster for every member, of the shape of `rows` (members, numbers)."""
        member = nn.functional.one_hot(self.labels).to(rows)
        return member @ (member.mT @ rows / member.sum(0)[:, None].clamp_min(1))

    def trims(self, model: nn.Module, normalise: bool) -> list[Trim]:
        """Who goes, and which of its cluster takes over: the nearest to the centre. The nearest to that go first."""
        rows, sizes = filters(model, self.makers, normalise), filters(model, self.makers, False).norm(dim=1)
        best: dict[int, int] = {}
        for member in (rows - self.means(rows)).norm(dim=1).argsort(stable=True).tolist():
            best.setdefault(int(self.labels[member]), member)
        pairs = [(member, best[label]) for member, label in enumerate(self.labels.tolist()) if member != best[label]]
        pairs.sort(key=lambda pair: float((rows[pair[0]] - rows[pair[1]]).norm()))
        return [Trim(a, b, float(sizes[a] / sizes[b].clamp_min(1e-30)) if normalise else 1.0) for a, b in pairs]


@final
@dataclass(frozen=True)
class Trim:
    """A member that goes, the one that takes over, and how many times."""

    gone: int
    into: int
    scale: float


def filters(model: nn.Module, made: list[Maker], normalise: bool) -> Tensor:
    """What makes each member, (members, numbers), float64; of length one with `normalise`."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rows = torch.cat([maker.rows(model) for maker in made if maker.name in parameters], 1).to("cpu", torch.float64)
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30) if normalise else rows


def planned(
    model: nn.Module,
    stage: Stage,
    channels: Channels,
    *,
    stay: int,
    cluster: Cluster,
    mode: str,
    normalise: bool,
) -> Plan:
    """The clusters of a stage: by all that makes a filter where it is merged as it is, else by its weights."""
    made = makers(stage, channels)
    weights = weight_tensors(model)
    ranked = [maker for maker in made if mode == "merge" or weights[maker.name].dim() > 1]
    return Plan(stage, made, grouped(filters(model, ranked or made, normalise), stay, cluster))


def grouped(rows: Tensor, clusters: int, how: Cluster) -> Tensor:
    """The cluster of every row (rows,), numbered from 0."""
    if how == "even":
        return torch.arange(len(rows)) * clusters // len(rows)
    if how == "agglomerative":
        from sklearn.cluster import AgglomerativeClustering

        return torch.as_tensor(AgglomerativeClustering(clusters, linkage="average").fit_predict(rows.numpy())).long()
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different filters than clusters: so much the better
        return torch.as_tensor(KMeans(clusters, n_init=10, random_state=0).fit_predict(rows.numpy())).long()


def train(
    model: nn.Module,
    task: Task,
    plans: list[Plan],
    *,
    epsilon: float,
    decay: float,
    momentum: float,
    epochs: float,
    lr: float,
) -> None:
    """Centripetal SGD, in place; what distance is left at the end is noted and removed."""

    def pull(progress: float) -> None:
        for plan in plans:
            centripetal(model, plan, epsilon)

    def sgd(params: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=rate, momentum=momentum, weight_decay=decay)

    task.fit(model, task, epochs=epochs, lr=lr, optimizer=sgd, after_backward=pull, label="centripetal training")
    distance = max(apart(model, plan) for plan in plans)
    note(f"before the filters of a cluster were made one, they were apart by {distance:.1e} of their size at most")
    for plan in plans:
        for maker in plan.makers:
            maker.put(model, plan.means(maker.rows(model)))
    settle_norms(model, task)  # running statistics are behind the filters


@torch.no_grad()
def centripetal(model: nn.Module, plan: Plan, epsilon: float) -> None:
    """Makes gradients the mean of the cluster's, and pulls towards its centre (eq. 4, without the decay)."""
    tensors = weight_tensors(model)
    for maker in plan.makers:
        grad = tensors[maker.name].grad
        if grad is None:
            continue
        along = grad.movedim(maker.dim, 0)
        index = maker.index.to(grad.device)
        rows, held = along[index].flatten(1), maker.rows(model)
        step = plan.means(rows) - epsilon * (plan.means(held) - held)
        along[index] = step.view(*index.shape, *along.shape[1:])


def apart(model: nn.Module, plan: Plan) -> float:
    """The largest distance of a filter from its cluster's centre, over the mean size of the filters."""
    rows = filters(model, plan.makers, False)
    return float((rows - plan.means(rows)).norm(dim=1).max() / rows.norm(dim=1).mean().clamp_min(1e-30))
