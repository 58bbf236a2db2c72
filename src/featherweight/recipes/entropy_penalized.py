"""Entropy-penalised training: weights are trained as integers, and the bits that their coder spends are in the loss.

Deniz Oktay, Johannes Ballé, Saurabh Singh, Abhinav Shrivastava, "Scalable Model Compression by Entropy Penalized
Reparameterization", ICLR 2020, arXiv:1906.06624. A weight is `w = s round(x)`: the latent x, in steps, is what is
trained, the gradient passes straight through the rounding, and the step s of each tensor is trained beside it. The loss
is `task loss + lambda * sum of bits(x)` (eq. 2) with a probability model per tensor that is learned on the way.

The model is that of the coder which writes the file: magnitudes about a mean `m = row mean * column mean / mean` follow
a two-sided geometric distribution, of which one more step costs `-log2 t` bits, `t = (sqrt(1 + m^2) - 1) / m`. As the
means are those of the weights themselves, a row or a column (a unit, an input) that is hardly used becomes dear and
dies out: whole parts of the network go together with single weights.

Departs from the paper: one number, the step, decodes a tensor (the paper: an affine map, for convolutions in the
Fourier domain); the probability model is the geometric one (the paper: a small network for each group of tensors); a
weight of x steps costs `log2(1 + |x|)` times the first step, since the coder, which learns, spends less on the few
that are large; rounding without noise. With `within`, lambda follows the size of the file, which is written and
looked at again and again while training, and what lies nearest to zero goes in the end if it is still too large.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from featherweight.allowed import Amount, Positive
from featherweight.budget import parse
from featherweight.catalogue import recipe
from featherweight.coding.compact import short_scale
from featherweight.coding.container import bare_bytes
from featherweight.core.cost import raw_bytes
from featherweight.core.fit import task_loss
from featherweight.core.forms import (
    Affine,
    Codes,
    Form,
    attach,
    bake,
    forms_of,
    has_forms,
    mask_of,
    mask_zeros,
    masked_names,
    originals,
)
from featherweight.core.ledger import note, recording
from featherweight.core.levels import not_zero, straight_through
from featherweight.core.measuring import weight
from featherweight.core.norms import settle_norms
from featherweight.core.progress import showing
from featherweight.core.site import Site, sites
from featherweight.core.surgery import WhereWeighted
from featherweight.core.task import Batch, Task
from featherweight.errors import BadData, BadOption, CompressionError

EVERY = 8  # steps after which the means, and with them what a step costs, are taken anew
LOOKS = 80  # how often in a training the file is written to see its size
LEAN = 2.0  # how many entries like the mean of all the mean of a row or a column begins with
STAY = 0.2  # share of the training in which learning rates stay
FASTEST = 0.1  # share of the training in which what is far above the size wanted falls by a factor of e
ABOVE = 0.8  # by how much of the size wanted a file may be above it at the start: at one price it falls about so
THERE = 0.6  # share of the training after which it is to be there, while weights still move
SPARE = 0.99  # of the size that was asked for is what training aims at
OF_VECTORS = 2.0  # bits for the first step of a bias
Place = tuple[nn.Module, str]


@final
class Latent(Form):
    """`weight = round(x) * step`: the latents x, in steps, are trained, and the logarithm of the step beside them."""

    stands = ("weight",)
    stores = "free"
    log_step: nn.Parameter

    def __init__(self, step: float) -> None:
        super().__init__()
        self.log_step = nn.Parameter(torch.tensor(math.log(step), dtype=torch.float32))

    def unsound(self) -> str:
        known = self._parameters.keys() == {"log_step"} and not self._buffers and self.log_step.numel() == 1
        return "" if known and bool(self.log_step.abs() < 80) else "without a step, or with one of no reasonable size"

    @property
    def step(self) -> Tensor:
        """The step, of the list of those that take one byte in a compact file.

        Raises:
            CompressionError: training has made it no number.
        """
        step = self.log_step.exp()
        if bool(step.isnan()):
            raise CompressionError("the step of a grid is no number any more: lower lr or step_lr")
        return straight_through(step, torch.full_like(step, short_scale(float(step.detach()))))

    def free(self, weight: Tensor) -> tuple[Tensor, ...]:
        return (weight.detach() / self.step.detach().to(weight.dtype),)

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (latent,) = free
        return straight_through(latent, whole(latent)) * self.step.to(latent.dtype)

    def codes(self, *free: Tensor, keep: Tensor | None = None) -> Codes | None:
        (latent,) = free
        symbols = whole(latent)
        kind = torch.int8 if bool((symbols.abs() <= 127).all()) else torch.int32
        rule = Affine(self.step.detach().to(latent.dtype).cpu(), torch.zeros((), dtype=torch.int32))
        return Codes(symbols.to(kind).cpu(), rule, tuple(latent.shape))


def whole(latent: Tensor) -> Tensor:
    """The integers of latents, without a negative zero."""
    return latent.detach().round() + 0.0


@recipe(
    paper="Oktay et al., ICLR 2020, arXiv:1906.06624",
    family="quantize",
    needs={"labels", "train"},
    shrinks={"weights", "bits"},
    small={"epochs": 2, "rate": 1e-4},
)
def entropy_penalized(
    model: nn.Module,
    task: Task,
    *,
    rate: Positive = 1e-5,
    within: str | None = None,
    levels: Positive = 2.0,
    epochs: Amount = 30,
    lr: Positive = 0.05,
    step_lr: Positive = 1e-3,
    others_lr: Positive = 1e-3,
    where: WhereWeighted = None,
) -> nn.Module:
    """Trains weights as integers, with the bits of their code in the loss, down to the size that a file is to have.

    Args:
        rate: lambda, what a bit adds to the loss.
        within: the size that the file is to have, such as "size<=1520B"; lambda starts at `rate` and follows the size.
            Sizes are those of the file that `compress` writes, which hands on its own budget; in a plain call those of
            a bare file with context mixing.
        levels: how many steps of its grid the deviation of a tensor's weights takes at the start.
        epochs: passes over the training data; on LeNet-5 in 1,520 bytes 14 were better than 65, on few data more are.
        lr: of the latents, in steps of the grid, with Adam; all rates stay for a fifth of the training, then fall.
        step_lr: of the logarithms of the steps.
        others_lr: of all other parameters.
        where: which layers; all linear and convolution layers when left out. Their biases go with them.

    Raises:
        BadData: weights are not finite.
        BadOption: `within` is of something else than the size.
        CompressionError: every chosen layer is zero, the file cannot be made so small, or training diverges.
    """
    masked = masked_names(model)
    wanted = bytes_of(bake(model), within)
    mask_zeros(model, masked)
    found = not_zero(sites(model, where))
    tensors = on_latents(model, found, levels)
    code, goal = CodeLength(tensors), Goal(model, tensors, rate, wanted)
    goal.possible()

    def step(network: nn.Module, batch: Batch, progress: float) -> dict[str, Tensor]:
        return task_loss(task)(network, batch, progress) | {"bits": goal.rate * code()}

    optimizer = partial(grouped, model, tensors, lr, step_lr)
    task.fit(model, task, epochs=epochs, lr=others_lr, optimizer=optimizer, decay=fall, step=step,
                   after_step=goal.follow, label="train for the file")  # fmt: skip
    goal.reach()
    settle_norms(model, task)
    zeros = sum(int((whole(latent(place)) == 0).sum()) for place in tensors)
    note(f"{zeros / sum(latent(place).numel() for place in tensors):.1%} of the weights are zero; {goal.told}")
    return model


def on_latents(model: nn.Module, found: Mapping[str, Site], levels: float) -> list[Place]:
    """Puts the weights and biases of the sites on grids of their own; the tensors that then have latents."""
    tensors: list[Place] = []
    for site in found.values():
        bias = getattr(site.module, "bias", None)
        own = [(site.name, site.weight)]
        if isinstance(bias, nn.Parameter) and not has_forms(site.module, "bias"):
            own.append(("bias", bias.detach()))
        for name, value in own:
            if not bool(value.isfinite().all()):
                raise BadData(f"the {name} of {site.path} is not finite: train the network again")
            deviation = float(value.double()[value != 0].square().mean().sqrt()) if bool(value.any()) else 1.0
            attach(site.module, Latent(deviation / levels), at=name, root=model)
            tensors.append((site.module, name))
    return tensors


def latent(place: Place) -> nn.Parameter:
    """What is trained in the place of a tensor, in steps of its grid."""
    return originals(*place)[0]


def grid_of(place: Place) -> Latent:
    return next(form for form in forms_of(*place) if isinstance(form, Latent))


@final
class CodeLength:
    """Bits of the latents, with gradients: `price * log2(1 + |x|)`, the price of a first step by its row and column."""

    def __init__(self, tensors: Sequence[Place]) -> None:
        self.tensors, self.calls = tensors, 0
        self.prices: list[Tensor] = []

    def __call__(self) -> Tensor:
        if self.calls % EVERY == 0:
            self.prices = [price(latent(place).detach()) * alive(place) for place in self.tensors]
        self.calls += 1
        parts = [
            (one * (1 + latent(place).abs()).log2()).sum() for one, place in zip(self.prices, self.tensors, strict=True)
        ]
        return torch.stack(parts).sum()


def alive(place: Place) -> Tensor | float:
    """Zero where a mask holds a weight at zero, one elsewhere."""
    keep = mask_of(*place)
    return 1.0 if keep is None else keep.float()


def price(x: Tensor) -> Tensor:
    """`-log2 t` of the two-sided geometric distribution whose mean magnitude is that of a weight's row and column.

    Args:
        x: latents, rows along the first dimension; of a vector, whose means say little, the price is fixed.

    >>> price(torch.tensor([[1.0, 1.0], [0.0, 0.0]])).round().tolist()
    [[2.0, 2.0], [3.0, 3.0]]
    """
    if x.dim() < 2:
        return torch.full_like(x, OF_VECTORS)
    size = (0.5 * (x.abs() + x.abs().round())).flatten(1)
    mean = size.mean() + 0.02
    row = (size.sum(1, keepdim=True) + LEAN * mean) / (size.shape[1] + LEAN)
    column = (size.sum(0, keepdim=True) + LEAN * mean) / (size.shape[0] + LEAN)
    expected = (row * column / mean).clamp_min(1e-3)
    return -(((1 + expected.square()).sqrt() - 1) / expected).log2().view_as(x)


@final
class Goal:
    """The size that the file is to have, and what a bit costs so that it gets there."""

    def __init__(self, model: nn.Module, tensors: Sequence[Place], rate: float, wanted: int | None) -> None:
        self.model, self.tensors, self.rate, self.wanted = model, tensors, rate, wanted
        self.start = file_size(model) if wanted else 0
        self.looked = 0.0

    def follow(self, progress: float) -> None:
        """Makes bits dearer where the file is larger than it should be by now, which falls towards what is wanted."""
        if self.wanted is None or progress < self.looked + 1 / LOOKS:
            return
        self.looked = progress
        goal = SPARE * self.wanted
        far = max(self.start - (1 + ABOVE) * goal, 0) * math.exp(-progress / FASTEST)
        due = goal * (1 + ABOVE * max(1 - progress / THERE, 0)) + far
        self.rate *= min(max((file_size(self.model) / due) ** 0.3, 0.8), 1.25)

    def reach(self) -> None:
        """Sets what lies nearest to zero to zero, the smallest latents first, until the file is as small as wanted.

        Raises:
            CompressionError: with all of them zero it is still too large.
        """
        if self.wanted is None or file_size(self.model) <= self.wanted:
            return
        self.possible()
        trained = [latent(place).detach().clone() for place in self.tensors]
        sizes = torch.cat([one.abs().flatten() for one in trained])
        above = sizes[sizes > 0.5].sort().values
        few, many, fine = 0, len(above), max(len(above) // 200, 1)  # how many are set to zero: too few, and enough
        while many - few > fine:
            middle = (few + many) // 2
            self._cut(trained, float(above[middle - 1]))
            few, many = (few, middle) if file_size(self.model) <= self.wanted else (middle, many)
        self._cut(trained, float(above[many - 1]))

    def possible(self) -> None:
        """Refuses, before anything is trained, a size that no latents reach.

        Raises:
            CompressionError: with all of them zero the file is still too large.
        """
        if self.wanted is None:
            return
        held = [latent(place).detach().clone() for place in self.tensors]
        self._cut(held, math.inf)
        least = file_size(self.model)
        self._cut(held, 0.0)
        if least > self.wanted:
            raise CompressionError(
                f"size<={self.wanted}B: with all chosen weights zero the file still has {least} bytes: "
                "allow that much, or choose more layers"
            )

    @torch.no_grad()
    def _cut(self, latents: Sequence[Tensor], edge: float) -> None:
        """Puts these latents in their places, zero where they are not beyond an edge."""
        for place, one in zip(self.tensors, latents, strict=True):
            latent(place).copy_(one.where(one.abs() > edge, 0.0))

    @property
    def told(self) -> str:
        return f"lambda {self.rate:.2g}" + (f", {file_size(self.model)} bytes" if self.wanted else "")


def bytes_of(model: nn.Module, within: str | None) -> int | None:
    """The bytes that a budget allows; None without one.

    Raises:
        BadOption: the budget is of something else than the size.
    """
    if within is None:
        return None
    limits = [limit for limit in parse(within) if limit.quantity == "size"]
    if not limits:
        raise BadOption(f'within={within!r}: training follows a size; pass one, such as "size<=40kB"')
    return int(min(limit.allowed({"size": raw_bytes(model)}) for limit in limits))


def file_size(model: nn.Module) -> int:
    """What a file of the model takes on disk, as it stands."""
    with recording(), showing(False):
        return weight(bake(copy.deepcopy(model)), bare_bytes)


def grouped(
    model: nn.Module, tensors: Sequence[Place], lr: float, step_lr: float, params: list[nn.Parameter], others_lr: float
) -> Optimizer:
    """Adam with a rate for latents, one for the logarithms of steps, and one for the rest."""
    latents, steps = [latent(place) for place in tensors], [grid_of(place).log_step for place in tensors]
    known = {id(p) for p in (*latents, *steps)}
    groups = [(latents, lr), (steps, step_lr), ([p for p in params if id(p) not in known], others_lr)]
    return Adam([{"params": own, "lr": own_lr} for own, own_lr in groups if own], betas=(0.9, 0.99))


def fall(progress: float) -> float:
    """The factor of all learning rates: a short rise, constant, then half a cosine.

    >>> [round(fall(p), 2) for p in (0.0, 0.1, 0.6, 1.0)]
    [0.01, 1.0, 0.5, 0.01]
    """
    cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, progress - STAY) / (1 - STAY)))
    return max(min(1.0, progress / 0.01) * cosine, 0.01)
