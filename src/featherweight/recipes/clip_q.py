"""CLIP-Q: at every step weights near zero are clipped and the rest are quantized, and all of them keep learning."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, final

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from featherweight.allowed import Amount, Count, Fraction, Positive
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.forms import Codes, Form, Table, attach, bake, mask_zeros, masked_names
from featherweight.core.ledger import note, skip
from featherweight.core.site import PerLayer, Site, per_layer
from featherweight.core.study import Study
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Task
from featherweight.errors import BadOption, CompressionError

ClipBits = Annotated[int, Interval(ge=2, le=8)]
"""One bit would leave one interval for both sides of zero."""
GRID = [(p / 20, b) for p in range(20) for b in range(2, 7)]
"""The settings (sparsity, bits) among which the search chooses."""


@final
class ClippedIntervals(Form):
    """`sparsity` of each sign's weights act as zero, the others as the mean of their interval, anew at every call.

    The rest of the axis is cut into `2^bits - 1` intervals, over both sides in proportion to their lengths, at least
    one each. The gradient passes straight through, to clipped weights too, so that these may return.
    """

    stands = ("weight",)
    settings = ("bits", "sparsity")

    def __init__(self, bits: int, sparsity: float) -> None:
        super().__init__()
        self.bits, self.sparsity = bits, sparsity

    def unsound(self) -> str:
        share = isinstance(self.sparsity, float) and 0 <= self.sparsity < 1
        return "" if share and self.bits in range(2, 9) and not self._buffers else "of impossible bits or sparsity"

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (weight,) = free
        symbols, values = self.partition(weight.detach(), keep)
        snapped = values[symbols]
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return snapped
        return snapped + (weight - weight.detach())

    def codes(self, *free: Tensor, keep: Tensor | None = None) -> Codes | None:
        (weight,) = free
        symbols, values = self.partition(weight.detach(), keep)
        return Codes(symbols.cpu().to(torch.uint8), Table(values.cpu()), tuple(weight.shape))

    def partition(self, weight: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """The number of each weight's interval, zero for clipped ones, and the mean of each, (2^bits,)."""
        alive = torch.ones_like(weight, dtype=torch.bool) if keep is None else keep
        sides = [
            side & ~smallest(weight.abs(), side, self.sparsity) for side in (alive & (weight > 0), alive & (weight < 0))
        ]
        symbols, used = torch.zeros_like(weight, dtype=torch.long), 0
        for side, count in zip(sides, shared([reach(weight, side) for side in sides], 2**self.bits - 1), strict=True):
            size = weight.abs()
            low, length = (size[side].min(), reach(weight, side)) if count else (0.0, 0.0)
            place = ((size - low) / (length or 1.0) * count).long().clamp(0, max(0, count - 1))
            symbols = torch.where(side, 1 + used + place, symbols)
            used += count
        flat, total = symbols.flatten(), 2**self.bits
        counts = torch.bincount(flat, minlength=total)
        sums = torch.bincount(flat, torch.where(flat.view_as(weight) > 0, weight, 0.0).flatten().double(), total)
        return symbols, (sums / counts.clamp_min(1)).to(weight.dtype)


def smallest(size: Tensor, among: Tensor, share: float) -> Tensor:
    """Marks the `floor(share * n)` smallest of the n values that are among; ties go by index."""
    count = int(share * int(among.sum()) + 1e-9)
    order = torch.where(among, size, torch.inf).flatten().argsort(stable=True)[:count]
    return torch.zeros(size.numel(), dtype=torch.bool, device=size.device).index_fill_(0, order, True).view_as(size)


def reach(weight: Tensor, side: Tensor) -> float:
    """The length of the axis that a side's weights cover; -1 if there is none."""
    size = weight[side].abs()
    return float(size.max() - size.min()) if len(size) else -1.0


def shared(lengths: list[float], count: int) -> list[int]:
    """How many of the intervals each of two sides gets: in proportion to its length, at least one if it has weights.

    >>> shared([3.0, 1.0], 7), shared([9.0, 0.0], 7), shared([1.0, -1.0], 7)
    ([5, 2], [6, 1], [7, 0])
    """
    left, right = lengths
    if left < 0 or right < 0:
        return [0 if left < 0 else count, 0 if right < 0 else count]
    first = round(count * left / (left + right)) if left + right > 0 else count // 2
    first = min(max(1, first), count - 1)
    return [first, count - first]


@recipe(
    paper="Tung and Mori, CVPR 2018",
    family="quantize",
    needs={"labels", "train"},
    shrinks={"weights", "bits"},
    aliases=("clipq_prune",),
    small={"epochs": 1},
)
def clip_q(
    model: nn.Module,
    task: Task,
    *,
    sparsity: PerLayer[Fraction] = 0.6,
    weight_bits: PerLayer[ClipBits] = 4,
    search: Annotated[int, Ge(0)] = 0,
    trade: Positive = 0.2,
    calibration_batches: Count = 4,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    where: WhereWeighted = None,
) -> nn.Module:
    """Prunes and quantizes in parallel with training: clip, partition, quantize at every step; nothing is final.

    Frederick Tung, Greg Mori, "CLIP-Q: Deep Network Compression Learning by In-Parallel Pruning-Quantization", CVPR
    2018. At every pass: (clip) the smallest `sparsity` of the positive and of the negative weights act as zero for this
    pass; (partition) what is left of the axis is cut into `2^b - 1` intervals of equal lengths on either side;
    (quantize) each weight becomes the mean of the full-precision weights in its interval. These are updated with the
    gradient of the quantized ones, and may leave their interval, zero too. Per layer (p, b) may be chosen by Bayesian
    optimisation of `error(p, b) - trade * saved(p, b)`: a Gaussian process and its expected improvement.

    Departs from the paper: whose text was not at hand, so that the search's terms are reconstructed: the error is what
    the layer alone, clipped and quantized, adds to the loss on a few batches; saved is the share of the network's float
    bits that it saves (a mask at its entropy, b bits for a survivor); layers are searched one by one, over 20 fractions
    and 2 to 6 bits. `search=0` takes the given values. Training starts from the network that is given. The result is a
    table of values a layer: simulated, storage only; a runtime that looks weights up would execute it.

    Args:
        sparsity: fraction of a layer's positive and of its negative weights that acts as zero; or layer patterns with
            a fraction each.
        weight_bits: bits of a weight, the zero included; or layer patterns with bits each.
        search: evaluations of the Bayesian optimisation for each layer, in place of the two above; 0 for none.
        trade: what a share of the network's bits is worth, in units of the loss; for the search.
        calibration_batches: batches on which the search takes the loss.
        epochs: training through the clipping.
        lr: learning rate of that training.
        optimizer: "adam" (default), "adamw" or "sgd".
        where: which layers; all linear and convolution layers when left out.

    Raises:
        UnknownName: a pattern matches nothing.
        BadOption: sparsity and weight_bits name different layers.
        CompressionError: every chosen layer is zero.
    """
    masked = masked_names(model)
    bake(model)
    mask_zeros(model, masked)
    found, settings = settings_of(model, sparsity, weight_bits, where)
    if search:
        study = Study(model, replace(task, calibration=None), (), calibration_batches)  # the loss needs labels
        settings = {path: searched(study, site, search, trade) for path, site in found.items()}
    for path, site in found.items():
        share, bits = settings[path]
        attach(site.module, ClippedIntervals(bits, float(share)), at=site.name, root=model)
        note(f"{path}: {share:.0%} clipped, {bits} bits")
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="clip and quantize")


def settings_of(
    model: nn.Module, sparsity: PerLayer[float], weight_bits: PerLayer[int], where: WhereWeighted
) -> tuple[dict[str, Site], dict[str, tuple[float, int]]]:
    """The sites and each one's (sparsity, bits); layers of zeros are left out, and that is said."""
    found, shares = per_layer(model, "sparsity", sparsity, where)
    chosen = where if isinstance(weight_bits, Mapping) or not isinstance(sparsity, Mapping) else list(sparsity)
    others, bits = per_layer(model, "weight_bits", weight_bits, chosen)
    if apart := found.keys() ^ others.keys():
        raise BadOption(f"sparsity and weight_bits name different layers: name {', '.join(sorted(apart))} in both")
    empty = {path for path, site in found.items() if not site.weight.any()}
    for path in empty:
        skip(path, "all its weights are zero")
    if len(empty) == len(found):
        raise CompressionError("no layer has a weight that is not zero: there is nothing to clip")
    kept = {path: site for path, site in found.items() if path not in empty}
    return kept, {path: (shares[path], bits[path]) for path in kept}


def searched(study: Study, site: Site, evaluations: int, trade: float) -> tuple[float, int]:
    """The (sparsity, bits) of least `error - trade * saved` that Bayesian optimisation finds for one layer."""
    whole = sum(p.numel() for p in study.model.parameters())
    weight, keep, dense = site.weight, site.keep.to(site.weight.device), study.loss()

    def cost(share: float, bits: int) -> float:
        with torch.no_grad():
            site.held.copy_(ClippedIntervals(bits, share)(weight, keep=keep))
            error = study.loss() - dense
            site.held.copy_(weight)
        return error - trade * weight.numel() / whole * (1 - bits_left(share, bits) / 32)

    best, least = minimised(cost, GRID, evaluations)
    note(f"{site.path}: objective {least:.4g} at best of {evaluations} evaluations")
    return best


def bits_left(share: float, bits: int) -> float:
    """Bits of a weight: where the zeros are, at their entropy, and `bits` for each of the others.

    >>> round(bits_left(0.5, 4), 2), bits_left(0.0, 4)
    (3.0, 4.0)
    """
    where = sum(-p * math.log2(p) for p in (share, 1 - share) if p > 0)
    return where + (1 - share) * bits


def minimised(
    cost: Callable[[float, int], float], grid: list[tuple[float, int]], evaluations: int
) -> tuple[tuple[float, int], float]:
    """The best point of a grid that few evaluations find, and its cost: random starts, then expected improvement."""
    from scipy.stats import norm
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern, WhiteKernel

    order = torch.randperm(len(grid)).tolist()
    tried = {place: cost(*grid[place]) for place in order[: max(2, evaluations // 3)][:evaluations]}
    places = torch.tensor(grid, dtype=torch.float64)
    points = ((places - places.mean(0)) / places.std(0)).numpy()
    while len(tried) < min(evaluations, len(grid)):
        process = GaussianProcessRegressor(Matern(nu=2.5) + WhiteKernel(1e-4), normalize_y=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound is no harm
            process.fit(points[list(tried)], list(tried.values()))
        mean, spread = process.predict(points, return_std=True)
        gain = min(tried.values()) - mean
        improvement = gain * norm.cdf(gain / (spread + 1e-12)) + spread * norm.pdf(gain / (spread + 1e-12))
        improvement[list(tried)] = -1.0
        place = int(improvement.argmax())
        tried[place] = cost(*grid[place])
    best = min(tried, key=lambda place: tried[place])
    return grid[best], tried[best]
