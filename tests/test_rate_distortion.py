"""Formats against theory: tables of Lloyd and Max; uniform steps and entropy coding, a quarter bit above R(D)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import featherweight as fw
from featherweight.core.forms import Codes, Table, attach, bake, codes_of, declare_codes
from featherweight.core.grids import SymmetricGrid
from featherweight.ingredients.cluster.exact import exact
from featherweight.ingredients.cluster.lloyd import lloyd

# Max, "Quantizing for Minimum Distortion", 1960, table I; Paez and Glisson, "Minimum Mean-Squared-Error Quantization in
# Speech PCM and DPCM Systems", 1972, table II: levels above zero for variance one, and the mean squared error.
NORMAL = {
    2: ([0.7980], 0.3634),
    4: ([0.4528, 1.510], 0.1175),
    8: ([0.2451, 0.7560, 1.344, 2.152], 0.03454),
    16: ([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
}
LAPLACIAN = {2: ([0.707], 0.5), 4: ([0.420, 1.834], 0.1762), 8: ([0.233, 0.833, 1.673, 3.087], 0.0545)}
SLICES = 4000
QUARTER = math.log2(2 * math.pi * math.e / 12) / 2  # 0.2546 bits
CASES = [(stats.norm(), k, *row) for k, row in NORMAL.items()]
CASES += [(stats.laplace(scale=1 / math.sqrt(2)), k, *row) for k, row in LAPLACIAN.items()]


# Lloyd's iterations stop where no slice changes its centroid, a little before the best levels; the error is the same
@pytest.mark.parametrize(("cluster", "tolerance"), [(exact, 3e-3), (lloyd, 4e-2)], ids=["exact", "lloyd"])
@pytest.mark.parametrize(("source", "k", "levels", "error"), CASES, ids=[f"{c[0].dist.name}-{c[1]}" for c in CASES])
def test_the_tables_of_lloyd_and_max(cluster, tolerance, source, k, levels, error):
    """Centroids of the distribution itself, in equally likely slices: each stands for its mean."""
    values = torch.tensor(source.ppf((np.arange(SLICES * 50) + 0.5) / (SLICES * 50)).reshape(SLICES, 50).mean(1))
    start = torch.tensor(source.ppf((np.arange(k) + 0.5) / k))
    found = cluster(values, start)
    assert torch.allclose(found[k // 2 :], torch.tensor(levels, dtype=torch.float64), rtol=tolerance, atol=1e-3)
    torch.testing.assert_close(found, -found.flip(0), rtol=tolerance, atol=1e-3)
    nearest = (values[:, None] - found).square().amin(1)
    assert float(nearest.mean()) == pytest.approx(error, rel=1e-2)


def coded(layer: nn.Module, folder: Path) -> float:
    """Bits of a weight in a file, tables and scales included."""
    return 8 * fw.save(layer, folder / "x.fw", bare=True).weights_bytes / layer.weight.numel()


def steps(bits: int, clip: float) -> tuple[nn.Module, Tensor]:
    """A layer of normal weights on a uniform grid, and the weights before."""
    layer = nn.Linear(512, 512, bias=False)
    layer.weight.data = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    before = layer.weight.detach().clone()
    attach(layer, SymmetricGrid(bits, None, torch.tensor(clip)))
    return bake(layer), before


def above(layer: nn.Module, before: Tensor, folder: Path) -> tuple[float, float]:
    """The rate, and how far it lies above the bound `1/2 log2(variance / error)`."""
    error = float((layer.weight.detach() - before).double().square().mean())
    rate = coded(layer, folder)
    return rate, rate - math.log2(float(before.double().var()) / error) / 2


@pytest.mark.parametrize(("bits", "clip"), [(5, 1.0), (6, 1.0), (8, 1.0)])
def test_uniform_steps_and_entropy_coding_are_a_quarter_bit_above_the_bound(bits, clip, tmp_path):
    rate, gap = above(*steps(bits, clip), tmp_path)
    assert rate > 3.5
    assert gap == pytest.approx(QUARTER, abs=0.01)


@pytest.mark.parametrize("clip", [1.6, 1.3, 0.8])
def test_with_the_means_of_their_cells_uniform_steps_are_so_from_three_bits_on(clip, tmp_path):
    """The middle of a cell costs another 0.016 bits at three bits."""
    layer, before = steps(5, clip)
    symbols = codes_of(layer).symbols.long()
    symbols -= symbols.min()
    cells = torch.zeros(2, int(symbols.max()) + 1, dtype=torch.float64)
    cells[0].index_add_(0, symbols.flatten(), before.double().flatten())
    cells[1].index_add_(0, symbols.flatten(), torch.ones(before.numel(), dtype=torch.float64))
    means = Codes(symbols, Table((cells[0] / cells[1].clamp_min(1)).float()), tuple(before.shape))
    _, gap_of_middles = above(layer, before, tmp_path)
    layer.weight.data = means.decode()
    declare_codes(layer, "weight", means)
    rate, gap = above(layer, before, tmp_path)
    assert rate > 2.95
    assert gap == pytest.approx(QUARTER, abs=0.01)
    assert gap < gap_of_middles
