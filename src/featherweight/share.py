"""The verb `share`: let the weights of a layer share few values, then train the values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Bits, Positive, checked
from featherweight.catalogue import Slot, fill
from featherweight.core.fit import Optimizers
from featherweight.core.forms import Codebook, attach
from featherweight.core.ledger import note, skip
from featherweight.core.site import PerLayer, Site, per_layer
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task
from featherweight.errors import CompressionError

Cluster = Callable[[Tensor, Tensor], Tensor]
Start = Callable[[Tensor, int], Tensor]


@checked()
def share(
    model: nn.Module,
    task: Task,
    *,
    cluster: Annotated[str, Slot("cluster")] | Cluster = "lloyd",
    start: Annotated[str, Slot("start")] | Start = "linear_span",
    weight_bits: PerLayer[Bits] = 4,
    epochs: Amount = 2,
    lr: Positive = 1e-4,
    optimizer: Optimizers = None,
    where: WhereWeighted = None,
) -> nn.Module:
    """Replaces every weight by the nearest of its layer's `2 ** weight_bits` values, trains them, returns the model.

    Zeros stay out of it: masked weights, and weights that are zero, stay exactly zero as a value of their own. A layer
    with no more distinct values than that keeps every one of them.

    Args:
        cluster: an ingredient `(values, starting centroids) -> centroids`.
        start: where the centroids start: "linear_span" (over [min, max]), "density" or "forgy" (random values).
        weight_bits: bits of a weight's index, beside the zero; or layer patterns with bits each, such as
            {"Conv2d": 8, "Linear": 5}.
        epochs: training of the shared values (and of biases and norms).
        lr: learning rate of that training.
        optimizer: "adam" (default), "adamw" or "sgd".
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: an option outside its range.
        UnknownName: no such ingredient or layer.
        CompressionError: every chosen layer is zero.
        MissingNeed: training without training data.
    """
    cluster, start = fill("cluster", cluster), fill("start", start)
    found, bits = per_layer(model, "weight_bits", weight_bits, where)
    shared = [site for path, site in found.items() if _share(model, site, cluster, start, 2 ** bits[path])]
    if not shared:
        raise CompressionError("no layer has a weight that is not zero: there is nothing to share")
    if epochs:
        task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="train shared values")
    return model


def _share(model: nn.Module, site: Site, cluster: Cluster, start: Start, k: int) -> bool:
    weight = site.weight
    alive = weight != 0
    if not alive.any():
        skip(site.path, "all its weights are zero")
        return False
    centroids = centroids_of(weight[alive], cluster, start, k).to(weight)
    index = nearest(weight, centroids)
    if not alive.all():
        site.set_mask(model, alive)
    used, index = torch.unique(torch.where(alive, index, index[alive].min()), return_inverse=True)
    attach(site.module, Codebook(centroids[used], narrow(index)), at=site.name, root=model)
    note(f"{site.path}: {int(alive.sum())} weights share {len(used)} values")
    return True


def centroids_of(values: Tensor, cluster: Cluster, start: Start, k: int) -> Tensor:
    """At most `k` centroids of the values, ascending, float64: the values themselves if no more than `k` differ."""
    distinct = torch.unique(values.detach().cpu())
    if len(distinct) <= k:
        return distinct.double()
    return cluster(values, start(values.cpu(), k))


def nearest(values: Tensor, centroids: Tensor) -> Tensor:
    """The index of the nearest of ascending centroids, of the shape of `values`; the lower one if two are as near."""
    return torch.bucketize(values.double(), (centroids.double()[1:] + centroids.double()[:-1]) / 2)


def narrow(index: Tensor) -> Tensor:
    """An index in the smallest integer type that holds it."""
    return index.to(torch.uint8 if int(index.max()) < 256 else torch.int32)
