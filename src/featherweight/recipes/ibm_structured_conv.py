"""Structured convolution matrices (Appuswamy et al., 2016): kernels of crossings, types of inputs and strengths."""

from __future__ import annotations

import itertools
from typing import Annotated, cast, final

import torch
from annotated_types import Interval
from torch import Tensor, nn

from featherweight.allowed import Amount, Positive
from featherweight.catalogue import recipe
from featherweight.core.fit import Optimizers
from featherweight.core.forms import Codes, Form, Table, attach
from featherweight.core.ledger import note, skip
from featherweight.core.site import Site, sites
from featherweight.core.surgery import Layers, Where
from featherweight.core.task import Task
from featherweight.errors import CompressionError

TYPES = 4
Permutation = tuple[int, ...]


@final
class Crossbar(Form):
    """`weight[j, c, r, s] = crossing * strength[j, types[c, r, s]]`, crossings 0 or 1, whole strengths times a scale.

    Free: one number for each crossing, which is made where it is above zero, and the strengths, (out, 4). Both learn
    through their rounding: a crossing by the slope of the sigmoid there (a neuron's noise, in the paper), a strength
    straight through.
    """

    stands = ("weight",)
    order = 1
    stores = "free"
    settings = ("levels",)
    types: Tensor

    def __init__(self, types: Tensor, levels: int, crossings: Tensor, strengths: Tensor) -> None:
        super().__init__()
        self.levels = levels
        self.register_buffer("types", types.to(torch.uint8))
        self._start = (crossings, strengths)

    def free(self, weight: Tensor) -> tuple[Tensor, ...]:
        return self._start

    def unsound(self) -> str:
        known = self._buffers.keys() == {"types"} and self.types.dtype == torch.uint8 and self.types.dim() == 3
        right = isinstance(self.levels, int) and 0 < self.levels < 1 << 16
        whole = known and right and bool((self.types < TYPES).all())
        return "" if whole else "without types of inputs, or with other levels"

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        crossings, strengths = free
        value = self.table(strengths)[:, self.types.long()]
        soft = crossings.sigmoid()
        return torch.where(crossings > 0, value, 0.0) + value.detach() * (soft - soft.detach())

    def table(self, strengths: Tensor) -> Tensor:
        """The strengths on their grid, (out, 4): whole numbers times a scale for each output."""
        scale = strengths.detach().abs().amax(1, keepdim=True).clamp(min=1e-30) / self.levels
        rounded = (strengths / scale).round().clamp(-self.levels, self.levels) * scale
        return rounded.detach() + (strengths - strengths.detach())

    def codes(self, *free: Tensor, keep: Tensor | None = None) -> Codes | None:
        crossings, strengths = (value.detach().cpu() for value in free)
        values = torch.cat([torch.zeros(len(strengths), 1), self.table(strengths)], 1)
        symbols = torch.where(crossings > 0, self.types.cpu() + 1, 0).to(torch.uint8)
        return Codes(symbols, Table(values, axis=0), tuple(symbols.shape))


@recipe(
    paper="Appuswamy et al., 2016, arXiv:1606.02407",
    family="share",
    needs={"labels", "train"},
    shrinks={"bits"},
    small={"epochs": 1},
)
def ibm_structured_conv(
    model: nn.Module,
    task: Task,
    *,
    strength_bits: Annotated[int, Interval(ge=2, le=16)] = 9,
    epochs: Amount = 10,
    lr: Positive = 1e-3,
    optimizer: Optimizers = None,
    where: Annotated[Where, Layers((nn.Conv2d,))] = None,
) -> nn.Module:
    """Gives each filter four strengths, and a connection or none at each input, in a pattern that crossbars hold.

    Rathinakumar Appuswamy, Tapan Nayak, John Arthur, Steven Esser, Paul Merolla, Jeffrey McKinstry, Timothy Melano,
    Myron Flickner, Dharmendra Modha, "Structured convolution matrices for energy-efficient deep learning", 2016,
    arXiv:1606.02407. On a neuromorphic crossbar every input line has one of four types, a neuron has a strength for
    each type, and a crossing is there or not. The matrix of a convolution fits if the types of its inputs follow, in
    steps down and right, two permutations v and h of the four types that commute: `weight[j, c, r, s] = m[j, c, r, s] *
    strength[j, v^r h^s t[c]]`, m 0 or 1. All filters share v, h and the types t of the input channels; a neuron further
    right or down has its four strengths in permuted order. There are 120 pairs that commute.

    Storage only: no runtime here has crossbars; the network runs as an ordinary one, with few distinct weights.

    Departs from the paper: reconstructed from its abstract and the chip; which strengths it allowed and how it trained
    are not known here. Strengths are whole numbers of `strength_bits` times a scale for each filter (that of the norm
    or threshold behind it). The network given is trained already: of all pairs, then of all types of each channel in
    turn, those are taken that come nearest to the weights, with the best crossings and strengths for them in closed
    form. Activations stay as they are; the paper's are binary.

    Args:
        strength_bits: bits of a strength, its sign among them.
        epochs: training of crossings, strengths and all else.
        lr: learning rate of that training.
        optimizer: "adam" (default), "adamw", "sgd" or "momentum".
        where: which convolutions; all ungrouped 2-d ones when left out.

    Raises:
        BadOption: the network has no 2-d convolution.
        CompressionError: none could be structured.
    """
    levels = 2 ** (strength_bits - 1) - 1
    done = [path for path, site in sites(model, where, (nn.Conv2d,)).items() if _structured(model, site, levels)]
    if not done:
        raise CompressionError("every convolution is grouped or zero: choose other layers or another method")
    return task.fit(model, task, epochs=epochs, lr=lr, optimizer=optimizer, label="train crossings")


def _structured(model: nn.Module, site: Site, levels: int) -> bool:
    weight = site.weight.detach()
    grouped = cast(nn.Conv2d, site.module).groups > 1
    if grouped or not weight.any():
        skip(site.path, "grouped: its filters share no inputs" if grouped else "all its weights are zero")
        return False
    types = nearest_types(weight)
    chosen, strengths = fitted(weight, types)
    size = weight.abs().flatten(1).mean(1).view(-1, 1, 1, 1).clamp(min=1e-8)
    # a crossing flips when its number does: those of large weights last
    crossings = torch.where(chosen, weight.abs(), -(weight.abs().amax((1, 2, 3), keepdim=True) - weight.abs())) / size
    form = Crossbar(types, levels, torch.where(crossings == 0, -1e-3, crossings), strengths)
    attach(site.module, form, at=site.name, root=model)
    lost = float((site.weight.detach() - weight).norm() / weight.norm())
    made = float(chosen.float().mean())
    note(f"{site.path}: {made:.0%} of the crossings made, {lost:.0%} of the weight off before training")
    return True


# --- types of inputs --------------------------------------------------------------------------------------------------


def commuting() -> list[tuple[Permutation, Permutation]]:
    """The pairs (v, h) of permutations of the four types with `v h = h v`."""
    every = list(itertools.permutations(range(TYPES)))
    return [(v, h) for v in every for h in every if all(v[h[t]] == h[v[t]] for t in range(TYPES))]


def type_map(v: Permutation, h: Permutation, height: int, width: int) -> Tensor:
    """`v^r h^s t` for each first type t and place (r, s): (4, height, width)."""
    rows = [tuple(range(TYPES))]
    for _ in range(height - 1):
        rows.append(tuple(v[t] for t in rows[-1]))
    found = [[rows[r]] for r in range(height)]
    for row in found:
        for _ in range(width - 1):
            row.append(tuple(h[t] for t in row[-1]))
    return torch.tensor(found).permute(2, 0, 1)


def type_maps(height: int, width: int) -> Tensor:
    """The different maps of all commuting pairs, (number, 4, height, width)."""
    return torch.stack([type_map(v, h, height, width) for v, h in commuting()]).unique(dim=0)


def nearest_types(weight: Tensor) -> Tensor:
    """Types of a convolution's inputs, (in, height, width), that let crossings and strengths come near to its weight.

    The best pair where channels have the first types 0, 1, 2, 3, 0, ...; then the best first type of each channel in
    turn, the others held.
    """
    channels = weight.shape[1]
    first = torch.arange(channels) % TYPES
    maps = type_maps(*weight.shape[2:])
    best = maps[int(torch.stack([held(weight, one[first]) for one in maps]).argmax())]
    for channel in range(channels if channels > 1 else 0):
        tried = [torch.where(torch.arange(channels) == channel, t, first) for t in range(TYPES)]
        first = tried[int(torch.stack([held(weight, best[one]) for one in tried]).argmax())]
    return best[first]


def held(weight: Tensor, types: Tensor) -> Tensor:
    """How much of the squares of a weight the best crossings and strengths for these types hold."""
    gains = [_prefixes(weight, types, t)[0] for t in types.unique().tolist()]
    return torch.stack([gain.amax(1).sum() for gain in gains]).sum()


def fitted(weight: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
    """The crossings (as the weight) and strengths (out, 4) that come nearest to a weight, for given types.

    Of the inputs of a type a neuron takes the largest weights of one sign, k of them: their mean is the strength, and
    they hold `(sum of them)^2 / k` of the squares, which no other choice exceeds.
    """
    chosen, strengths = torch.zeros_like(weight, dtype=torch.bool).flatten(1), weight.new_zeros(len(weight), TYPES)
    for t in types.unique().tolist():
        gains, order, sums = _prefixes(weight, types, t)
        places = (types.flatten() == t).nonzero().flatten()
        count, side = gains.shape[1] // 2, gains.argmax(1)
        taken = side % count + 1
        for j in range(len(weight)):
            ranked = places[order[j] if side[j] < count else order[j].flip(0)]
            chosen[j, ranked[: int(taken[j])]] = True
            strengths[j, t] = sums[j, side[j]] / taken[j]
    return chosen.view_as(weight), strengths


def _prefixes(weight: Tensor, types: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each filter's weights of a type: what their largest k hold, their order, their sums; then the smallest k."""
    own = weight.flatten(1)[:, types.flatten() == t]
    ordered, order = own.sort(1, descending=True)
    sums = torch.cat([ordered.cumsum(1), ordered.flip(1).cumsum(1)], 1)
    counts = torch.arange(1, own.shape[1] + 1, device=own.device).repeat(2)
    right = torch.cat([sums[:, : own.shape[1]] > 0, sums[:, own.shape[1] :] < 0], 1)
    return torch.where(right, sums.square() / counts, 0.0), order, sums
