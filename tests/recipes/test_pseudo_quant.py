"""Half a step of error, zero where the form promises it, and a file of `n b / 8` bytes and little more."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import featherweight as fw
from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Mask, attach, bake, codes_of, forms_of
from featherweight.core.ledger import recording
from featherweight.core.levels import FixedGrid
from featherweight.core.site import Site
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadData, BadOption
from featherweight.recipes.pseudo_quant import offset_grid

OFFSETS, GRAINS = ["symmetric", "integer", "float"], ["channel", "tensor", "group"]


def form(weight: torch.Tensor, bits: int, offset: str, grain: str) -> FixedGrid:
    axis, block = (0 if grain == "channel" else None), (6 if grain == "group" else None)
    return offset_grid(Site.of(weight), bits, offset, axis, block)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("grain", GRAINS)
@settings(deadline=None)
@given(seed=st.integers(0, 30), bits=st.integers(2, 16), shift=st.sampled_from([0.0, 3.0, -3.0]))
def test_errors_are_half_a_step_and_zero_is_exact_where_it_should_be(offset, grain, seed, bits, shift) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(4, 12) + shift
    grid = form(weight, bits, offset, grain)
    step = grid.rule.spread(grid.scale, (4, 12)).expand(4, 12)
    assert ((grid(weight) - weight).abs() <= step * 0.50001 + 2e-6).all()
    if offset != "float":
        assert not grid(torch.zeros(4, 12)).any()
    else:
        assert grid(weight).max() <= weight.max() + 1e-5


def test_a_float_offset_has_no_zero_in_general_and_the_smallest_step() -> None:
    weight = torch.linspace(-1.0, 1.1, 40).view(4, 10)
    found = {offset: form(weight, 4, offset, "tensor") for offset in OFFSETS}
    assert abs(float(found["float"](torch.zeros(4, 10))[0, 0])) > 1e-3
    away = {offset: form(weight + 5, 4, offset, "tensor") for offset in OFFSETS}
    assert float(away["float"].scale) < float(away["integer"].scale) / 2 < float(away["symmetric"].scale)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("value", [0.0, 0.3, -2.5])
def test_constant_weights_stay_what_they_are(offset: str, value: float) -> None:
    weight = torch.full((3, 4), value)
    torch.testing.assert_close(form(weight, 8, offset, "channel")(weight), weight, rtol=4e-3, atol=0)
    torch.testing.assert_close(form(weight, 8, "float", "channel")(weight), weight, rtol=0, atol=0)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_file_holds_the_bits_bit_for_bit(offset: str, grain: str, masked: bool, tmp_path: Path) -> None:
    model, task = nn.Sequential(nn.Linear(128, 64, bias=False)), Task(valid=[])
    keep = torch.ones(64, 128, dtype=torch.bool)
    if masked:
        keep = torch.rand(64, 128) > 0.5
        model[0].weight.data[~keep] = 100.0
        attach(model[0], Mask(keep))
    entry("pseudo_quant")(model, task, weight_bits=6, offset=offset, granularity=grain)
    assert float(forms_of(model[0])[0].scale.max()) < 0.1, "the range is that of the surviving weights"
    wanted = model[0].weight.detach().clone()
    assert not wanted[~keep].any()
    assert (wanted[keep] != 0).double().mean() > 0.9, "only the smallest of those that are kept round to zero"
    bake(model)
    codes = codes_of(model[0])
    assert codes is not None
    assert torch.equal(codes.decode(), wanted)
    fw.save(model, tmp_path / "m.fw", bare=True)
    assert torch.equal(fw.load(tmp_path / "m.fw", into=nn.Sequential(nn.Linear(128, 64, bias=False)))[0].weight, wanted)
    scales = {"channel": 64, "tensor": 1, "group": 128}[grain] * (4 if offset == "symmetric" else 8)
    if not (masked and offset == "float"):  # masked zeros are values of their own there
        assert (tmp_path / "m.fw").stat().st_size <= 64 * 128 * 6 / 8 + scales + 150


def test_one_outlier_ruins_a_layer_but_only_its_own_channel() -> None:
    weight = torch.randn(8, 50)
    weight[0, 0] = 100.0
    error = {grain: (form(weight, 8, "symmetric", grain)(weight) - weight)[1:].square().mean() for grain in GRAINS[:2]}
    assert error["tensor"] > 100 * error["channel"]


def test_eight_bits_lose_nothing_embeddings_count_and_the_report_says_what_it_is_worth() -> None:
    task = small_task()
    model = fit(small_cnn(), task, epochs=8, lr=0.01).eval()
    for offset in OFFSETS:
        with recording() as ledger:
            small = entry("pseudo_quant")(copy.deepcopy(model), task, offset=offset)
        assert any("size down, speed unchanged" in told for told in ledger.notes)
        assert evaluate(small, task).value == evaluate(model, task).value
    words = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2))
    entry("pseudo_quant")(words, task, weight_bits=2)
    assert len(words[0].weight.unique()) <= 7 * 3


def test_refusals() -> None:
    model = small_mlp()
    with pytest.raises(BadOption, match="weight_bits=17"):
        entry("pseudo_quant")(model, Task(valid=[]), weight_bits=17)
    with recording() as ledger:
        entry("pseudo_quant")(model, Task(valid=[]), granularity="group", group_size=48)
    assert any("1: groups of 32 weights" in told for told in ledger.notes)
    broken = small_mlp()
    broken[1].weight.data[0, 0] = torch.nan
    with pytest.raises(BadData, match="not finite"):
        entry("pseudo_quant")(broken, Task(valid=[]))


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("centre", [5.0, -300.0])
def test_weights_far_from_zero_lose_no_step(grain: str, centre: float, tmp_path: Path) -> None:
    weight = centre + 0.001 * torch.rand(4, 12)
    step = float(weight.max() - weight.min()) / (2**16 - 1)
    layer = nn.Linear(12, 4, bias=False)
    layer.weight.data.copy_(weight)
    attach(layer, form(weight, 16, "float", grain))
    spacing = abs(centre) * 2.0**-23  # of the weights themselves
    assert float((layer.weight.detach() - weight).abs().max()) <= max(step, spacing) / 2
    wanted = layer.weight.detach().clone()
    fw.save(nn.Sequential(bake(layer)), tmp_path / "m.fw", bare=True)
    again = fw.load(tmp_path / "m.fw", into=nn.Sequential(nn.Linear(12, 4, bias=False)))
    assert torch.equal(again[0].weight, wanted)
