"""Signs times one number for a layer: the least squares number, one bit a weight."""

import math

import pytest
import torch

from conftest import small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.coding.packing import pack_tensor
from featherweight.core.forms import Mask, attach, bake, codes_of
from featherweight.errors import CompressionError


def test_every_weight_is_its_sign_times_the_layers_mean_size():
    model = small_mlp()
    before = model[1].weight.detach().clone()
    entry("gong_binary")(model, small_task())
    torch.testing.assert_close(model[1].weight, before.sign() * before.abs().mean())


def test_no_other_scale_is_nearer():
    model = small_mlp()
    before = model[1].weight.detach().clone()
    entry("gong_binary")(model, small_task())
    found = model[1].weight.detach()
    error = (before - found).square().sum()
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert (before - factor * found).square().sum() > error


def test_a_gaussian_layer_loses_the_known_share_of_its_energy():
    """`1 - 2 / pi` of the energy, which is what one bit leaves of a Gaussian."""
    model = small_mlp()
    with torch.no_grad():
        model[1].weight.normal_()
    before = model[1].weight.detach().clone()
    entry("gong_binary")(model, small_task())
    lost = float((before - model[1].weight.detach()).square().sum() / before.square().sum())
    assert lost == pytest.approx(1 - 2 / math.pi, abs=0.03)


def test_a_weight_costs_one_bit():
    model = small_mlp()
    entry("gong_binary")(model, small_task())
    layer = bake(model)[1]
    packed = pack_tensor(layer.weight, codes_of(layer), coder="sparse_index")
    assert len(packed) <= layer.weight.numel() / 8 + 32


def test_scales_are_those_of_the_survivors_and_masked_weights_stay_zero():
    model = small_mlp()
    keep = torch.rand(32, 64) > 0.5
    attach(model[1], Mask(keep))
    before = model[1].weight.detach().clone()
    entry("gong_binary")(model, small_task())
    after = bake(model)[1].weight
    assert bool((after[~keep] == 0).all())
    torch.testing.assert_close(after.abs().max(), before[keep].abs().mean())


def test_a_network_of_zeros_is_refused():
    model = small_mlp()
    with torch.no_grad():
        model[1].weight.zero_()
        model[3].weight.zero_()
    with pytest.raises(CompressionError, match="nothing to share"):
        entry("gong_binary")(model, small_task())
