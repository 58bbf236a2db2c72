"""Deep LDA pruning: units of the last convolution go that tell classes apart least, then what they did not look at.

Qing Tian, Tal Arbel, James J. Clark, "Deep LDA-Pruned Nets for Efficient Facial Gender Classification", 2017,
arXiv:1704.06305. A unit fires with the maximum of its map; since firing scores of the last convolution are nearly
uncorrelated, discriminant analysis comes to ranking them one by one by their intraclass correlation `ICC_j = s_b^2(j)
/ (s_b^2(j) + s_w^2(j))`, the variance between classes over all of it. Of the layers before, those maps stay on which
the units that were kept depend: the firing values are sent back by a deconvolution network (Matthew D. Zeiler, Rob
Fergus, ECCV 2014: through the same filters, through switches of max-pooling, rectified at every ReLU), and what
arrives in a map adds up. Layers are pruned backward, one after the other.

Departs from the paper: the last layer stays and is trained, where the paper puts a Bayesian or support vector
classifier on the kept scores; a ratio is given for the response that is kept, where the paper has a threshold; linear
layers behind the last convolution are ranked by the ICC of their own outputs; any number of classes; where a residual
sum couples layers, their scores are added after division by the layer's largest; kept channels are rounded up to
whole vectors. The accumulation of responses is reconstructed from the abstract idea, not from the authors' code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from featherweight.catalogue import ingredient, method
from featherweight.core.ledger import note
from featherweight.core.site import Site
from featherweight.core.study import Study
from featherweight.core.task import eval_mode, run


@ingredient("score", grain="filter")
def discrimination(site: Site) -> Tensor:
    """ICC of each output of the last convolution and of what follows it; of earlier layers what arrives, (outputs,)."""
    order = site.data.order()
    last = max(
        (i for i, p in enumerate(order) if not isinstance(site.data.model.get_submodule(p), nn.Linear)), default=0
    )
    if order.index(site.path) < last:
        return site.data.once(arriving).get(site.path, torch.zeros(len(site.rows), dtype=torch.float64))
    fires, labels = site.data.activations(fire)[site.path], site.data.labels()
    if (worst := within_class_correlation(fires, labels)) > 0.9:
        note(
            f"{site.path}: two outputs correlate by {worst:.2f} within classes, which this score takes for independent"
        )
    return intraclass_correlation(fires, labels)


def fire(activation: Tensor) -> Tensor:
    """The maximum of every map, (n, channels)."""
    return activation.flatten(2).amax(2) if activation.dim() > 2 else activation


def intraclass_correlation(values: Tensor, labels: Tensor) -> Tensor:
    """Variance between classes over variance between and within, of every column of (samples, units).

    >>> values = torch.tensor([[0.0, 0.0, 5.0], [0.0, 1.0, 5.0], [1.0, 0.0, 5.0], [1.0, 1.0, 5.0]])
    >>> intraclass_correlation(values, torch.tensor([0, 0, 1, 1])).tolist()
    [1.0, 0.0, 0.0]
    """
    values = values.double()
    own = _class_means(values, labels)
    between, within = (own - values.mean(0)).square().mean(0), (values - own).square().mean(0)
    return between / torch.where(between + within > 0, between + within, 1.0)


def within_class_correlation(values: Tensor, labels: Tensor) -> float:
    """The largest correlation between two columns after class means are taken off; 0 for a single column."""
    centred = values.double() - _class_means(values.double(), labels)
    unit = centred / centred.norm(dim=0).clamp(min=1e-300)
    return float((unit.T @ unit).abs().fill_diagonal_(0).max())


def _class_means(values: Tensor, labels: Tensor) -> Tensor:
    """The mean of a sample's class, for every sample."""
    _, index = labels.unique(return_inverse=True)
    hot = F.one_hot(index).to(values)
    return hot @ ((hot.T @ values) / hot.sum(0)[:, None])


class _Deconvolved(torch.autograd.Function):
    """ReLU forward; backward it rectifies the signal itself, wherever the forward one was."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.relu()

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> Tensor:
        return signals[0].relu()


class _Deconvolution(TorchFunctionMode):
    """A block in which every ReLU sends back what a deconvolution network would."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in {F.relu, torch.relu, Tensor.relu}:
            with torch._C.DisableTorchFunction():
                return _Deconvolved.apply(args[0] if args else (kwargs or {})["input"])
        return func(*args, **(kwargs or {}))


def arriving(study: Study) -> dict[str, Tensor]:
    """What arrives in every map of the layers before the last convolution when its units' firing is sent back.

    (outputs,) by layer, summed over positions, the mean over samples.
    """
    order = study.order()
    convolutions = [path for path in order if not isinstance(study.model.get_submodule(path), nn.Linear)]
    last, before = convolutions[-1], [p for p in study.paths if order.index(p) < order.index(convolutions[-1])]
    total: dict[str, Tensor] = {}
    samples = 0
    for batch, size in zip(study.batches(), study.sizes(), strict=True):
        for path, signal in _sent_back(study, batch, last, before).items():
            positions = signal.clamp(min=0).flatten(2).sum(2) if signal.dim() > 2 else signal.clamp(min=0)
            total[path] = total.get(path, 0.0) + positions.double().sum(0).cpu()
        samples += size
    return {path: arrived / samples for path, arrived in total.items()}


def _sent_back(study: Study, batch: Any, last: str, before: list[str]) -> dict[str, Tensor]:
    maps: dict[str, Tensor] = {}
    fires: list[Tensor] = []

    def see(path: str, value: Tensor) -> Tensor:
        if path == last:
            fires.append(fire(study.activated(path, value)))
            return value
        maps[path] = torch.zeros_like(value, requires_grad=True)
        return value + maps[path]

    with eval_mode(study.model), study.seen(see, [*before, last]), torch.enable_grad(), _Deconvolution():
        run(study.model, study.task, batch)
        # half the square, whose gradient is the firing value where it fires
        signal = torch.stack([fired.square().sum() / 2 for fired in fires]).sum()
    found = torch.autograd.grad(signal, list(maps.values()), allow_unused=True)
    return {path: grad for path, grad in zip(maps, found, strict=True) if grad is not None}


lda_icc = method(
    "prune",
    score=discrimination,
    grain="filter",
    scope="layer",
    normalise="max",
    prune_ratio=0.5,
    order="backward",
    schedule="constant",
    rounds=1,
    epochs=12,
    finetune=12,
    lr=1e-3,
    optimizer="sgd",
    paper="Tian et al., CVPR workshops 2017, arXiv:1704.06305",
    needs={"labels", "train"},
    shrinks={"channels"},
    small={"epochs": 2, "finetune": 1, "round_to": 1},
)
