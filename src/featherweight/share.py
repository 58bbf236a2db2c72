"""The verb `share`: let the weights of a layer share few values, then train the values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, final

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Bits, Positive, checked
from featherweight.catalogue import Slot, fill
from featherweight.core.fit import Optimizers
from featherweight.core.forms import Codebook, Form, attach, originals
from featherweight.core.ledger import note, skip
from featherweight.core.site import PerLayer, Site, per_layer
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task
from featherweight.errors import CompressionError

Cluster = Callable[[Tensor, Tensor], Tensor]
Start = Callable[[Tensor, int], Tensor]

COLD = 1e-4
"""The temperature at which soft assignment ends, over that at which it starts."""


@checked()
def share(
    model: nn.Module,
    task: Task,
    *,
    cluster: Annotated[str, Slot("cluster")] | Cluster = "lloyd",
    start: Annotated[str, Slot("start")] | Start = "linear_span",
    weight_bits: PerLayer[Bits] = 4,
    assignment: Literal["nearest", "soft"] = "nearest",
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
        assignment: "nearest" gives every weight its value before training, for good; "soft" trains weights and values
            together, each weight a mean of the values that sharpens until one is left (k numbers a weight meanwhile).
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
    for path in (path for path, site in found.items() if not site.weight.any()):
        skip(path, "all its weights are zero")
    living = {path: site for path, site in found.items() if site.weight.any()}
    if not living:
        raise CompressionError("no layer has a weight that is not zero: there is nothing to share")
    if assignment == "soft" and epochs:
        soft = [_soften(model, site, cluster, start, 2 ** bits[path]) for path, site in living.items()]
        task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="train soft assignments",
                 after_step=lambda progress: _cool(soft, progress))  # fmt: skip
        for site in living.values():
            free, centroids = originals(site.module, site.name)
            _tie(model, site, free.detach(), site.keep.to(free.device), centroids.detach().sort().values)
        return model
    for path, site in living.items():
        weight = site.weight
        _tie(model, site, weight, weight != 0, centroids_of(weight[weight != 0], cluster, start, 2 ** bits[path]))
    if epochs:
        task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="train shared values")
    return model


def _tie(model: nn.Module, site: Site, weight: Tensor, alive: Tensor, centroids: Tensor) -> None:
    """Gives every weight that is alive the nearest of ascending centroids; the others stay zero."""
    centroids = centroids.to(weight)
    index = nearest(weight, centroids)
    if not alive.all():
        site.set_mask(model, alive)
    used, index = torch.unique(torch.where(alive, index, index[alive].min()), return_inverse=True)
    attach(site.module, Codebook(centroids[used], narrow(index)), at=site.name, root=model)
    note(f"{site.path}: {int(alive.sum())} weights share {len(used)} values")


@final
class SoftCodebook(Form):
    """`weight = sum_j a_j c_j`, a the softmax of `-(w - c_j)^2 / temperature`: weights and centroids both learn.

    Source: Cho, Vahid, Adya and Rastegari, "DKM: Differentiable K-Means Clustering Layer for Neural Network
    Compression", ICLR 2022, arXiv:2108.12659. Departs from the paper: centroids are parameters, not iterated at every
    step, the distance is squared, and the temperature falls.
    """

    stands = ("weight",)
    stores = "free"
    temperature: Tensor

    def __init__(self, centroids: Tensor) -> None:
        super().__init__()
        self._start = centroids.detach().clone()
        width = (self._start.max() - self._start.min()) / max(1, len(self._start) - 1)
        self.register_buffer("temperature", width.square().clamp_min(torch.finfo(width.dtype).tiny / COLD))
        self._warm = float(self.temperature)

    def free(self, weight: Tensor) -> tuple[Tensor, ...]:
        return weight, self._start

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        weight, centroids = free
        gap = (weight.unsqueeze(-1) - centroids).square()
        return (-gap / self.temperature).softmax(-1) @ centroids

    def cool(self, progress: float) -> None:
        """The temperature at this part of the training."""
        self.temperature.fill_(self._warm * COLD**progress)


def _soften(model: nn.Module, site: Site, cluster: Cluster, start: Start, k: int) -> SoftCodebook:
    weight = site.weight
    alive = weight != 0
    form = SoftCodebook(centroids_of(weight[alive], cluster, start, k).to(weight))
    if not alive.all():
        site.set_mask(model, alive)
    attach(site.module, form, at=site.name, root=model)
    return form


def _cool(forms: list[SoftCodebook], progress: float) -> None:
    for form in forms:
        form.cool(progress)


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
