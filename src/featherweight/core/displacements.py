"""Matrices of low displacement rank: what is left of them after a shift or a scaling of rows and columns is thin.

A matrix is cut into squares, of the smaller of its two sizes; each is made from two sets of vectors, `left` (g) and
`right` (h), of which there are `rank`. Parts of squares that stand out of the matrix are left away.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from featherweight.core.structures import Array, Free, Structure, transform, whole
from featherweight.errors import BadOption

SMALLEST = 1e-2  # a factor of no less, beside a zero: from two zeros no gradient leads away


@dataclass(frozen=True)
class Displaced(Structure):
    """Squares A of which `displace(A) = sum_k g_k h_k^T`, k up to `rank`."""

    rank: int

    bounds: ClassVar[dict[str, tuple[int, int]]] = {"rank": (1, 1 << 14)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank > self.n:
            raise BadOption(f"displacement rank {self.rank} of squares of {self.n}: must be from 1 to {self.n}")

    @property
    def n(self) -> int:
        """The size of the squares."""
        return min(self.rows, self.columns)

    @property
    def grid(self) -> tuple[int, int]:
        """How many squares stand below and beside one another."""
        return -(-self.rows // self.n), -(-self.columns // self.n)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shape = (math.prod(self.grid), self.rank, self.n)
        return {"left": shape, "right": shape}

    def start(self, std: float) -> dict[str, Tensor]:
        free = {name: torch.randn(shape) for name, shape in self.shapes().items()}
        made = self.matrix(free)
        spread = float(made.std(correction=0)) or float(made.square().mean().sqrt())  # a single entry has none
        scale = math.sqrt(std / spread) if spread else 1.0
        return {name: value * scale for name, value in free.items()}

    def project(self, matrix: Tensor) -> dict[str, Tensor]:
        """Singular vectors of each square's displacement: exact where the rank is enough, else a start.

        The displacement is nearest (Eckart and Young), the matrix itself need not be.
        """
        u, s, vh = torch.linalg.svd(self.displace(self.squares(matrix.double())), full_matrices=False)
        u, s, vh = u[..., : self.rank], s[..., : self.rank, None], vh[..., : self.rank, :]
        root = s.clamp(min=SMALLEST).sqrt()
        return {"left": (u.mT * root).to(matrix.dtype), "right": (vh * s / root).to(matrix.dtype)}

    def squares(self, matrix: Tensor) -> Tensor:
        """The squares of a matrix, (number, n, n), zeros where they stand out."""
        (down, beside), n = self.grid, self.n
        padded = F.pad(matrix, (0, beside * n - self.columns, 0, down * n - self.rows))
        return padded.view(down, n, beside, n).transpose(1, 2).reshape(-1, n, n)

    def joined(self, squares: Tensor) -> Tensor:
        """The matrix of squares."""
        (down, beside), n = self.grid, self.n
        matrix = squares.view(down, beside, n, n).transpose(1, 2).reshape(down * n, beside * n)
        return matrix[: self.rows, : self.columns]

    def some_rows(self, free: Free, index: Tensor) -> Tensor:
        return F.embedding(index, self.matrix(free))

    @abstractmethod
    def displace(self, squares: Tensor) -> Tensor:
        """The displacements of squares, (..., n, n)."""


@final
@dataclass(frozen=True)
class ToeplitzLike(Displaced):
    """`Z_1 A - A Z_-1 = G H^T`, so that `A = 1/2 sum_k Z_1(g_k) Z_-1(J h_k)`, run by Fourier transforms.

    Sindhwani et al., NIPS 2015. `Z_f` shifts down, what falls out at the end comes in at the top times f;
    `Z_f(v)` has the columns `Z_f^j v`; J turns a vector round. Rank 1 has the circulants and skew-circulants, rank 2
    the Toeplitz matrices and their inverses, rank n every matrix.
    """

    word = "toeplitz"

    def displace(self, squares: Tensor) -> Tensor:
        return down(squares, 1) - left(squares, -1)

    def matrix(self, free: Free) -> Tensor:
        g, h = whole(free["left"]), whole(free["right"])
        roots, turned = shift_values(self.n, g, -1)
        return self.joined(untwisted(g.mT @ h, roots[:, None] - turned)).to(free["left"].dtype)

    def portable(self, free: Free, one: Tensor) -> Tensor:
        products = circulant(free["left"], 1) @ circulant(free["right"].flip(-1), -1)
        return self.joined(0.5 * products.sum(1))

    def product(self, x: Tensor, free: Free) -> Tensor:
        (below, beside), n = self.grid, self.n
        eta = root_powers(n, whole(x))
        g, h = (whole(free[name]).view(below, beside, self.rank, n) for name in ("left", "right"))
        g, h = torch.fft.rfft(g), torch.fft.fft(eta * h.flip(-1))
        pieces = F.pad(whole(x), (0, beside * n - self.columns)).unflatten(-1, (beside, n))
        turned = torch.fft.fft(eta * pieces)[..., None, :, None, :]  # (..., 1, beside, 1, n)
        inner = (eta.conj() * torch.fft.ifft(turned * h)).real  # Z_-1(J h) x, (..., below, beside, rank, n)
        summed = (torch.fft.rfft(inner) * g).sum((-3, -2))
        return 0.5 * torch.fft.irfft(summed, n=n).flatten(-2)[..., : self.rows].to(x.dtype)

    def making(self) -> int:
        return math.prod(self.grid) * (self.rank * self.n**2 + untwisting(self.n))

    def macs(self, vectors: int) -> int:
        (below, beside), n = self.grid, self.n
        squares = below * beside
        each = 3 * transform(n) + 8 * n  # of a square and rank: one complex transform back, one real, two products
        once = squares * self.rank * (3 * transform(n) + 4 * n)  # those of the free parameters
        a_vector = beside * (2 * transform(n) + 2 * n) + squares * self.rank * each + below * transform(n)
        return vectors * a_vector + once


# --- other operators, of which the matrix is made whole ------------------------------------------------------------


@dataclass(frozen=True)
class MadeWhole(Displaced):
    """Squares that are made from their displacements, and then multiplied with like any matrix."""

    def matrix(self, free: Free) -> Tensor:
        g, h = whole(free["left"]), whole(free["right"])
        return self.joined(self.solve(g.mT @ h)).to(free["left"].dtype)

    def portable(self, free: Free, one: Tensor) -> None:
        return None

    def product(self, x: Tensor, free: Free) -> Tensor:
        return F.linear(x, self.matrix(free))

    def making(self) -> int:
        return math.prod(self.grid) * (self.rank * self.n**2 + self.solving())

    def macs(self, vectors: int) -> int:
        return vectors * self.rows * self.columns + self.making()

    @abstractmethod
    def solve(self, displaced: Tensor) -> Tensor:
        """The squares that have these displacements, (..., n, n)."""

    @abstractmethod
    def solving(self) -> int:
        """Multiplications that `solve` takes for a square."""


@dataclass(frozen=True)
class Shifted(MadeWhole):
    """`A - Z_1 A B = G H^T` with B a shift that turns signs: two Fourier transforms take it apart."""

    way: ClassVar[int]  # which way B moves columns: 1 right, -1 left

    def displace(self, squares: Tensor) -> Tensor:
        moved = left(squares, -1) if self.way < 0 else right(squares, -1)
        return squares - down(moved, 1)

    def solve(self, displaced: Tensor) -> Tensor:
        return untwisted(displaced, 1 - torch.outer(*shift_values(self.n, displaced, self.way)))

    def solving(self) -> int:
        return untwisting(self.n)


@final
@dataclass(frozen=True)
class SteinToeplitz(Shifted):
    """`A - Z_1 A Z_-1^T = G H^T`: Toeplitz matrices have rank 2."""

    word = "stein_toeplitz"
    way = 1


@final
@dataclass(frozen=True)
class SteinHankel(Shifted):
    """`A - Z_1 A Z_-1 = G H^T`: Hankel matrices have rank 2."""

    word = "stein_hankel"
    way = -1


@final
@dataclass(frozen=True)
class SteinVandermonde(MadeWhole):
    """`A - diag(t) A Z_0 = G H^T`, `t[i] = cos((2 i + 1) pi / (2 n))`: the powers of t, falling, have rank 1.

    Z_0 is nilpotent: `A = sum_k diag(t)^k G H^T Z_0^k`, a correlation of each row with powers of its node.
    """

    word = "stein_vandermonde"

    @cached_property
    def nodes(self) -> Array:
        return np.asarray(np.cos((2 * np.arange(self.n) + 1) * np.pi / (2 * self.n)))

    def displace(self, squares: Tensor) -> Tensor:
        return squares - torch.from_numpy(self.nodes).to(squares)[:, None] * left(squares, 0)

    def solve(self, displaced: Tensor) -> Tensor:
        n = self.n
        powers = torch.from_numpy(self.nodes[:, None] ** np.arange(n)).to(displaced)
        spectrum = torch.fft.rfft(displaced, n=2 * n) * torch.fft.rfft(powers, n=2 * n).conj()
        return torch.fft.irfft(spectrum, n=2 * n)[..., :n]

    def solving(self) -> int:
        return self.n * (3 * transform(2 * self.n) + 4 * (self.n + 1))


@final
@dataclass(frozen=True)
class SteinCauchy(MadeWhole):
    """`A - diag(a) A diag(b) = G H^T`, `a[i] = i + 1`, `b[j] = 1 / (j + 3/2)`: `1 / (1 - a[i] b[j])` has rank 1."""

    word = "stein_cauchy"

    @cached_property
    def kernel(self) -> Array:
        return np.asarray(1 - (np.arange(self.n)[:, None] + 1) / (np.arange(self.n) + 1.5))

    def displace(self, squares: Tensor) -> Tensor:
        return squares * torch.from_numpy(self.kernel).to(squares)

    def solve(self, displaced: Tensor) -> Tensor:
        return displaced / torch.from_numpy(self.kernel).to(displaced)

    def solving(self) -> int:
        return self.n**2


@final
@dataclass(frozen=True)
class SylvesterToeplitzHankel(MadeWhole):
    """`Y_1 A - A Y_-1 = G H^T`: sums of a Toeplitz and a Hankel matrix have rank 4.

    `Y_f = Z_0 + Z_0^T` with a 1 in its first and an f in its last corner. Cosines take both apart: Y_1 has the values
    2 cos(i pi / n), Y_-1 those between them, 2 cos((i + 1/2) pi / n), so that no two are equal.
    """

    word = "sylvester_toeplitz_hankel"

    @cached_property
    def bases(self) -> tuple[Array, Array, Array]:
        """Eigenvectors of Y_1 and of Y_-1, in columns, and the differences of their eigenvalues."""
        n, odd = self.n, 2 * np.arange(self.n) + 1
        angles = np.arange(n) * np.pi / n, odd * np.pi / (2 * n)
        first, second = (np.cos(np.outer(odd, angle) / 2) for angle in angles)
        values = [2 * np.cos(angle) for angle in angles]
        return unit(first), unit(second), values[0][:, None] - values[1]

    def displace(self, squares: Tensor) -> Tensor:
        rows = down(squares, 0) + down(squares.flip(-2), 0).flip(-2)
        rows = (
            rows
            + F.pad(squares[..., :1, :], (0, 0, 0, self.n - 1))
            + F.pad(squares[..., -1:, :], (0, 0, self.n - 1, 0))
        )
        columns = left(squares, 0) + right(squares, 0)
        columns = columns + F.pad(squares[..., :1], (0, self.n - 1)) - F.pad(squares[..., -1:], (self.n - 1, 0))
        return rows - columns

    def solve(self, displaced: Tensor) -> Tensor:
        first, second, gaps = (torch.from_numpy(a).to(displaced) for a in self.bases)
        return first @ ((first.T @ displaced @ second) / gaps) @ second.T

    def solving(self) -> int:
        return 4 * self.n**3 + self.n**2


def unit(columns: Array) -> Array:
    """Columns of length 1."""
    return np.asarray(columns / np.linalg.norm(columns, axis=0))


def root_powers(n: int, like: Tensor) -> Tensor:
    """`exp(i pi k / n)` for k below n: multiplied by these, a shift that turns signs is one that does not."""
    angles = torch.arange(n, dtype=like.dtype, device=like.device) * (math.pi / n)
    return torch.polar(torch.ones_like(angles), angles)


def circulant(vectors: Tensor, f: int) -> Tensor:
    """`Z_f(v)` for vectors (..., n), without indices: in rows that are longer by one each begins one further on."""
    n = vectors.shape[-1]
    lines = torch.cat([vectors.flip(-1), f * vectors.flip(-1)], -1)  # lines[k] = Z_f(v)[i, j] where k = n - 1 - i + j
    rows = lines[..., None, :].expand(*lines.shape[:-1], n + 1, 2 * n).flatten(-2)
    return rows[..., : n * (2 * n + 1)].unflatten(-1, (n, 2 * n + 1))[..., :n].flip(-2)


def shift_values(n: int, like: Tensor, way: int) -> tuple[Tensor, Tensor]:
    """What transforms are multiplied by where rows move down (Z_1), and where columns move and turn their signs.

    The columns' transform is that of their product with `root_powers`; way: 1 right (Z_-1^T), -1 left (Z_-1).
    """
    eta = root_powers(n, like)
    values = eta.square()  # n-th roots of 1
    turn = torch.polar(torch.ones_like(eta.real[:1]), eta.real.new_tensor([way * math.pi / n]))
    return values.conj(), turn * (values.conj() if way > 0 else values)


def untwisted(displaced: Tensor, kernel: Tensor) -> Tensor:
    """The squares whose transforms (see `shift_values`), times the kernel, are those of their displacements."""
    eta = root_powers(displaced.shape[-1], displaced)
    return (eta.conj() * torch.fft.ifft2(torch.fft.fft2(eta * displaced) / kernel)).real


def untwisting(n: int) -> int:
    """Multiplications that `untwisted` takes for a square."""
    return 8 * n * transform(n) + 8 * n**2


def down(squares: Tensor, f: int) -> Tensor:
    """`Z_f A`: rows one further down."""
    return torch.cat([f * squares[..., -1:, :], squares[..., :-1, :]], -2)


def left(squares: Tensor, f: int) -> Tensor:
    """`A Z_f`: columns one further left."""
    return torch.cat([squares[..., 1:], f * squares[..., :1]], -1)


def right(squares: Tensor, f: int) -> Tensor:
    """`A Z_f^T`: columns one further right."""
    return torch.cat([f * squares[..., -1:], squares[..., :-1]], -1)
