"""Network sketching: every filter as a sum of few binary filters with a scale each.

Yiwen Guo, Anbang Yao, Hao Zhao, Yurong Chen, "Network Sketching: Exploiting Binary Structure in Deep CNNs", CVPR 2017,
arXiv:1706.02021. A filter of t weights becomes `sum_j a_j B_j` of m filters of +1 and -1. Direct (Alg. 1): in turn
`B_j = sign(R)`, `a_j = <B_j, R> / t`, `R <- R - a_j B_j`, where R starts as the filter; what is left of `||W||^2` is at
most `(1 - 1/t)^m`. Refined (Alg. 2): after every new basis all scales are those of least squares,
`a = (B'B)^-1 B'W`. Associative (sec. 4): binary filters that read the same input share sums along a minimum spanning
tree (`association`, `associate`): a filter that differs in few signs from another, or from its negative, needs only the
inputs where they differ. No runtime executes that here: it is exact in integers, counted and tested; networks run by
multiplication, and what is gained is storage.

Departs from the paper: there is no retraining unless `epochs` asks for it, and then the scales are trained (with biases
and norms), the binary filters stay as they are. The file holds the 2^m sums of the scales of every filter, which for
filters of few weights (first layers) is as much as the bits save. With a mask, signs and scales are those of the
surviving weights. Where bases of a filter coincide the scales are those of least norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from featherweight.catalogue import ingredient, method
from featherweight.core.forms import Codes, Form, Table
from featherweight.core.levels import survivors
from featherweight.core.site import Site, channel_axis
from featherweight.errors import BadOption

MOST = 8  # bases that the bits of one byte name


@final
class BinaryBases(Form):
    """`weight[o] = sum_j scales[o, j] * (+1 where bit j of the symbol is set, else -1)`; scales (out, m) are free."""

    stands = ("weight",)
    stores = "free"
    settings = ("axis",)
    symbols: Tensor

    def __init__(self, scales: Tensor, symbols: Tensor, axis: int = 0) -> None:
        super().__init__()
        self.axis = axis
        self._start = scales.detach().clone()
        self.register_buffer("symbols", symbols)

    def free(self, weight: Tensor) -> tuple[Tensor, ...]:
        return (self._start,)

    def unsound(self) -> str:
        known = self._buffers.keys() == {"symbols"} and self.symbols.dtype == torch.uint8
        return "" if known and self.axis in (0, 1) else "without bytes as its symbols, or on an impossible axis"

    def table(self, scales: Tensor) -> Table:
        """The 2^m sums of the scales of every output."""
        return Table(scales @ signs_of(scales.shape[1]).to(scales).T, self.axis)

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        (scales,) = free
        return self.table(scales).decode(self.symbols, tuple(self.symbols.shape))

    def codes(self, *free: Tensor, keep: Tensor | None = None) -> Codes | None:
        (scales,) = free
        return Codes(self.symbols.cpu(), self.table(scales.detach().cpu()), tuple(self.symbols.shape))


def signs_of(m: int) -> Tensor:
    """The signs that the symbols 0 to 2^m - 1 of a byte stand for, shape (2^m, m), float64.

    >>> signs_of(2).tolist()
    [[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]
    """
    if not 1 <= m <= MOST:
        raise BadOption(f"{m} binary filters: symbols are bytes, which name 1 to {MOST}")
    return ((torch.arange(2**m).view(-1, 1) >> torch.arange(m)) % 2 * 2 - 1).double()


def sketch(rows: Tensor, keep: Tensor, m: int, *, refined: bool) -> tuple[Tensor, Tensor]:
    """Binary bases (out, t, m), zero where `keep` (out, t) is False, and scales (out, m) of filters (out, t)."""
    rows = torch.where(keep, rows.double(), 0.0)
    left, bases, scales = rows, rows.new_zeros(*rows.shape, 0), rows.new_zeros(len(rows), 0)
    for _ in range(m):
        basis = torch.where(left >= 0, 1.0, -1.0).double() * keep
        bases = torch.cat([bases, basis.unsqueeze(2)], 2)
        if refined:
            scales = (torch.linalg.pinv(bases.mT @ bases, hermitian=True) @ (bases.mT @ rows.unsqueeze(2))).squeeze(2)
        else:
            count = keep.sum(1).clamp_min(1)
            scales = torch.cat([scales, ((basis * left).sum(1) / count).unsqueeze(1)], 1)
        left = rows - (bases @ scales.unsqueeze(2)).squeeze(2)
    return bases, scales


def _form(site: Site, m: int, *, refined: bool) -> Form:
    if m > MOST:
        raise BadOption(f"weight_bits={m}: a sketch has 1 to {MOST} binary filters, more need another grid")
    survivors(site)
    axis, weight = channel_axis(site), site.weight
    rows, keep = (t.movedim(axis, 0) for t in (weight, site.keep.to(weight.device)))
    bases, scales = sketch(rows.flatten(1), keep.flatten(1), m, refined=refined)
    symbols = ((bases > 0) << torch.arange(m, device=weight.device)).sum(2).to(torch.uint8)
    return BinaryBases(scales.to(weight), symbols.view(rows.shape).movedim(0, axis).contiguous(), axis)


@ingredient("grid")
def sketch_direct(site: Site, bits: int) -> Form:
    """A binary filter for each bit, each with its own scale, one after another.

    >>> sketch_direct(Site.of(torch.tensor([[3.0, -1.0]])), 2).codes(torch.tensor([[2.0, 1.0]])).symbols.tolist()
    [[3, 2]]
    """
    return _form(site, bits, refined=False)


@ingredient("grid")
def sketch_refined(site: Site, bits: int) -> Form:
    """A binary filter for each bit; after each of them all scales are fitted anew.

    >>> sketch_refined(Site.of(torch.tensor([[3.0, -1.0]])), 2).codes(torch.tensor([[2.0, 1.0]])).decode().tolist()
    [[3.0, -1.0]]
    """
    return _form(site, bits, refined=True)


network_sketching = method(
    "quantize",
    weights=sketch_refined,
    weight_bits=3,
    paper="Guo et al., CVPR 2017, arXiv:1706.02021",
    shrinks={"bits"},
    small={"weight_bits": 2},
)


# --- the associative execution plan -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Association:
    """How binary filters (n, t) follow from each other: `bases[i] = sign[i] bases[parent[i]]`, but for `differ[i]`.

    `order` starts at the root, which is its own parent and is summed directly.
    """

    bases: Tensor
    order: tuple[int, ...]
    parent: tuple[int, ...]
    sign: tuple[int, ...]
    differ: tuple[Tensor, ...]

    @property
    def additions(self) -> int:
        """Additions and subtractions per position of the output: of the root t - 1, of another those that differ."""
        root = self.bases.shape[1] - 1
        return root + sum(len(self.differ[i]) for i in self.order[1:])

    @property
    def direct(self) -> int:
        """The same if every filter is summed by itself."""
        return len(self.bases) * (self.bases.shape[1] - 1)


def association(bases: Tensor) -> Association:
    """The minimum spanning tree over binary filters (n, t) of +1 and -1 that read the same input.

    An edge costs the number of signs that differ, `h` or `t - h` with the sign of one of them turned.
    """
    from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree

    t = bases.shape[1]
    apart = ((t - bases.float() @ bases.float().T) / 2).round()
    cost = torch.minimum(apart, t - apart).double().numpy() + 1  # without the one, equal filters would have no edge
    tree = minimum_spanning_tree(np.triu(cost, 1))
    order, before = breadth_first_order(tree, 0, directed=False)
    parent = [0 if i == 0 else int(before[i]) for i in range(len(bases))]
    sign = [1 if 2 * apart[i, p] <= t else -1 for i, p in enumerate(parent)]
    differ = [(bases[i] != s * bases[p]).nonzero().flatten() for i, (p, s) in enumerate(zip(parent, sign, strict=True))]
    return Association(bases, tuple(map(int, order)), tuple(parent), tuple(sign), tuple(differ))


def associate(plan: Association, columns: Tensor) -> Tensor:
    """`bases @ columns` of integers (t, positions), along the tree: exact, int64, shape (n, positions).

    `B_i x = s (B_p x) + 2 sum of B_i[e] x_e` over the entries e in which `B_i` and `s B_p` differ.
    """
    columns = columns.long()
    found = torch.zeros(len(plan.bases), columns.shape[1], dtype=torch.int64)
    for i in plan.order:
        if i == plan.order[0]:
            found[i] = (plan.bases[i].long().view(-1, 1) * columns).sum(0)
            continue
        at = plan.differ[i]
        found[i] = plan.sign[i] * found[plan.parent[i]] + 2 * (plan.bases[i, at].long().view(-1, 1) * columns[at]).sum(
            0
        )
    return found
