"""Incremental network quantization: powers of two, a portion of the weights at a time, the rest retrained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, final

import torch
from annotated_types import Interval
from torch import Tensor, nn

from featherweight.allowed import Amount, Positive, Share
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.forms import Codes, Form, attach, from_values, originals
from featherweight.core.ledger import note
from featherweight.core.levels import Levels, not_zero, survivors
from featherweight.core.site import PerLayer, Site, per_layer
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task
from featherweight.errors import BadOption

INQBits = Annotated[int, Interval(ge=2, le=8)]


@final
class FrozenPart(Form):
    """`weight = fixed` where `frozen`, the free weight elsewhere: no optimizer, momentum or decay reaches the former.

    Codes exist once every weight that a mask keeps is frozen.
    """

    stands = ("weight",)
    frozen: Tensor
    fixed: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("frozen", torch.zeros_like(weight, dtype=torch.bool))
        self.register_buffer("fixed", weight.detach().clone())

    def unsound(self) -> str:
        known = self._buffers.keys() == {"frozen", "fixed"} and self.frozen.dtype == torch.bool
        whole = known and self.frozen.shape == self.fixed.shape and self.fixed.is_floating_point()
        return "" if whole else "without values and the places where they hold"

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (weight,) = free
        return torch.where(self.frozen, self.fixed, weight)

    def codes(self, *free: Tensor, keep: Tensor | None = None) -> Codes | None:
        done = self.frozen if keep is None else self.frozen | ~keep
        return from_values(self.fixed.cpu()) if bool(done.all()) else None


def ends_with_all(options: Mapping[str, Any]) -> None:
    """Refuses portions that do not grow, or that leave weights as they are."""
    given = options["portions"]
    if not given or given[-1] != 1 or any(b <= a for a, b in itertools.pairwise((0.0, *given))):
        raise BadOption(f"portions={list(given)}: must be growing fractions of the weights that end with 1")


@recipe(
    paper="Zhou et al., ICLR 2017, arXiv:1702.03044",
    family="quantize",
    needs={"labels", "train"},
    shrinks={"bits"},
    rules=(ends_with_all,),
    small={"portions": [0.5, 1.0], "epochs": 1},
)
def inq(
    model: nn.Module,
    task: Task,
    *,
    weight_bits: PerLayer[INQBits] = 5,
    portions: Sequence[Share] = (0.5, 0.75, 0.875, 1.0),
    partition: Literal["magnitude", "random"] = "magnitude",
    epochs: Amount = 12,
    lr: Positive = 1e-3,
    optimizer: Optimizers = "sgd",
    where: WhereWeighted = None,
) -> nn.Module:
    """Rounds a portion of every layer's weights to powers of two or zero and freezes it; retrains the rest; repeats.

    Aojun Zhou, Anbang Yao, Yiwen Guo, Lin Xu, Yurong Chen, "Incremental Network Quantization: Towards Lossless CNNs
    with Low-Precision Weights", ICLR 2017. With `s = max|W|` of a layer, `n1 = floor(log2(4s/3))` and
    `n2 = n1 + 1 - 2^(b-2)` the weights become one of `0, +-2^n2, ..., +-2^n1` (eq. 1 to 3), the nearest: `beta sgn(w)`
    if `(alpha + beta) / 2 <= |w| < 3 beta / 2` for neighbours alpha < beta (eq. 4). The largest weights go first.
    n1 and n2 are fixed by the weights at the start. A frozen weight is no parameter any more: momentum and weight decay
    cannot move it, and later methods train around it.

    The portions of the paper: (0.3, 0.6, 0.8, 1) for AlexNet, (0.5, 0.75, 0.875, 1) for VGG and ResNet,
    (0.2, 0.4, 0.6, 0.8, 1) for GoogLeNet; with four bits (0.3, 0.5, 0.8, 0.9, 0.95, 1), with three
    (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1), with two (0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 1).

    Storage only: the products are shifts, which no runtime here executes (special hardware would); it multiplies.

    Departs from the paper: `epochs` are shared equally among the portions but the last, and in each the learning rate
    falls to zero. Biases and norms stay float. What an earlier method masked stays zero and counts in no portion.

    Args:
        weight_bits: bits of a weight, one of them for the zero; or layer patterns with bits each.
        portions: fractions of a layer's weights that are frozen after each step, growing up to 1.
        partition: which weights go first: "magnitude" (the largest) or "random" (the paper's comparison).
        epochs: retraining in total.
        lr: learning rate at the start of each retraining.
        optimizer: "sgd" (default), "adam" or "adamw".
        where: which layers; all linear and convolution layers when left out.

    Raises:
        BadOption: an option outside its range.
        CompressionError: every chosen layer is zero.
    """
    found, bits = per_layer(model, "weight_bits", weight_bits, where)
    found = not_zero(found)
    grids = {path: powers_of_two(survivors(site), bits[path]).to(site.weight) for path, site in found.items()}
    forms = {path: FrozenPart(site.weight) for path, site in found.items()}
    for path, site in found.items():
        attach(site.module, forms[path], at=site.name, root=model)
    rounds = len(portions) - 1
    for portion in portions:
        for path, site in found.items():
            freeze(forms[path], site, Levels(grids[path]), portion, partition)
        if portion < 1:
            task.fit(model, task, epochs=epochs / rounds, lr=lr, optimizer=optimizer, label=f"{portion:.1%} frozen")
    for site in found.values():  # what momentum and decay did behind the frozen values is gone
        originals(site.module, site.name)[0].data.copy_(site.weight)
    note("weights are 0 or powers of two: " + ", ".join(f"{path} {told(grids[path])}" for path in found))
    return model


def powers_of_two(weights: Tensor, bits: int) -> Tensor:
    """The levels `0, +-2^n2, ..., +-2^n1` of a layer, ascending, float64 (eq. 1 to 3).

    >>> powers_of_two(torch.tensor([0.1, -0.8]), 3).tolist()
    [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    n1 = math.floor(math.log2(4 * float(weights.abs().max()) / 3))
    sizes = torch.tensor([2.0**n for n in range(n1 + 1 - 2 ** (bits - 2), n1 + 1)], dtype=torch.float64)
    return torch.cat([-sizes.flip(0), torch.zeros(1, dtype=torch.float64), sizes])


def freeze(form: FrozenPart, site: Site, grid: Levels, portion: float, partition: str) -> None:
    """Freezes weights, the largest or any, until `portion` of those that no mask hides is frozen: an exact count."""
    weight = site.weight
    keep = site.keep.to(weight.device)
    open_ = keep & ~form.frozen
    rank = weight.abs() if partition == "magnitude" else torch.rand_like(weight)
    order = torch.where(open_, rank, -torch.inf).flatten().argsort(descending=True, stable=True)
    count = round(portion * int(keep.sum())) - int((form.frozen & keep).sum())
    chosen = torch.zeros_like(keep).flatten().index_fill(0, order[: max(0, count)], True).view_as(keep)
    form.fixed.copy_(torch.where(chosen, grid(weight), form.fixed))
    form.frozen |= chosen


def told(levels: Tensor) -> str:
    """The exponents of a layer's levels."""
    sizes = levels[levels > 0].double().log2()
    return f"2^{int(sizes.min())} to 2^{int(sizes.max())}"
