"""Scalar k-means, exactly: brute force agrees, Lloyd never does better, and a weight costs log2 k bits."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.coding.packing import pack_tensor
from featherweight.coding.unpacking import unpack_tensor
from featherweight.core.forms import bake, codes_of
from featherweight.errors import CompressionError
from featherweight.ingredients.cluster import exact as module
from featherweight.ingredients.cluster.exact import exact
from featherweight.ingredients.cluster.lloyd import lloyd
from featherweight.ingredients.start.starts import density, forgy, linear_span
from featherweight.share import nearest


def error(values: torch.Tensor, centroids: torch.Tensor) -> float:
    return float((values.double() - centroids[nearest(values, centroids)]).square().sum())


def brute(values: torch.Tensor, k: int) -> float:
    ordered = values.double().sort().values
    cuts = itertools.combinations(range(1, len(ordered)), k - 1)
    parts = ([ordered[a:b] for a, b in itertools.pairwise((0, *cut, len(ordered)))] for cut in cuts)
    return min(sum(float((p - p.mean()).square().sum()) for p in part) for part in parts)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 5), st.sampled_from([0.0, 100.0]))
def test_it_is_the_optimum_of_all_partitions(seed, k, far):
    values = far + torch.randn(11, generator=torch.Generator().manual_seed(seed))
    assert error(values, exact(values, torch.zeros(k))) == pytest.approx(brute(values, k), rel=1e-6, abs=1e-9)


def test_lloyd_never_does_better_and_from_a_random_start_does_worse():
    values = torch.randn(4000) ** 3
    best = error(values, exact(values, torch.zeros(16)))
    reached = [error(values, lloyd(values, start(values, 16))) for start in (linear_span, density, forgy)]
    assert all(best <= one * (1 + 1e-9) for one in reached)
    assert max(reached) > 1.02 * best


def test_many_values_are_solved_in_runs_and_come_within_a_thousandth(monkeypatch):
    values = torch.randn(20000)
    best = error(values, exact(values, torch.zeros(8)))
    monkeypatch.setattr(module, "ENTRIES", 8 * 1000)
    assert best <= error(values, exact(values, torch.zeros(8))) <= 1.001 * best


def test_a_weight_costs_its_index_and_the_layer_a_table():
    model = small_mlp()
    entry("gong_kmeans")(model, small_task(), weight_bits=3)
    layer = bake(model)[1]
    codes = codes_of(layer)
    assert layer.weight.unique().numel() == 8
    packed = pack_tensor(layer.weight, codes, coder="sparse_index")
    assert len(packed) <= math.ceil(layer.weight.numel() * 3 / 8) + 8 * 4 + 24
    assert torch.equal(unpack_tensor(packed), layer.weight)


def test_zeros_stay_and_a_network_of_zeros_is_refused():
    model = small_mlp()
    with torch.no_grad():
        model[1].weight[:, ::2] = 0
        model[3].weight.zero_()
    entry("gong_kmeans")(model, small_task(), weight_bits=2)
    assert int((model[1].weight != 0).sum()) == model[1].weight.numel() // 2
    with torch.no_grad():
        dead = small_mlp()
        dead[1].weight.zero_()
        dead[3].weight.zero_()
    with pytest.raises(CompressionError, match="there is nothing to share"):
        entry("gong_kmeans")(dead, small_task())


def test_a_constant_layer_is_kept_as_it_is():
    model = small_mlp()
    with torch.no_grad():
        model[1].weight.fill_(0.25)
    entry("gong_kmeans")(model, small_task())
    assert model[1].weight.unique().tolist() == [0.25]
