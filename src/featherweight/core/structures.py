"""Matrices that few free parameters make: entries that are equal, or formulas over vectors.

A structure is a small frozen value with pure functions; `core/structured` has the layers whose weight it makes. What
follows from its settings alone (index tables, signs) is never stored: it comes back bit for bit on any machine.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any, ClassVar, final
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from featherweight.errors import BadOption, unknown

MOST = 1 << 28  # entries of a matrix: what a file may ask for by plain numbers
SEEDS = 1 << 62
PIECE = 1 << 22  # entries that are hashed at once
Free = Mapping[str, Tensor]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Structure(ABC):
    """A matrix (rows, columns) as a function of few free parameters.

    Final classes name themselves in `word`, and say in `bounds` what their further fields may be: (least, most).

    Raises:
        BadOption: a matrix without entries or with more than 2^28, or a field outside its bounds.
    """

    rows: int
    columns: int

    word: ClassVar[str]
    bounds: ClassVar[dict[str, tuple[int, int]]] = {}
    known: ClassVar[dict[str, type[Structure]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "word" in vars(cls):
            Structure.known[cls.word] = cls

    def __post_init__(self) -> None:
        if not 0 < self.rows * self.columns <= MOST:
            raise BadOption(
                f"a {self.word} matrix of {self.rows} x {self.columns}: it must have 1 to {MOST} entries, "
                "choose other layers"
            )
        for name, (low, high) in self.bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise BadOption(f"{name}={value} of a {self.word} matrix: must be from {low} to {high}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Structure:
        return self  # nothing in it ever changes

    @property
    def told(self) -> tuple[Any, ...]:
        """Its word and settings, as a layer is given them: `made` takes them back."""
        return (self.word, *astuple(self)[2:])

    @property
    def outputs_a_bias(self) -> int:
        """How many outputs in a row have one bias: those that one filter makes."""
        return 1

    @property
    def size(self) -> int:
        """The number of free parameters."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The free parameters by name, and their shapes."""

    @abstractmethod
    def start(self, std: float) -> dict[str, Tensor]:
        """Random free parameters that make entries of this standard deviation."""

    @abstractmethod
    def project(self, matrix: Tensor) -> dict[str, Tensor]:
        """The free parameters that come near to a matrix, in its type; see each class for how near."""

    @abstractmethod
    def matrix(self, free: Free) -> Tensor:
        """The matrix, shape (rows, columns)."""

    @abstractmethod
    def product(self, x: Tensor, free: Free) -> Tensor:
        """The matrix times vectors, (..., columns) -> (..., rows), in the way that this class executes it."""

    @abstractmethod
    def portable(self, free: Free, one: Tensor) -> Tensor | None:
        """The matrix by real operations that other runtimes have, without tables; None where there is no such way.

        Args:
            one: a 1 of 64 bits, shape (1,): whatever else is counted, is counted from it.
        """

    @abstractmethod
    def some_rows(self, free: Free, index: Tensor) -> Tensor:
        """These rows of the matrix, (...) -> (..., columns)."""

    @abstractmethod
    def making(self) -> int:
        """Multiplications that making the matrix once takes."""

    @abstractmethod
    def macs(self, vectors: int) -> int:
        """Multiplications that `product` of so many vectors takes."""


# --- equal entries ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tied(Structure):
    """A matrix of which every entry is one of few weights, or minus one of them."""

    @abstractmethod
    def entries(self) -> Array:
        """For each entry, row by row, where it stands among the weights and, behind them, their negatives; int32."""

    @cached_property
    def table(self) -> Tensor:
        """The same as a tensor."""
        return torch.from_numpy(self.entries())

    def start(self, std: float) -> dict[str, Tensor]:
        return {name: torch.randn(shape) * std for name, shape in self.shapes().items()}

    def project(self, matrix: Tensor) -> dict[str, Tensor]:
        """The nearest such matrix (least squares): each weight is the mean of its entries, their signs taken off."""
        ((name, shape),) = self.shapes().items()
        place = self.table.long().to(matrix.device)
        minus = place >= self.size
        values = torch.where(minus, -matrix.flatten(), matrix.flatten()).double()
        place = torch.where(minus, place - self.size, place)
        sums = values.new_zeros(self.size).index_add_(0, place, values)
        counts = torch.bincount(place, minlength=self.size).clamp(min=1)
        return {name: (sums / counts).to(matrix.dtype).view(shape)}

    def matrix(self, free: Free) -> Tensor:
        (weights,) = free.values()
        both = both_signs(weights)
        return both.index_select(0, self.table.to(both.device)).view(self.rows, self.columns)

    def some_rows(self, free: Free, index: Tensor) -> Tensor:
        (weights,) = free.values()
        both = both_signs(weights)
        table = self.table.to(both.device).view(self.rows, self.columns)[index]
        return both.index_select(0, table.flatten()).view(*index.shape, self.columns)

    def making(self) -> int:
        return 0


def both_signs(weights: Tensor) -> Tensor:
    """Weights and, behind them, their negatives."""
    return torch.cat([weights.flatten(), -weights.flatten()])


@final
@dataclass(frozen=True)
class Circulant(Tied):
    """Circulants times fixed random signs: `W = C(r) D` with `C(r)[i, j] = r[(i - j) mod columns]`.

    Cheng et al., ICCV 2015. Of a matrix with fewer rows the first rows of one circulant are used; one with more
    rows is a stack of circulants, `vectors[b]` being that of rows b * columns to (b + 1) * columns.
    """

    seed: int

    word = "circulant"
    bounds: ClassVar[dict[str, tuple[int, int]]] = {"seed": (0, SEEDS)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"vectors": (-(-self.rows // self.columns), self.columns)}

    def entries(self) -> Array:
        i, j = np.arange(self.rows, dtype=np.int32)[:, None], np.arange(self.columns, dtype=np.int32)
        index = (i - j) % self.columns + i // self.columns * self.columns + self.size * self.minus.astype(np.int32)
        return index.astype(np.int32).ravel()

    @cached_property
    def minus(self) -> Array:
        """Where the diagonal D is -1."""
        return np.asarray(hashed(self.seed, 0, 0, self.columns) >> np.uint64(63) == 1)

    def portable(self, free: Free, one: Tensor) -> Tensor:
        n = self.columns
        # with r repeated in rows that are longer by one, each row begins one further on: row i, column j: r[i + j + 1]
        shifted = torch.cat([free["vectors"][:, 1:], free["vectors"][:, :1]], 1)
        rows = shifted[:, None].expand(-1, n + 1, n).reshape(-1, n, n + 1)[:, :, :n]
        signs = torch.from_numpy(np.where(self.minus, -1, 1).astype(np.int8)).to(rows.dtype)
        return rows.flip(2).reshape(-1, n)[: self.rows] * signs

    def product(self, x: Tensor, free: Free) -> Tensor:
        vectors, n = whole(free["vectors"]), self.columns
        turned = whole(torch.where(torch.from_numpy(self.minus).to(x.device), -x, x))
        spectrum = torch.fft.rfft(turned).unsqueeze(-2) * torch.fft.rfft(vectors)
        return torch.fft.irfft(spectrum, n=n).flatten(-2)[..., : self.rows].to(x.dtype)

    def macs(self, vectors: int) -> int:
        blocks, n = -(-self.rows // self.columns), self.columns
        transforms = vectors * (1 + blocks) + blocks
        return transforms * transform(n) + vectors * blocks * 4 * (n // 2 + 1)


@final
@dataclass(frozen=True)
class Hashed(Tied):
    """The hashing trick: `W[i, j] = xi(i, j) w[h(i, j)]`, h and the sign xi two hashes of i * columns + j.

    Chen et al., ICML 2015. `h` is `hashed(seed, 0, .) mod buckets`, xi the highest bit of `hashed(seed, 1, .)`.
    """

    buckets: int
    seed: int

    word = "hashed"
    bounds: ClassVar[dict[str, tuple[int, int]]] = {"buckets": (1, MOST), "seed": (0, SEEDS)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weights": (self.buckets,)}

    def entries(self) -> Array:
        return places(self.seed, 0, self.rows * self.columns, self.buckets)

    def portable(self, free: Free, one: Tensor) -> Tensor:
        place = portable_places(one, self.seed, 0, self.rows * self.columns, self.buckets)
        return both_signs(free["weights"])[place].view(self.rows, self.columns)

    def product(self, x: Tensor, free: Free) -> Tensor:
        return F.linear(x, self.matrix(free))

    def macs(self, vectors: int) -> int:
        return vectors * self.rows * self.columns


def near(structure: Structure, matrix: Tensor, steps: int) -> dict[str, Tensor]:
    """Free parameters that come near to a matrix: the projection, then steps of L-BFGS on the squared distance.

    A structure whose projection is the nearest needs no steps.
    """
    matrix = whole(matrix)
    free = structure.project(matrix)
    trained = [v.clone(memory_format=torch.contiguous_format).requires_grad_() for v in free.values()]
    if steps == 0 or not matrix.any():
        return free
    optimizer = torch.optim.LBFGS(trained, max_iter=steps, line_search_fn="strong_wolfe")
    whole_norm = matrix.square().sum()

    def distance() -> float:
        optimizer.zero_grad()
        loss = (structure.matrix(dict(zip(free, trained, strict=True))) - matrix).square().sum() / whole_norm
        loss.backward()
        return float(loss.detach())

    with torch.enable_grad():
        optimizer.step(distance)
    return {name: value.detach() for name, value in zip(free, trained, strict=True)}


# --- hashes and transforms --------------------------------------------------------------------------------------------


def hashed(seed: int, stream: int, first: int, count: int) -> Array:
    """Hashes of the numbers from `first` on, 64 bits each: the finalizer of splitmix64 on a Weyl sequence.

    `stream` numbers independent hashes of one seed. Source: Steele, Lea and Flood, OOPSLA 2014, "Fast splittable
    pseudorandom number generators" (the constants are Stafford's variant 13).

    >>> [hex(h) for h in hashed(0, 0, 0, 2).tolist()]
    ['0xe220a8397b1dcdaf', '0x6e789e6aa1b965f4']
    """
    begin = finalized(finalized(np.array([seed], np.uint64)) + np.uint64(stream))
    steps = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    return finalized(begin + steps * np.uint64(0x9E3779B97F4A7C15))


def finalized(z: Array) -> Array:
    """A permutation of the 64-bit numbers, in which every bit of the input reaches every bit of the output."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def places(seed: int, stream: int, count: int, buckets: int) -> Array:
    """For the numbers below `count` a bucket each by a hash; as many buckets on where the next hash says minus."""
    found = np.empty(count, np.int32)
    for first in range(0, count, PIECE):
        part = slice(first, min(first + PIECE, count))
        found[part] = hashed(seed, stream, first, part.stop - first) % np.uint64(buckets)
        found[part] += np.int32(buckets) * (hashed(seed, stream + 1, first, part.stop - first) >> np.uint64(63) == 1)
    return found


def portable_places(one: Tensor, seed: int, stream: int, count: int, buckets: int) -> Tensor:
    """`places` as places among weights and their negatives, in signed arithmetic of 64 bits, counted from a 1."""
    index = portable_hashes(one, seed, stream, count)
    upper, lower = _shifted(index, 32) % buckets, (index & 0xFFFFFFFF) % buckets
    index = (upper * ((1 << 32) % buckets) + lower) % buckets  # of a number without a sign
    return index + buckets * _shifted(portable_hashes(one, seed, stream + 1, count), 63)


def portable_hashes(one: Tensor, seed: int, stream: int, count: int) -> Tensor:
    """`hashed` from 0 on, as signed numbers of 64 bits."""
    begin = finalized(finalized(np.array([seed], np.uint64)) + np.uint64(stream))
    z = one.expand(count).cumsum(0) * _signed(0x9E3779B97F4A7C15) + _signed(int(begin[0]))
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """A shift to the right that fills with zeros."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    """The signed number of 64 bits with the bits of one without a sign."""
    return number - (1 << 64) if number >= 1 << 63 else number


def whole(x: Tensor) -> Tensor:
    """Numbers in at least single precision: Fourier transforms have no others."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def transform(n: int) -> int:
    """Multiplications of a Fourier transform of n real numbers: n/4 log2 n butterflies of four each, no fewer than n.

    A convention to compare by, that of a power of two; libraries need fewer or more for other n.
    """
    return max(n, round(n * math.log2(n))) if n > 1 else 1


def sound(told: Any) -> bool:
    """Whether this is a word and as many whole numbers, within bounds, as that structure has."""
    kind = Structure.known.get(told[0]) if isinstance(told, tuple) and told and isinstance(told[0], str) else None
    if kind is None or len(told) != 1 + len(kind.bounds):
        return False
    pairs = zip(told[1:], kind.bounds.values(), strict=True)
    return all(isinstance(v, int) and not isinstance(v, bool) and low <= v <= high for v, (low, high) in pairs)


_alive: WeakValueDictionary[tuple[Any, ...], Structure] = WeakValueDictionary()


def made(told: tuple[Any, ...], rows: int, columns: int) -> Structure:
    """The structure that `told` tells, of a matrix of this size: one object, as long as anybody holds it.

    So layers of one structure, copies of a network and its traced graph share tables, and these go with the last.

    Raises:
        UnknownName: there is no structure of this name.
        BadOption: its settings are others.
    """
    if told[0] not in Structure.known:
        raise unknown("structure", str(told[0]), Structure.known)
    kind = Structure.known[told[0]]
    if not sound(tuple(told)):
        wanted = ", ".join(f"{name} {low}..{high}" for name, (low, high) in kind.bounds.items())
        raise BadOption(f"structure {told[1:]}: {kind.word} takes {wanted or 'nothing'}")
    key = (*told, rows, columns)
    found = _alive.get(key)
    if found is None:
        found = _alive[key] = kind(rows, columns, *told[1:])
    return found
