"""Linear layers of product codebooks: inner products with every codeword once, then look-ups and additions."""

from __future__ import annotations

from functools import partial
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor, nn

from featherweight.errors import BadData
from featherweight.runtime.bit_layers import inference_only
from featherweight.runtime.threads import divided

TOGETHER = 8  # blocks whose tables are made, and added in one pass over the outputs: they stay in the nearest caches
LANES = 16  # samples side by side
LOOKED_UP = 1000.0  # table entries that one thread adds in a microsecond


@njit(cache=True, nogil=True)
def add_one(x: Any, books: Any, symbols: Any, out: Any, first: int, last: int) -> None:
    """`out[o] += sum_j <x_j, books[j, :, symbols[j, o]]>` for outputs `first` to `last`, of one sample.

    x is (blocks, d), books (blocks, d, codewords); the blocks are a multiple of eight.
    """
    blocks, width, codewords = books.shape
    tables = np.empty((TOGETHER, codewords), dtype=np.float32)
    a, b, c, d, e, f, g, h = tables
    found = out[first:last]
    for start in range(0, blocks, TOGETHER):
        for j in range(TOGETHER):
            table, book = tables[j], books[start + j]
            table[:] = 0
            for i in range(width):
                value, row = x[start + j, i], book[i]
                for word in range(codewords):
                    table[word] += value * row[word]
        chosen = symbols[start:, first:last]
        p, q, r, s, t, u, v, w = (
            chosen[0], chosen[1], chosen[2], chosen[3], chosen[4], chosen[5], chosen[6], chosen[7]
        )  # fmt: skip
        for o in range(last - first):
            left, right = (a[p[o]] + b[q[o]]) + (c[r[o]] + d[s[o]]), (e[t[o]] + f[u[o]]) + (g[v[o]] + h[w[o]])
            found[o] += left + right


@njit(cache=True, nogil=True)
def add_many(tables: Any, symbols: Any, out: Any, first: int, last: int) -> None:
    """`out[o] += sum_j tables[j, symbols[j, o]]` of LANES samples: tables (blocks, codewords, LANES)."""
    for j in range(0, len(tables), TOGETHER):
        for o in range(first, last):
            a, b = tables[j, symbols[j, o]], tables[j + 1, symbols[j + 1, o]]
            c, d = tables[j + 2, symbols[j + 2, o]], tables[j + 3, symbols[j + 3, o]]
            e, f = tables[j + 4, symbols[j + 4, o]], tables[j + 5, symbols[j + 5, o]]
            g, h = tables[j + 6, symbols[j + 6, o]], tables[j + 7, symbols[j + 7, o]]
            found = out[o]
            for lane in range(LANES):
                left, right = (a[lane] + b[lane]) + (c[lane] + d[lane]), (e[lane] + f[lane]) + (g[lane] + h[lane])
                found[lane] += left + right


@final
class TableLinear(nn.Module):
    """`y[o] = sum_j <x_j, codebook_j[symbols[o, j]]> + bias[o]`, each inner product computed once for all outputs.

    Args:
        codebooks: (blocks, k, d), or (stages, blocks, k, d) whose codewords are added.
        symbols: (out, blocks) or (stages, out, blocks).
        bias: of shape (out,), or None.
    """

    codebooks: Tensor
    symbols: Tensor
    bias: Tensor

    def __init__(self, codebooks: Tensor, symbols: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        books, chosen = (t if codebooks.dim() == 4 else t[None] for t in (codebooks, symbols))
        self.stages, self.blocks, self.codewords, self.width = books.shape
        self.out_features, self.in_features = chosen.shape[1], self.blocks * self.width
        spare = -self.stages * self.blocks % TOGETHER  # blocks of zeros
        flat = chosen.transpose(1, 2).reshape(-1, self.out_features)  # (stages * blocks, out)
        upright = books.detach().float().transpose(2, 3).reshape(-1, self.width, self.codewords)
        kind = torch.uint8 if self.codewords <= 256 else torch.int32
        self.register_buffer("codebooks", F.pad(upright, (0, 0, 0, 0, 0, spare)))
        self.register_buffer("symbols", F.pad(flat.to(kind), (0, 0, 0, spare)))
        self.register_buffer("bias", torch.zeros(self.out_features) if bias is None else bias.detach().float().clone())

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.stages} x {self.blocks} x {self.codewords} codewords"

    def forward(self, x: Tensor) -> Tensor:
        plain = inference_only(x, self)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise BadData(f"a TableLinear of {self.in_features} inputs was given a tensor of shape {tuple(x.shape)}")
        flat = plain.float().reshape(-1, self.in_features)
        rows = (
            [self._one(row) for row in flat] if len(flat) < LANES // 2 else [self._many(p) for p in flat.split(LANES)]
        )
        out = torch.cat(rows) if rows else torch.empty(0, self.out_features)
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _parts(self, x: Tensor) -> Tensor:
        """Rows (n, in) as (stages * blocks + spare, d, n): the same for each stage."""
        parts = x.reshape(len(x), self.blocks, self.width).permute(1, 2, 0).repeat(self.stages, 1, 1)
        return F.pad(parts, (0, 0, 0, 0, 0, len(self.symbols) - len(parts)))

    def _run(self, work: Any, out: Tensor) -> Tensor:
        divided(partial(work, self.symbols.numpy(), out.numpy()), self.out_features, self.symbols.numel() / LOOKED_UP)
        return out

    def _one(self, x: Tensor) -> Tensor:
        parts, books = self._parts(x[None])[..., 0].contiguous(), self.codebooks.float()

        def work(symbols: Any, out: Any, first: int, last: int) -> None:
            add_one(parts.numpy(), books.numpy(), symbols, out, first, last)

        return self._run(work, self.bias.float().clone())[None]

    def _many(self, x: Tensor) -> Tensor:
        parts = F.pad(self._parts(x), (0, LANES - len(x)))
        tables = torch.bmm(self.codebooks.float().transpose(1, 2), parts)
        return self._run(partial(add_many, tables.numpy()), self.bias.float()[:, None].repeat(1, LANES)).T[: len(x)]
