"""Matrices whose entries are a small network's answers to several hashed weights each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from featherweight.core.structures import (
    MOST,
    SEEDS,
    Free,
    Structure,
    both_signs,
    places,
    portable_places,
)

ENTRIES = 1 << 18  # that the small network makes at once


@final
@dataclass(frozen=True)
class FunctionalHash(Structure):
    """`W[i, j] = g(v_1, ..., v_U)`, `v_u = xi_u(i, j) w[h_u(i, j)]`: U hashes into one set of weights.

    Shi et al., 2016, arXiv:1605.06560. `g(v) = outer . tanh(inner v + inner_bias) + outer_bias`, with `width` units;
    with none, g is the sum, and with one hash besides it is the hashing trick (`Hashed`), bit for bit. Hash u has the
    streams 2 (u - 1) and, for the sign, 2 (u - 1) + 1.
    """

    buckets: int
    hashes: int
    width: int
    seed: int

    word = "functional"
    bounds: ClassVar[dict[str, tuple[int, int]]] = {
        "buckets": (1, MOST),
        "hashes": (1, 16),
        "width": (0, 64),
        "seed": (0, SEEDS),
    }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"weights": (self.buckets,)}
        if self.width:
            found |= {"inner": (self.width, self.hashes), "inner_bias": (self.width,)}
            found |= {"outer": (self.width,), "outer_bias": (1,)}
        return found

    @cached_property
    def table(self) -> Tensor:
        """(hashes, entries): where the weight of each stands among the weights and, behind them, their negatives."""
        count = self.rows * self.columns
        found = [places(self.seed, 2 * u, count, self.buckets) for u in range(self.hashes)]
        return torch.from_numpy(np.stack(found))

    def start(self, std: float) -> dict[str, Tensor]:
        free = {"weights": torch.randn(self.buckets) * std, **self.network(torch.tensor(std))}
        if not self.width:
            return {"weights": free["weights"] / math.sqrt(self.hashes)}
        spread = float(self.matrix(free).std(correction=0)) or 1.0
        return free | {name: free[name] * (std / spread) for name in ("outer", "outer_bias")}

    def network(self, scale: Tensor) -> dict[str, Tensor]:
        """A small network that is about the mean of its inputs where they are as large as `scale`, and 0 at 0."""
        if not self.width:
            return {}
        unit = torch.arange(self.width)
        inner = torch.zeros(self.width, self.hashes).to(scale)
        inner[unit, unit % self.hashes] = 1 / scale
        bias = torch.linspace(-0.5, 0.5, self.width).to(scale)  # no two units are alike
        outer = scale.expand(self.width) / self.width
        constant = -(outer * bias.tanh()).sum().view(1)
        return {"inner": inner, "inner_bias": bias, "outer": outer.clone(), "outer_bias": constant}

    def project(self, matrix: Tensor) -> dict[str, Tensor]:
        """A start, not the nearest: means over buckets of all hashes, and a network that is about the mean of them."""
        flat = matrix.flatten().double()
        sums, counts = flat.new_zeros(2, self.buckets)
        for place in self.table.long().to(matrix.device):
            minus = place >= self.buckets
            index = torch.where(minus, place - self.buckets, place)
            sums.index_add_(0, index, torch.where(minus, -flat, flat))
            counts += torch.bincount(index, minlength=self.buckets)
        weights = (sums / counts.clamp(min=1)).to(matrix.dtype)
        if not self.width:
            return {"weights": weights / self.hashes}
        return {"weights": weights, **self.network(weights.square().mean().sqrt().clamp(min=1e-3))}

    def matrix(self, free: Free) -> Tensor:
        return self.entries(free, self.table).view(self.rows, self.columns)

    def entries(self, free: Free, table: Tensor) -> Tensor:
        """The entries of which a table (hashes, entries) says the places of their weights, piece by piece."""
        pieces = table.to(free["weights"].device).split(ENTRIES, 1)
        if len(pieces) == 1:
            return self.answers(free, pieces[0])
        # what the small network computes on the way is many times the matrix: it is computed again for the gradient
        return torch.cat([checkpoint(self.answers, free, piece, use_reentrant=False) for piece in pieces])

    def answers(self, free: Free, table: Tensor) -> Tensor:
        """The entries of a piece of the table."""
        both = both_signs(free["weights"])
        read = [both.index_select(0, place) for place in table.unbind(0)]
        if not self.width:
            return sum(read[1:], read[0])
        hidden = torch.tanh(free["inner"] @ torch.stack(read) + free["inner_bias"][:, None])
        return free["outer"] @ hidden + free["outer_bias"]

    def portable(self, free: Free, one: Tensor) -> Tensor:
        count = self.rows * self.columns
        places = [portable_places(one, self.seed, 2 * u, count, self.buckets) for u in range(self.hashes)]
        return self.answers(free, torch.stack(places)).view(self.rows, self.columns)

    def some_rows(self, free: Free, index: Tensor) -> Tensor:
        table = self.table.view(self.hashes, self.rows, self.columns)[:, index.to(self.table.device).flatten()]
        return self.entries(free, table.flatten(1)).view(*index.shape, self.columns)

    def product(self, x: Tensor, free: Free) -> Tensor:
        return F.linear(x, self.matrix(free))

    def making(self) -> int:
        return self.rows * self.columns * self.width * (self.hashes + 1)

    def macs(self, vectors: int) -> int:
        return vectors * self.rows * self.columns + self.making()
