"""Kim et al. 2016: errors of the truncated decomposition, planted ranks, geometry kept, what is refused and why."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.forms import Mask, attach
from featherweight.core.ledger import recording
from featherweight.core.lowrank import decompose
from featherweight.core.task import evaluate
from featherweight.errors import BadOption, CompressionError, MissingNeed, UnknownName
from featherweight.factorize import cost, factorize
from featherweight.ingredients.factor.tucker2 import tucker2, unfoldings
from featherweight.ingredients.rank.vbmf import vbmf, vbmf_grid


def tails(kernel, r1, r2):
    views = kernel.flatten(1), kernel.transpose(0, 1).flatten(1)
    return [float(torch.linalg.svdvals(v)[r:].square().sum()) for v, r in zip(views, (r1, r2), strict=True)]


@settings(max_examples=20, deadline=None)
@given(r1=st.integers(1, 8), r2=st.integers(1, 6), sweeps=st.integers(0, 4))
def test_error_is_the_lost_energy_and_lies_between_the_tails(r1, r2, sweeps):
    kernel = torch.randn(8, 6, 3, 3, dtype=torch.float64)
    core, out, into = decompose(kernel, r1, r2, sweeps)
    error = float((kernel - torch.einsum("rshw,nr,cs->nchw", core, out, into)).square().sum())
    assert error == pytest.approx(float(kernel.square().sum() - core.square().sum()), abs=1e-9)
    assert max(tails(kernel, r1, r2)) - 1e-9 <= error <= sum(tails(kernel, r1, r2)) + 1e-9


def test_refinement_never_raises_the_error():
    kernel = torch.randn(12, 10, 3, 3, dtype=torch.float64)
    energies = [float(decompose(kernel, 4, 3, sweeps)[0].norm()) for sweeps in range(6)]
    assert all(b >= a - 1e-12 for a, b in pairwise(energies))
    assert energies[-1] > energies[0]


@pytest.mark.parametrize("rule", [vbmf, vbmf_grid])
@pytest.mark.parametrize("planted", [0, 3, 5, 10])
def test_vbmf_returns_the_planted_rank(rule, planted):
    matrix = torch.randn(64, planted) @ torch.randn(planted, 300) + 0.5 * torch.randn(64, 300)
    assert rule(matrix) == rule(matrix.T) == planted
    matrix[10:30] = 0
    matrix[:, ::4] = 0
    assert rule(matrix) == planted


def test_vbmf_of_matrices_without_noise():
    matrix = torch.randn(64, 5, dtype=torch.float64) @ torch.randn(5, 300, dtype=torch.float64)
    assert vbmf(matrix) == vbmf_grid(matrix) == 5
    assert vbmf(torch.zeros(4, 7)) == 0


def test_vbmf_on_a_power_law_is_as_published_and_the_grid_finds_the_deeper_minimum():
    left, right = (torch.linalg.qr(torch.randn(n, 64, dtype=torch.float64))[0] for n in (64, 576))
    matrix = left @ torch.diag(1 / torch.arange(1, 65, dtype=torch.float64)) @ right.T
    assert (vbmf(matrix), vbmf_grid(matrix)) == (11, 27)


CONVS = {
    "plain": nn.Conv2d(6, 8, 3, padding=1),
    "strided": nn.Conv2d(6, 8, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(6, 8, 3, dilation=2, padding="same", bias=False),
    "reflected": nn.Conv2d(6, 8, (3, 5), padding=(1, 2), padding_mode="reflect"),
    "uneven": nn.Conv2d(6, 8, (1, 3), stride=(2, 1)),
    "pointwise": nn.Conv2d(6, 8, 1, stride=2, padding=1),
    "few channels": nn.Conv2d(3, 8, 5, stride=2),
}


@pytest.mark.parametrize("name", CONVS)
def test_full_rank_is_exact_whatever_the_geometry(name):
    layer = CONVS[name]
    x = torch.randn(2, layer.in_channels, 9, 11)
    ranks = tuple(min(view.shape) for view in unfoldings(layer))
    torch.testing.assert_close(tucker2(layer, ranks)(x), layer(x), rtol=1e-4, atol=1e-5)


def test_svd_of_a_linear_layer_loses_the_tail():
    layer = nn.Linear(20, 12)
    first, second = tucker2(layer, (5,))
    with torch.no_grad():
        lost = float((layer.weight - second.weight @ first.weight).square().sum())
    assert lost == pytest.approx(float(torch.linalg.svdvals(layer.weight.detach())[5:].square().sum()), rel=1e-4)
    assert first.bias is None
    assert torch.equal(second.bias, layer.bias)


def test_cost_counts_strides():
    example = torch.zeros(2, 4, 8, 8)
    assert cost(nn.Conv2d(4, 6, 3, stride=2, padding=1), example) == (6 * 4 * 9 + 6, 16 * 6 * 4 * 9)


def test_replaces_recovers_and_says_what_it_left():
    task = small_task()
    model = nn.Sequential(
        *small_cnn()[:6], nn.Conv2d(16, 16, 3, groups=16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )
    task.fit(model, task, epochs=3)
    before = evaluate(model, task).value
    with recording() as ledger:
        small = entry("tucker2_vbmf")(model, task, rank=(6, 4), epochs=3)
    assert [tuple(part.kernel_size) for part in small[3]] == [(1, 1), (3, 3), (1, 1)]
    assert small[3][1].stride == (2, 2)
    assert "depthwise" in ledger.skipped["6"]
    assert "would need" in ledger.skipped["9"]
    assert evaluate(small, task).value >= before - 0.1


def test_ranks_can_be_said_in_many_ways():
    task, x = small_task(), torch.randn(2, 1, 8, 8)
    model = small_mlp()
    shapes = {}
    for rank in ("vbmf", "vbmf_grid", "energy", 4, (4, 4), 0.25, lambda m: 7):
        changed = factorize(copy.deepcopy(model), task, rank=rank, floor=1, where="1", epochs=0)
        shapes[str(rank)] = changed[1][0].out_features
        assert changed(x).shape == (2, 4)
    assert shapes["4"] == shapes["(4, 4)"] == 4
    assert shapes["0.25"] == 8
    full = factorize(copy.deepcopy(model), task, rank=2, weaken=0.0, where="1", epochs=0)
    assert full[1][0].out_features == 2
    weak = factorize(copy.deepcopy(model), task, rank=0.25, floor=1, weaken=0.5, where="1", epochs=0)
    assert weak[1][0].out_features == 20


def test_tied_and_masked_layers():
    task, model = small_task((16,)), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    attach(model[2], Mask(torch.rand(16, 16) > 0.5))
    with recording() as ledger:
        factorize(model, task, rank=4, epochs=0)
    assert ledger.skipped == dict.fromkeys(("0", "1"), "its weight is shared with another layer")
    assert any("zeros no more" in text for text in ledger.notes)
    assert not any(p.isnan().any() for p in model.parameters())


def test_tied_layers_that_are_masked_stay():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    attach(model[0], Mask(torch.rand(16, 16) > 0.5), root=model)
    with recording() as ledger:
        factorize(model, small_task((16,)), rank=4, epochs=0)
    assert ledger.skipped == dict.fromkeys(("0", "1"), "its weight is shared with another layer")
    assert isinstance(model[2], nn.Sequential)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


def test_layers_that_compute_something_else_stay():
    model = nn.Sequential(Doubled(16, 16), nn.Linear(16, 16))
    with recording() as ledger:
        factorize(model, small_task((16,)), rank=4, epochs=0)
    assert "computes something else than Linear" in ledger.skipped["0"]
    assert type(model[0]) is Doubled


def test_bad_options():
    task = small_task()
    for rank in (0, 1.5, (1, 2, 3), (4, 0)):
        with pytest.raises(BadOption, match="rank"):
            factorize(small_mlp(), task, rank=rank)
    with pytest.raises(UnknownName, match="vbmf"):
        factorize(small_mlp(), task, rank="vmbf")
    with pytest.raises(CompressionError, match="lower rank"):
        factorize(small_mlp(), task, rank=1.0)
    with pytest.raises(MissingNeed, match="train"):
        factorize(small_mlp(), type(task)(valid=task.valid))
