"""Dynamic network surgery: prune by magnitude while training, and splice back what turns out to matter."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from featherweight.allowed import Amount, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.ledger import note
from featherweight.core.masks import hidden, learn_behind, masks, occupied, settle, told
from featherweight.core.site import PerLayer, Site, per_layer
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task


@recipe(
    paper="Guo et al., NIPS 2016, arXiv:1608.04493",
    family="prune",
    needs={"labels", "train"},
    shrinks={"weights"},
    small={"c": 0.5, "epochs": 1, "finetune": 1},
)
def dns(
    model: nn.Module,
    task: Task,
    *,
    c: PerLayer[float] = 2.0,
    band: Share = 0.1,
    gamma: Amount = 1e-4,
    power: Amount = 1.0,
    until: Share = 0.875,
    epochs: Amount = 16,
    finetune: Amount = 4,
    lr: Positive = 0.01,
    optimizer: Optimizers = "sgd",
    where: WhereWeighted = None,
) -> nn.Module:
    """Trains all weights with the gradient at the masked point; masks what is small, splices back what has grown.

    Yiwen Guo, Anbang Yao, Yurong Chen, "Dynamic Network Surgery for Efficient DNNs", NIPS 2016. With `T` the mask,
    every step is `W <- W - lr dL/d(W*T)` (pruned weights learn too), and with probability `(1 + gamma i) ** -power` in
    iteration `i` the mask becomes 0 where `|w| < a`, 1 where `|w| >= b`, and stays as it is between. A layer's `t` is
    `max(mean + c std, 0)` of its `|w|` at the start, `a = (1 - band) t`, `b = (1 + band) t`. How much goes follows
    from `c`: of normally distributed weights c = 1, 2, 3, 4 keeps 16.1, 4.51, 0.92, 0.13 %.

    Departs from the paper: biases are not masked (the authors' code gives them masks of their own); convolutions and
    linear layers are treated in one run; the authors' 14,000 of 16,000 iterations are a share of the run here; the
    learning rate is constant during surgery, then there are `finetune` epochs in which it falls to zero. What an
    earlier method masked stays masked.

    Args:
        c: how many deviations above the mean of |w| the threshold lies; or layer patterns with a number each.
        band: half the width of the band of hysteresis, relative to the threshold.
        gamma: how fast surgery becomes rarer, per iteration.
        power: exponent of that.
        until: share of `epochs` in which masks may change.
        epochs: training during surgery.
        finetune: epochs with masks that are fixed, the learning rate falling to zero.
        lr: learning rate of both.
        optimizer: "sgd" (default), "adam" or "adamw".
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: an option outside its range.
        UnknownName: a pattern matches nothing.
    """
    found, deviations = per_layer(model, "c", c, where)
    allowed = masks(found)
    middle = {path: threshold(site, deviations[path]) for path, site in found.items()}
    learn_behind(model, found)
    iterations, dice = itertools.count(1), torch.Generator().manual_seed(int(torch.randint(2**31, ())))

    def surgery() -> None:
        for path, site in found.items():
            low, high = (1 - band) * middle[path], (1 + band) * middle[path]
            weight = hidden(site).cpu()
            keep = spliced(weight, site.keep, low, high) & allowed[path]
            site.set_mask(model, occupied(path, keep, weight.abs(), allowed[path]))

    def now_and_then(progress: float) -> None:
        chance = probability(next(iterations), gamma, power)
        if progress < until and float(torch.rand((), generator=dice)) < chance:
            surgery()

    surgery()
    task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, decay="constant", after_step=now_and_then,
             label="surgery")  # fmt: skip
    settle(model, found)
    note(told(found))
    return task.fit(model, task, epochs=finetune, lr=lr, optimizer=optimizer, label="fine-tune")


def threshold(site: Site, c: float) -> float:
    """`max(mean + c std, 0)` of the absolute weights that are not zero.

    >>> round(threshold(Site.of(torch.tensor([-1.0, 3.0, 0.0])), 1.0), 6)
    3.0
    """
    size = site.weight[site.weight != 0].abs().double()
    return max(float(size.mean() + c * size.std(unbiased=False)), 0.0) if size.numel() else 0.0


def probability(iteration: int, gamma: float, power: float) -> float:
    """How likely masks are to be renewed in an iteration.

    >>> probability(0, 1e-4, 1.0), probability(10_000, 1e-4, 1.0)
    (1.0, 0.5)
    """
    return float((1 + gamma * iteration) ** -power)


def spliced(weight: Tensor, keep: Tensor, low: float, high: float) -> Tensor:
    """The mask after surgery: gone below `low`, back from `high` on, as it was between.

    >>> spliced(torch.tensor([0.1, 1.0, 1.0, 2.0]), torch.tensor([True, True, False, False]), 0.9, 1.1).tolist()
    [False, True, False, True]
    """
    size = weight.abs()
    return (size >= high) | ((size >= low) & keep)
