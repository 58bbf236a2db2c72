"""Packed execution: the integers are exact for every shape, and `accelerate` keeps what is faster."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

import featherweight as fw
from conftest import Batches
from featherweight import commands
from featherweight.catalogue import entries
from featherweight.cli import app
from featherweight.core.binary import SignInput, SizedSignInput, TimesSize, channel_dim
from featherweight.core.forms import Affine, Codes, Product, Table, attach, bake, codes_of, declare_codes
from featherweight.core.grids import ActivationGrid
from featherweight.core.ledger import recording
from featherweight.core.task import Task
from featherweight.errors import BadData, BadOption, FeatherweightError, MissingNeed, UnknownName
from featherweight.runtime import executed
from featherweight.runtime.executors.bitplane_and import bitplane_and
from featherweight.runtime.executors.int_gemm import int_gemm
from featherweight.runtime.executors.lut_linear import lut_linear
from featherweight.runtime.executors.xnor_popcount import xnor_popcount

EXACT = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 10**6)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_integers(layer: nn.Module, symbols: Tensor, zero: float, low: int = 0) -> nn.Module:
    """A layer whose weights are `symbols - zero`, declared."""
    rule = Affine(torch.ones(()), torch.tensor(zero if zero % 1 else int(zero)))
    codes = Codes(symbols.to(torch.uint8), rule, tuple(symbols.shape))
    layer.weight.data = codes.decode().float()
    declare_codes(layer, "weight", Codes(codes.symbols, rule, codes.shape))
    return layer


def signed(layer: nn.Module, seed: int = 0, shifts: float = 0.0) -> nn.Module:
    """A layer of weights of one bit behind an input of one bit."""
    with_integers(layer, torch.randint(2, layer.weight.shape, generator=random(seed)), 0.5)
    layer.weight.data *= 2
    layer._fw_codes["weight"] = Codes(
        layer._fw_codes["weight"].symbols, Affine(torch.tensor(2.0), torch.tensor(0.5)), tuple(layer.weight.shape)
    )
    if layer.bias is not None:
        layer.bias.data.round_()  # so that sums of integers stay exact in float32
    width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    shift = shifts * torch.randn(width, generator=random(seed + 1))
    attach(layer, SignInput(shift, channel_dim(layer), 1.0), "input")
    return layer


linears = st.tuples(st.integers(1, 200), st.integers(1, 40), st.integers(0, 9))
convs = st.fixed_dictionaries(
    {
        "channels": st.sampled_from([(1, 1), (3, 5), (16, 4), (40, 17), (64, 16), (70, 3), (130, 9)]),
        "groups": st.sampled_from([1, 1, 1, 2, 3]),
        "kernel_size": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "padding": st.one_of(st.integers(0, 3), st.tuples(st.integers(0, 2), st.integers(0, 2))),
        "padding_mode": st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]),
        "image": st.tuples(st.integers(8, 15), st.integers(8, 15)),
        "batch": st.integers(0, 3),
    }
)


def conv_of(shape: dict, bias: bool = True) -> tuple[nn.Conv2d, Tensor]:
    """A convolution of these settings, and inputs for it."""
    rest = dict(shape)
    (c, o), g, image, batch = (rest.pop(key) for key in ("channels", "groups", "image", "batch"))
    return nn.Conv2d(g * c, g * o, groups=g, bias=bias, **rest), torch.randn(batch, g * c, *image, generator=random(1))


@EXACT
@given(linears, seeds)
def test_signs_linear_is_the_product_of_signs(shape, seed):
    k, o, batch = shape
    layer = signed(nn.Linear(k, o, bias=False), seed)
    x = torch.randn(batch, k, generator=random(seed))
    packed = xnor_popcount(layer)
    wanted = torch.where(x >= 0, 1, -1).long() @ layer.weight.long().T
    assert torch.equal(packed(x), wanted.float())


@EXACT
@given(convs, seeds)
def test_signs_conv_is_the_product_of_signs(shape, seed):
    layer, x = conv_of(shape)
    signed(layer, seed)
    with torch.no_grad():
        wanted = layer.double()._conv_forward(torch.where(x >= 0, 1.0, -1.0).double(), layer.weight, layer.bias)
        layer.float()
        assert torch.equal(xnor_popcount(layer)(x).double(), wanted)


@EXACT
@given(convs, st.integers(1, 4), st.integers(1, 4), st.integers(0, 15), st.booleans(), seeds)
def test_bit_planes_are_the_product_of_integers(shape, weight_bits, bits, zero, half, seed):
    layer, x = conv_of(shape)
    with_integers(
        layer,
        torch.randint(2**weight_bits, layer.weight.shape, generator=random(seed)),
        (2**weight_bits - 1) / 2 if half else 1,
    )
    layer.bias.data.round_()
    grid = ActivationGrid(0.25, min(zero, 2**bits - 1), 0, 2**bits - 1)
    attach(layer, grid, "input")
    packed = bitplane_and(layer)
    assert isinstance(packed, nn.Module)
    with torch.no_grad():
        wanted = (
            copy.deepcopy(layer).double()._conv_forward(grid(x).double(), layer.weight.double(), layer.bias.double())
        )
        assert torch.equal(packed(x).double(), wanted)


@EXACT
@given(linears, st.integers(1, 4), st.integers(1, 4), seeds)
def test_bit_planes_linear(shape, weight_bits, bits, seed):
    k, o, batch = shape
    layer = nn.Linear(k, o)
    with_integers(layer, torch.randint(2**weight_bits, (o, k), generator=random(seed)), (2**weight_bits - 1) / 2)
    layer.bias.data.round_()
    grid = ActivationGrid(0.5, 1, 0, 2**bits - 1)
    attach(layer, grid, "input")
    packed = bitplane_and(layer)
    if isinstance(packed, str):
        return
    x = torch.randn(batch, k, generator=random(seed))
    with torch.no_grad():
        wanted = torch.nn.functional.linear(grid(x).double(), layer.weight.double(), layer.bias.double())
        assert torch.equal(packed(x).double(), wanted)


@EXACT
@given(seeds, st.integers(1, 8), st.floats(0.01, 3), st.integers(0, 255))
def test_inputs_go_to_the_levels_that_their_grid_gives_them(seed, bits, scale, zero):
    """Halves too, which float32 rounds its own way."""
    top = 2**bits - 1
    grid = ActivationGrid(scale, min(zero, top), 0, top)
    layer = with_integers(nn.Linear(1, 1, bias=False), torch.tensor([[1]]), 0)
    attach(layer, grid, "input")
    x = torch.cat([torch.randn(50, 1, generator=random(seed)), (torch.arange(-9, 20) / 2 * scale)[:, None]])
    torch.testing.assert_close(bitplane_and(layer)(x), grid(x), rtol=1e-6, atol=0)


def test_signs_of_zeros_tiny_numbers_and_other_types():
    layer = signed(nn.Linear(4, 2, bias=False))
    x = torch.tensor([[0.0, -0.0, 1e-300, -1e-300]], dtype=torch.float64)
    packed = xnor_popcount(layer)
    with torch.no_grad():
        wanted = torch.nn.functional.linear(torch.where(x >= 0, 1.0, -1.0).double(), layer.weight.double())
    assert torch.equal(packed(x), wanted)
    assert packed(x).dtype == torch.float64
    assert packed(x.bfloat16()).dtype == torch.bfloat16


def test_ternary_weights_and_channels_of_zeros():
    layer = nn.Linear(70, 3, bias=False)
    values = torch.randint(-1, 2, (3, 70), generator=random(0)).float() * torch.tensor([[0.5], [2.0], [0.0]])
    layer.weight.data = values
    declare_codes(layer, "weight", Codes(torch.unique(values, return_inverse=True)[1], Table(values.unique()), (3, 70)))
    attach(layer, SignInput(torch.zeros(70), -1, 1.0), "input")
    x = torch.randn(5, 70, generator=random(1))
    assert "only signs multiply" in xnor_popcount(layer)
    with torch.no_grad():
        assert torch.equal(bitplane_and(layer)(x), layer(x))


@EXACT
@given(linears, st.integers(1, 8), st.booleans(), st.integers(1, 8), st.integers(0, 255), seeds)
def test_bytes_are_the_product_of_integers(shape, weight_bits, half, bits, zero, seed):
    k, o, batch = shape
    layer = nn.Linear(k, o)
    centre = (2**weight_bits - 1) / 2 if half and weight_bits < 8 else 2 ** (weight_bits - 1)
    with_integers(layer, torch.randint(2**weight_bits, (o, k), generator=random(seed)), centre)
    layer.bias.data.round_()
    grid = ActivationGrid(0.125, min(zero, 2**bits - 1), 0, 2**bits - 1)
    attach(layer, grid, "input")
    packed = int_gemm(layer)
    assert isinstance(packed, nn.Module)
    x = torch.randn(batch, k, generator=random(seed)) * 5
    with torch.no_grad():
        wanted = torch.nn.functional.linear(grid(x).double(), layer.weight.double(), layer.bias.double())
        assert torch.equal(packed(x).double(), wanted)


def test_bytes_keep_to_their_range():
    layer = with_integers(nn.Linear(3, 2), torch.tensor([[0, 255, 1], [2, 3, 4]]), 0)
    attach(layer, ActivationGrid(0.1, 0), "input")
    assert "does not fit signed bytes" in int_gemm(layer)
    layer = with_integers(nn.Linear(3, 2), torch.tensor([[0, 1, 2], [2, 3, 1]]), 1.5)
    attach(layer, SignInput(torch.zeros(3), -1, 1.0), "input")
    assert "between two integers" in int_gemm(layer)
    assert "no Linear" in int_gemm(nn.Conv2d(1, 1, 1))


def coded(stages: int, blocks: int, k: int, d: int, out: int, seed: int) -> nn.Linear:
    """A linear layer of codebooks, with or without stages."""
    shape = (stages,) if stages else ()
    books = torch.randn(*shape, blocks, k, d, generator=random(seed))
    symbols = torch.randint(k, (*shape, out, blocks), generator=random(seed + 1))
    layer = nn.Linear(blocks * d, out)
    codes = Codes(symbols, Product(books), (out, blocks * d))
    layer.weight.data = codes.decode()
    declare_codes(layer, "weight", codes)
    return layer


@EXACT
@given(
    st.integers(0, 3), st.integers(1, 20), st.sampled_from([1, 3, 256, 300]), st.integers(1, 5), st.integers(1, 40),
    st.integers(0, 35), seeds,
)  # fmt: skip
def test_tables_are_the_product_with_the_decoded_weight(stages, blocks, k, d, out, batch, seed):
    layer = coded(stages, blocks, k, d, out, seed)
    packed = lut_linear(layer)
    x = torch.randn(batch, blocks * d, generator=random(seed))
    with torch.no_grad():
        wanted = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    size = wanted.abs().max() if wanted.numel() else 1.0
    torch.testing.assert_close(packed(x).double(), wanted, rtol=1e-5, atol=float(1e-5 * size))


class Chain(nn.Module):
    """A layer for each executor, and two for none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3)
        self.signs = signed(nn.Conv2d(16, 24, 3, padding=1))
        self.planes = with_integers(nn.Linear(24, 12), torch.randint(4, (12, 24), generator=random(0)), 1.5)
        attach(self.planes, ActivationGrid(0.1, 0, 0, 15), "input")
        self.bytes = with_integers(nn.Linear(12, 20), torch.randint(256, (20, 12), generator=random(0)), 128)
        attach(self.bytes, ActivationGrid(0.1, 100), "input")
        self.tables = coded(0, 5, 16, 4, 7, 0)
        self.last = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.planes(self.signs(self.first(x)).mean((2, 3)))
        return self.last(self.tables(self.bytes(x)))


@pytest.fixture
def model() -> Chain:
    torch.manual_seed(0)
    return Chain().eval()


EXAMPLE = torch.randn(2, 1, 9, 9, generator=random(3))


def test_accelerate_gives_a_copy_that_computes_the_same(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with recording() as ledger:
        fast = fw.accelerate(model, EXAMPLE, keep_slower=True)
    assert {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)} == set()
    assert type(model.signs) is nn.Conv2d
    wanted = {"signs": "xnor_popcount", "planes": "bitplane_and", "bytes": "int_gemm", "tables": "lut_linear"}
    found = {row.path: row.executor for row in executed(fast) if row.used}
    assert found in (wanted, wanted | {"planes": "int_gemm"})  # which of the two is faster
    assert all(row.float_ms > 0 and row.packed_ms > 0 for row in executed(fast))
    assert {row["path"] for row in ledger.tables["executors"]} == set(wanted)
    assert "no codes" in ledger.skipped["first"]
    x = torch.randn(5, 1, 12, 7)
    torch.testing.assert_close(fast(x), model(x).detach())


def test_what_is_slower_stays_float_and_that_is_said(model):
    with recording() as ledger:
        fast = fw.accelerate(model, EXAMPLE)
    slow = [row for row in executed(fast) if row.ratio >= 1]
    assert not any(row.used for row in slow)
    for row in slow:  # a layer of 24 x 12 is over before it is packed
        assert type(fast.get_submodule(row.path)) in (nn.Linear, nn.Conv2d)
        assert "stays float" in ledger.skipped[row.path]
    assert "planes" in {row.path for row in slow}


def test_copies_pickles_states_and_layouts(model):
    fast = fw.accelerate(model, EXAMPLE, keep_slower=True)
    wanted = fast(EXAMPLE)
    assert torch.equal(copy.deepcopy(fast)(EXAMPLE), wanted)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(EXAMPLE), wanted)
    names = [row.executor for row in executed(fast) if row.used]
    other = fw.accelerate(Chain(), EXAMPLE, executors=names, keep_slower=True)
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(EXAMPLE), wanted)
    assert torch.equal(fast(EXAMPLE.to(memory_format=torch.channels_last)), wanted)
    strided = torch.zeros(2, 1, 9, 18)[..., ::2].copy_(EXAMPLE)
    assert not strided.is_contiguous()
    assert torch.equal(fast(strided), wanted)
    assert fast(EXAMPLE[:0]).shape == (0, 3)


def test_threads_change_no_result():
    layer = signed(nn.Conv2d(64, 48, 3, padding=1, groups=2))
    linear, tables = signed(nn.Linear(700, 300)), coded(2, 64, 256, 4, 300, 0)
    grids = with_integers(nn.Linear(700, 300), torch.randint(256, (300, 700), generator=random(0)), 128)
    attach(grids, ActivationGrid(0.1, 100), "input")
    x, rows = torch.randn(3, 64, 40, 40), torch.randn(65, 700)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            packed = xnor_popcount(linear), int_gemm(grids)
            looked_up = [lut_linear(tables)(rows[:, :256]), lut_linear(tables)(rows[:1, :256])]
            results.append([xnor_popcount(layer)(x), *(one(rows) for one in packed), *looked_up])
    finally:
        torch.set_num_threads(threads)
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


@pytest.mark.parametrize("name", sorted(entries("executor")))
def test_an_executor_says_why_it_does_not_take_a_float_layer(name):
    told = entries("executor")[name](nn.Linear(4, 4))
    assert isinstance(told, str)
    assert told


def test_refusals(model):
    packed = xnor_popcount(model.signs)
    with pytest.raises(BadData, match="was given a tensor of shape"):
        packed(torch.randn(1, 3, 9, 9))
    with pytest.raises(BadData, match="has no gradient"):
        packed(torch.randn(1, 16, 9, 9, requires_grad=True))
    with pytest.raises(BadData, match="takes floats on the CPU"):
        packed(torch.ones(1, 16, 9, 9, dtype=torch.int64))
    with pytest.raises(BadData, match="too small for a kernel"):
        xnor_popcount(signed(nn.Conv2d(16, 4, 5)))(torch.randn(1, 16, 4, 9))
    with pytest.raises(MissingNeed, match="pass example_inputs"):
        fw.accelerate(model)
    with pytest.raises(UnknownName, match="xnor_popcount"):
        fw.accelerate(model, EXAMPLE, executors=["xnor_popcnt"])
    with pytest.raises(UnknownName, match="an executor, no method"):
        fw.compress(model, None, "xnor_popcount")
    with pytest.raises(BadOption, match="not made by accelerate"):
        executed(model)
    with pytest.raises(FeatherweightError, match="BitConv2d was swapped in"):
        fw.save(fw.accelerate(model, EXAMPLE, keep_slower=True), os.devnull)


def test_a_layer_with_hooks_of_its_own_stays(model):
    model.signs.register_forward_hook(lambda module, args, output: output + 1)
    with recording() as ledger:
        fast = fw.accelerate(model, EXAMPLE, keep_slower=True)
    assert "hooks" in ledger.skipped["signs"]
    assert torch.equal(fast.signs(torch.ones(1, 16, 5, 5)), model.signs(torch.ones(1, 16, 5, 5)))


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 8, 3, padding=1, groups=2), nn.Linear(40, 9)], ids=["conv", "linear"])
def test_sizes_beside_the_signs_are_kept(layer):
    signed(layer)
    layer.bias.data.zero_()
    dim, width = channel_dim(layer), 6 if isinstance(layer, nn.Conv2d) else 40
    attach(layer, SizedSignInput(torch.randn(width), dim, 1.0, layer), "input")
    attach(layer, TimesSize(dim, torch.randn(8 if dim == -3 else 9)), "output")
    x = torch.randn(2, 6, 9, 9) if dim == -3 else torch.randn(5, 40)
    fast = fw.accelerate(nn.Sequential(layer), x, keep_slower=True)
    assert executed(fast)[0].used
    with torch.no_grad():
        assert torch.equal(fast(x), layer(x))


class Called(nn.Module):
    """Calls the same layer in two ways."""

    def __init__(self, ways: str) -> None:
        super().__init__()
        self.ways, self.fc = ways, coded(0, 4, 4, 4, 16, 0)

    def forward(self, x: Tensor) -> Tensor:
        for way in self.ways:
            x = self.fc(input=x) if way == "k" else self.fc(x)
        return x


@pytest.mark.parametrize("ways", ["k", "pk"])
def test_a_layer_called_by_keyword_stays_float(ways):
    model = Called(ways).eval()
    x = torch.randn(3, model.fc.in_features)
    with recording() as ledger:
        fast = fw.accelerate(model, x, keep_slower=True)
    assert ledger.skipped["fc"] == "it is called by keyword"
    assert torch.equal(fast(x), model(x).detach())


def test_double_precision_stays_float(model):
    double, x = model.double(), EXAMPLE.double()
    with recording() as ledger:
        fast = fw.accelerate(double, x, keep_slower=True)
    assert executed(fast) == []
    assert all("packed layers in float32" in ledger.skipped[name] for name in ("signs", "planes", "bytes", "tables"))
    assert torch.equal(fast(x), double(x).detach())


def test_soft_weights_are_baked_in_the_copy_alone():
    from featherweight.ingredients.grid.dorefa import DoReFaWeights

    layer = nn.Linear(128, 64)
    attach(layer, DoReFaWeights(1, torch.ones(())))
    attach(layer, SignInput(torch.randn(128), -1, 1.0), "input")
    x = torch.randn(3, 128)
    fast = fw.accelerate(nn.Sequential(layer), x, keep_slower=True)
    assert executed(fast)[0].executor == "xnor_popcount"
    with torch.no_grad():
        torch.testing.assert_close(fast(x), layer(x))
    assert codes_of(layer) is None
    assert codes_of(bake(layer)) is not None


class Binary(nn.Module):
    """Batch norms between layers of signs, with factors of both signs and of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = signed(nn.Conv2d(3, 20, 3, padding=1)), signed(nn.Conv2d(20, 20, 3, stride=2))
        self.three, self.four = signed(nn.Linear(180, 30)), signed(nn.Linear(30, 10))
        self.norms = nn.ModuleList([nn.BatchNorm2d(20), nn.BatchNorm2d(20), nn.BatchNorm1d(30), nn.BatchNorm1d(10)])
        for norm in self.norms:
            for values in (norm.running_mean, norm.weight.data, norm.bias.data):
                values.copy_(torch.randn(values.shape, generator=random(len(values))) * 2)
            norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=random(1)) * 40 + 1e-3)
            norm.weight.data[0], norm.weight.data[1], norm.bias.data[1] = 0.0, 0.0, -1.0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.max_pool2d(torch.nn.functional.hardtanh(self.norms[0](self.one(x))), 2)
        x = self.norms[2](self.three(self.norms[1](self.two(x)).flatten(1)))
        return self.norms[3](self.four(x.clamp(-1, 1)))


class Rectified(nn.Module):
    """Signs around shifts, of what comes out of rectifiers, as in a network that was trained with them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = signed(nn.Conv2d(3, 20, 3, padding=1)), signed(nn.Conv2d(20, 30, 3), 1, 0.7)
        self.three, self.last = signed(nn.Linear(30, 7), 2, 0.7), nn.Linear(7, 2)
        self.norms = nn.ModuleList([nn.BatchNorm2d(20), nn.BatchNorm2d(30), nn.BatchNorm1d(7)])
        for norm in self.norms:
            norm.running_var.fill_(9.0)
            norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=random(1)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.max_pool2d(torch.relu(self.norms[0](self.one(x))), 2)
        x = torch.relu(self.norms[1](self.two(x))).amax((2, 3))
        return self.last(self.norms[2](self.three(x)))


def test_shifts_behind_rectifiers_go_into_thresholds():
    model = Rectified().eval()
    x = torch.randn(30, 3, 14, 14, generator=random(0))
    fast = fw.accelerate(model, x, keep_slower=True)
    assert [type(norm) for norm in fast.norms] == [nn.Identity, nn.BatchNorm2d, nn.BatchNorm1d]  # amax is not known
    assert torch.equal(fast.two.shift, torch.ones(20))
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
    assert (model.two.fw_input.shift != 1).all()


def test_batch_norm_and_signs_become_thresholds():
    model = Binary().eval()
    x = torch.randn(40, 3, 14, 14, generator=random(0))
    with recording() as ledger:
        fast = fw.accelerate(model, x, keep_slower=True)
    assert [type(norm) for norm in fast.norms] == [nn.Identity, nn.Identity, nn.Identity, nn.BatchNorm1d]
    assert sum("integer thresholds" in note for note in ledger.notes) == 3
    assert set(fast.one(x).unique().tolist()) == {-1.0, 1.0}
    assert (fast.one.ends.direction == -1).any()
    with torch.no_grad():
        assert torch.equal(fast.one(x) >= 0, model.norms[0](model.one(x)) >= 0)
        assert torch.equal(fast(x), model(x))


def test_the_command_shows_layers_reasons_and_the_whole_network(model, monkeypatch):
    task = Task(valid=Batches(EXAMPLE, torch.zeros(2, dtype=torch.long)))
    monkeypatch.setattr(commands, "read_report", lambda directory: {})
    monkeypatch.setattr(commands, "rebuilt", lambda directory, report: (Chain().eval(), model, task))
    asked = ["accelerate", "runs/x", "--seconds", "0.01", "--keep-slower"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    assert "xnor_popcount" in shown.stdout
    assert "its weight has no codes: quantize it first" in shown.stdout
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert [row["name"] for row in found["network"]] == ["original", "result", "accelerated"]
    assert "signs" in {row["path"] for row in found["layers"]}


PYTHON = """
import torch
from torch import nn
from test_runtime import signed, with_integers
from featherweight.core.forms import attach
from featherweight.core.grids import ActivationGrid
from featherweight.runtime.executors.bitplane_and import bitplane_and
from featherweight.runtime.executors.xnor_popcount import xnor_popcount
from test_runtime import coded
from featherweight.runtime.executors.int_gemm import int_gemm
from featherweight.runtime.executors.lut_linear import lut_linear
x = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
conv = signed(nn.Conv2d(5, 6, 3, padding=1))
linear = with_integers(nn.Linear(80, 5), torch.arange(400).view(5, 80) % 4, 1.5)
linear.bias.data.round_()
attach(linear, ActivationGrid(0.5, 0, 0, 3), "input")
with torch.no_grad():
    assert torch.equal(xnor_popcount(conv)(x), conv(x))
    rows = x.view(2, 80)
    assert torch.equal(bitplane_and(linear)(rows), linear(rows))
    linear = with_integers(linear, linear._fw_codes["weight"].symbols, 2)
    torch.testing.assert_close(int_gemm(linear)(rows), linear(rows))
    tables = coded(1, 4, 8, 2, 5, 0)
    torch.testing.assert_close(lut_linear(tables)(rows[:, :8]), tables(rows[:, :8]))
    torch.testing.assert_close(lut_linear(tables)(rows.view(20, 8)), tables(rows.view(20, 8)))
"""


def test_the_same_without_compiling():
    here = str(Path(__file__).parent)
    env = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    done = subprocess.run([sys.executable, "-c", PYTHON], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
