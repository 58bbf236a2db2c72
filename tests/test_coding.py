"""The .fw container: every bit comes back, every byte is counted, and the user's own class is restored."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
from math import inf, log2, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import independent_reader
from featherweight.coding import inspect, load, pack_tensor, save, unpack, unpack_codes, unpack_tensor
from featherweight.coding.bits import Reader, entropy_bits, pack, pack_fixed, pack_list, unpack_fixed, unpack_list
from featherweight.coding.coders.huffman import code_lengths, huffman, huffman_decode
from featherweight.coding.coders.interleaved_rans import interleaved_decode, interleaved_rans
from featherweight.coding.coders.range_coder import range_coder, range_decode
from featherweight.coding.coders.rans import rans, rans_decode
from featherweight.coding.coders.sparse_index import from_gaps, sparse_index
from featherweight.coding.manifest import WORDS
from featherweight.coding.records import DTYPES, same_bits
from featherweight.coding.restoring import slots
from featherweight.coding.streams import allowed, pack_symbols, unpack_symbols
from featherweight.core.blueprint import activation_forms, structure
from featherweight.core.forms import (
    Affine,
    Codebook,
    Codes,
    Form,
    Mask,
    Product,
    Table,
    activation_form,
    attach,
    bake,
    codes_of,
    declare_codes,
    from_values,
)
from featherweight.core.surgery import swap
from featherweight.errors import BadData, BadOption, FeatherweightError, FormatError, UnknownName
from golden_models import GOLDEN_FILES, fresh

GOLDEN = Path(__file__).parent / "golden"
REGENERATE = "FEATHERWEIGHT_REGENERATE"
CODERS = (None, "huffman", "range_coder", "rans", "sparse_index", "fixed", "fast")
ENTROPY = {
    "huffman": (huffman, huffman_decode),
    "range": (range_coder, range_decode),
    "ans": (rans, rans_decode),
    "interleaved": (interleaved_rans, interleaved_decode),
}
PLENTY = 1 << 30


def reader(data: bytes) -> Reader:
    return Reader(data, PLENTY)


@st.composite
def streams(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Symbols of any skew: long runs, few or many different ones, none at all."""
    size = draw(st.sampled_from([1, 2, 3, 5, 16, 17, 255, 256, 1000, 70000]))
    count = draw(st.sampled_from([0, 1, 2, 7, 64, 500, 3000]))
    skew = draw(st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    background = int(rng.integers(size))
    symbols = np.where(rng.random(count) < skew, background, rng.integers(size, size=count))
    return symbols.astype(np.int64), size


# --- bits and streams -------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 24), st.integers(0, 2**24 - 1)), max_size=60))
def test_codes_of_given_widths_are_written_one_after_the_other(codes: list[tuple[int, int]]) -> None:
    widths = np.array([w for w, _ in codes], dtype=np.int64)
    values = np.array([v % (1 << w) for w, v in codes], dtype=np.int64)
    text = "".join(f"{v:0{w}b}" for v, w in zip(values.tolist(), widths.tolist(), strict=True))
    expected = int(text.ljust(-(-len(text) // 8) * 8, "0") or "0", 2).to_bytes(-(-len(text) // 8), "big")
    assert pack(values, widths) == expected


@given(st.integers(0, 33), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_fixed_width_symbols_come_back(width: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << width, size=count)
    data = pack_fixed(values, width)
    assert len(data) == -(-count * width // 8)
    assert unpack_fixed(data, count, width).tolist() == values.tolist()


@given(st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**38)), max_size=50))
def test_lists_of_integers_come_back_and_end_where_they_end(values: list[int]) -> None:
    source = reader(pack_list(values) + b"\xff")
    assert unpack_list(source, len(values)).tolist() == values
    assert source.left == 1


@given(streams())
@settings(max_examples=60, deadline=None)
def test_every_coder_gives_every_symbol_back(stream: tuple[np.ndarray, int]) -> None:
    symbols, size = stream
    for coder in CODERS:
        source = reader(pack_symbols(symbols, size, allowed(coder)) + b"rest")
        found, _ = unpack_symbols(source, len(symbols), size)
        assert np.array_equal(found, symbols)
        assert source.left == 4


@pytest.mark.parametrize("name", ENTROPY)
@given(streams())
@settings(max_examples=25, deadline=None)
def test_entropy_coders_alone_give_every_symbol_back(name: str, stream: tuple[np.ndarray, int]) -> None:
    symbols, size = stream
    if not len(symbols) or not 1 < size < 1 << 16:
        return
    encode, decode = ENTROPY[name]
    source = reader(encode(symbols, size))
    assert np.array_equal(decode(source, len(symbols), size), symbols)
    assert source.left == 0


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=80).filter(lambda c: sum(x > 0 for x in c) > 1))
def test_huffman_lengths_are_a_prefix_code_within_a_bit_of_the_entropy(counts: list[int]) -> None:
    lengths = code_lengths(np.array(counts))
    used = lengths[lengths > 0]
    assert (lengths > 0).tolist() == [c > 0 for c in counts]
    assert sum(2.0 ** -int(length) for length in used) == 1.0
    mean = float((lengths * counts).sum()) / sum(counts)
    entropy = entropy_bits(counts) / sum(counts)
    assert entropy - 1e-9 <= mean < entropy + 1


def test_code_words_stay_within_24_bits_for_counts_like_fibonacci_numbers() -> None:
    counts = [1, 1]
    while len(counts) < 60:
        counts.append(counts[-1] + counts[-2])
    lengths = code_lengths(np.array(counts))
    assert lengths.max() <= 24
    assert sum(2.0 ** -int(length) for length in lengths) == 1.0


def test_long_streams_cross_the_windows_of_the_decoder() -> None:
    rng = np.random.default_rng(0)
    symbols = np.minimum(rng.geometric(0.5, size=900_000), 40).astype(np.int64)
    assert np.array_equal(huffman_decode(reader(huffman(symbols, 41)), len(symbols), 41), symbols)


@pytest.mark.parametrize("name", ["range", "ans"])
def test_range_and_ans_are_within_bytes_of_the_entropy(name: str) -> None:
    rng = np.random.default_rng(0)
    symbols = (rng.random(100_000) < 0.01).astype(np.int64)
    bound = entropy_bits(np.bincount(symbols)) / 8
    assert bound <= len(ENTROPY[name][0](symbols, 2)) <= bound + 24


@given(st.lists(st.sampled_from([0, 0, 0, 0, 1, 2]), max_size=200), st.integers(1, 6))
def test_relative_index_with_fillers_comes_back(symbols: list[int], bits: int) -> None:
    given_ = np.array(symbols, dtype=np.int64)
    gaps, entries = sparse_index(given_, 0, bits)
    assert np.array_equal(from_gaps(gaps, entries, 0, len(given_)), given_)
    assert not len(gaps) or gaps.max() < 1 << bits


def test_positions_of_a_sparse_tensor_are_costed_honestly() -> None:
    """Huffman alone cannot go below a bit a weight; with relative gaps it comes near the bound of both."""
    rng = np.random.default_rng(0)
    symbols = np.where(rng.random(50_000) < 0.03, rng.integers(1, 17, size=50_000), 0)
    density = np.count_nonzero(symbols) / len(symbols)
    positions = -len(symbols) * (density * log2(density) + (1 - density) * log2(1 - density)) / 8
    values = entropy_bits(np.bincount(symbols[symbols > 0])) / 8
    for coder in ("huffman", "range", "ans", None):
        taken = len(pack_symbols(symbols, 17, allowed(coder)))
        assert positions + values <= taken <= 1.06 * (positions + values)
    fixed = len(pack_symbols(symbols, 17, allowed("sparse_index")))
    assert fixed < len(symbols) / 8 + np.count_nonzero(symbols) * 5 / 8 + 8


# --- one tensor -------------------------------------------------------------------------------------------------------


def some(dtype: torch.dtype, shape: tuple[int, ...], seed: int, few: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    if few:
        raw = raw % 3 * 64
    if dtype == torch.bool:
        raw = raw % 2
    return raw.view(dtype).reshape(shape) if size else torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7, 5), (300, 2), (2,) * 8], ids=str)
def test_any_type_and_shape_comes_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for few in (False, True):
        tensor = some(dtype, shape, 0, few)
        for coder in CODERS:
            assert same_bits(unpack_tensor(pack_tensor(tensor, coder=coder)), tensor)


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.5, 1e-45, nan, inf, 3e38, 0.1]), max_size=100))
@settings(deadline=None)
def test_negative_zeros_and_other_odd_floats_keep_their_bits(values: list[float]) -> None:
    tensor = torch.tensor(values)
    assert same_bits(unpack_tensor(pack_tensor(tensor)), tensor)


def test_small_or_narrow_tensors_take_few_bytes() -> None:
    assert len(pack_tensor(torch.zeros(500, 800))) == 6
    assert len(pack_tensor(torch.tensor(1234))) == 4
    assert len(pack_tensor(torch.ones(64))) == 8
    assert len(pack_tensor(torch.arange(100.0))) == 103
    assert len(pack_tensor(torch.tensor([True] * 1000))) < 10


def int8_codes(shape: tuple[int, ...] = (16, 8, 3, 3), zero: int = 0) -> Codes:
    generator = torch.Generator().manual_seed(1)
    symbols = (torch.randn(shape, generator=generator) * 30).round().clamp(-127, 127).to(torch.int8)
    scale = torch.rand(shape[0], generator=generator) * 0.01 + 0.001
    return Codes(symbols, Affine(scale, torch.full((shape[0],), zero), 0), shape)


DECLARED = {
    "affine per channel": int8_codes(),
    "affine with a zero point": int8_codes(zero=5),
    "affine per tensor": Codes(
        torch.arange(-8, 8).view(4, 4), Affine(torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.5)), (4, 4)
    ),
    "unsigned": Codes(
        torch.arange(256, dtype=torch.uint8).view(16, 16), Affine(torch.tensor([0.1]), torch.tensor(128)), (16, 16)
    ),
    "table": Codes(torch.arange(64).view(8, 8) % 5, Table(torch.tensor([-1.0, 0.0, 0.25, 2.0, 9.0])), (8, 8)),
    "affine per block": Codes(
        torch.arange(-24, 24).view(4, 4, 3) % 15 - 7, Affine(torch.rand(6) + 0.1, torch.tensor(0), block=8), (4, 4, 3)
    ),
    "table per channel": Codes(torch.arange(64).view(8, 8) % 5, Table(torch.arange(40.0).view(8, 5) - 9, 0), (8, 8)),
    "product in stages": Codes(
        torch.randint(0, 4, (2, 30, 6), generator=torch.Generator().manual_seed(0)),
        Product(torch.randn(2, 6, 4, 3, generator=torch.Generator().manual_seed(0))),
        (30, 2, 3, 3),
    ),
    "product of channels": Codes(
        torch.randint(0, 4, (30 * 6, 2), generator=torch.Generator().manual_seed(0)),
        Product(torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)), 1),
        (30, 6, 2, 3),
    ),
    "product": Codes(
        torch.randint(0, 4, (30, 6), generator=torch.Generator().manual_seed(0)),
        Product(torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))),
        (30, 2, 3, 3),
    ),
}


@pytest.mark.parametrize("name", DECLARED)
@pytest.mark.parametrize("coder", CODERS)
def test_declared_codes_come_back_with_their_weight(name: str, coder: str | None, tmp_path: Path) -> None:
    codes = DECLARED[name]
    model = nn.Module()
    model.weight = nn.Parameter(codes.decode())
    declare_codes(model, "weight", codes)
    save(model, tmp_path / "a.fw", coder=coder)
    found = unpack_codes(tmp_path / "a.fw")["weight"]
    assert type(found.rule) is type(codes.rule)
    assert same_bits(found.decode(), codes.decode())
    assert same_bits(unpack(tmp_path / "a.fw")["weight"], codes.decode())
    if not isinstance(codes.rule, Table):
        assert found.symbols.tolist() == codes.symbols.tolist()


def test_bytes_do_not_wrap_around_their_zero_point() -> None:
    symbols = torch.tensor([0, 128, 255], dtype=torch.uint8)
    for zero in (torch.tensor(128), torch.tensor(128, dtype=torch.uint8), torch.tensor([128])):
        codes = Codes(symbols, Affine(torch.tensor(0.5), zero), (3,))
        assert codes.decode().tolist() == [-64.0, 0.0, 63.5]
        assert unpack_tensor(pack_tensor(codes.decode(), codes)).tolist() == [-64.0, 0.0, 63.5]


def test_int8_takes_a_quarter_and_the_values_alone_would_take_more() -> None:
    codes = int8_codes((64, 32, 3, 3))
    weight = codes.decode()
    assert len(pack_tensor(weight, codes)) < weight.numel() * 1.02
    assert len(pack_tensor(weight, codes)) < len(pack_tensor(weight)) * 0.7


def test_zeros_of_another_sign_than_the_codes_say_keep_it() -> None:
    codes = int8_codes()
    partly = codes.decode()
    partly[1:][partly[1:] == 0] = -0.0
    assert same_bits(unpack_tensor(pack_tensor(partly, codes)), partly)


def test_codes_that_do_not_decode_to_the_tensor_are_not_used() -> None:
    codes = int8_codes()
    other = codes.decode() + 1
    assert same_bits(unpack_tensor(pack_tensor(other, codes)), other)


def test_a_size_is_never_below_the_entropy_of_its_symbols(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 20))
    for layer in model:
        kept = torch.rand(layer.weight.shape, generator=generator) < 0.2
        codes = from_values(torch.where(kept, (torch.randn(kept.shape, generator=generator) * 3).round(), 0.0))
        layer.weight.data.copy_(codes.decode())
        declare_codes(layer, "weight", codes)
    for coder in CODERS:
        report = save(model, tmp_path / "a.fw", coder=coder)
        for row in report.tensors:
            assert row.entropy_bytes <= row.coded_bytes
            assert row.entropy_bytes <= row.packed_bytes


def test_an_unknown_coder_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(UnknownName, match="huffman"):
        pack_tensor(torch.zeros(3), coder="hufman")


def test_sparse_layouts_of_torch_are_refused() -> None:
    with pytest.raises(BadData, match="ordinary"):
        pack_tensor(torch.eye(3).to_sparse())


# --- models -----------------------------------------------------------------------------------------------------------


class Half(Form):
    """Halves an activation: a form with a setting and a tensor, for these tests."""

    settings = ("bits",)

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("factor", torch.tensor(0.5))

    def forward(self, *free: Tensor, keep: Tensor | None = None) -> Tensor:
        return free[0] * self.factor


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 8, 3)
        self.head = nn.Linear(8, 4)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(torch.relu(self.bn(self.conv1(x)))).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(30, 8)
        self.second = nn.Embedding(30, 8)
        self.head = nn.Linear(8, 30, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x) + self.second(x))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    model(torch.randn(4, 1, 8, 8))  # running statistics that are not the initial ones
    return model


def compressed() -> Net:
    """Masked, shared, swapped, an int8 layer and a form on an activation."""
    model = net()
    torch.manual_seed(1)
    keep = torch.rand(6, 1, 3, 3) < 0.6
    attach(model.conv1, Codebook(torch.tensor([-0.5, 0.25, 0.5]), torch.randint(0, 3, (6, 1, 3, 3))))
    attach(model.conv1, Mask(keep))
    parts = [nn.Conv2d(6, 2, 1, bias=False), nn.Conv2d(2, 3, 3, bias=False), nn.Conv2d(3, 8, 1)]
    swap(model, "conv2", nn.Sequential(*parts))
    codes = int8_codes((4, 8))
    model.head.weight.data.copy_(codes.decode())
    declare_codes(model.head, "weight", codes)
    attach(model.head, Half(4), "input")
    model.bn.weight.requires_grad_(False)
    return model.eval()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert same_bits(tensor, theirs[name]), name


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("coder", CODERS)
def test_a_compressed_model_comes_back_into_its_own_class(bare: bool, coder: str | None, tmp_path: Path) -> None:
    model = compressed()
    before = copy.deepcopy(model.state_dict())
    report = save(model, tmp_path / "a.fw", coder=coder, bare=bare)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    fresh = load(tmp_path / "a.fw", into=Net()).eval()
    assert_same(bake(copy.deepcopy(model)), fresh)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(fresh(x), model(x))
    form = activation_form(fresh.head, "input")
    assert isinstance(form, Half)
    assert form.bits == 4
    assert isinstance(codes_of(fresh.head).rule, Affine)
    assert isinstance(codes_of(fresh.conv1).rule, Table)
    again = save(fresh, tmp_path / "b.fw", coder=coder, bare=bare)
    if bare:
        assert again.bytes == report.bytes
    else:
        assert (tmp_path / "a.fw").read_bytes() == (tmp_path / "b.fw").read_bytes()
        assert [n for n, p in fresh.named_parameters() if not p.requires_grad] == ["bn.weight"]


def test_the_report_counts_every_byte(tmp_path: Path) -> None:
    report = save(compressed(), tmp_path / "a.fw", provenance={"seed": 3})
    found = inspect(tmp_path / "a.fw")
    assert report.bytes == found["bytes"] == (tmp_path / "a.fw").stat().st_size
    assert report.weights_bytes + report.structure_bytes == report.bytes
    assert [row["bytes"] for row in found["tensors"]] == [row.bytes for row in report.tensors]
    assert [row["name"] for row in found["tensors"]] == [row.name for row in report.tensors]
    assert [row["entropy_bits"] for row in found["tensors"]] == [row.entropy_bits for row in report.tensors]
    assert found["manifest"]["provenance"] == {"seed": 3}
    json.dumps(found)


def test_example_inputs_are_written_down(tmp_path: Path) -> None:
    save(net(), tmp_path / "a.fw", example_inputs=({"x": torch.zeros(2, 1, 8, 8)}))
    expected = {"args": [], "kwargs": {"x": {"shape": [2, 1, 8, 8], "dtype": "float32"}}}
    assert inspect(tmp_path / "a.fw")["example_inputs"] == expected


def test_a_bare_file_is_smaller_and_has_a_handful_of_bytes_around_its_tensors(tmp_path: Path) -> None:
    full, bare = save(net(), tmp_path / "a.fw"), save(net(), tmp_path / "b.fw", bare=True)
    assert bare.structure_bytes == 8
    assert bare.weights_bytes == full.weights_bytes
    assert list(unpack(tmp_path / "b.fw")) == [str(i) for i in range(len(bare.tensors))]
    assert sum(row.side_bytes for row in bare.tensors) <= 6 * len(bare.tensors)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for bare in (False, True):
        save(compressed(), tmp_path / "a.fw", bare=bare)
        save(compressed(), tmp_path / "b.fw", bare=bare)
        assert (tmp_path / "a.fw").read_bytes() == (tmp_path / "b.fw").read_bytes()


@pytest.mark.parametrize("bare", [False, True])
def test_channels_that_were_removed_stay_removed(bare: bool, tmp_path: Path) -> None:
    small = Net(width=3)
    small._fw_edits = {"conv1": {"out_channels": 3}, "bn": {"num_features": 3}, "conv2": {"in_channels": 3}}
    save(small, tmp_path / "a.fw", bare=bare)
    fresh = load(tmp_path / "a.fw", into=Net(width=6))
    assert_same(small, fresh)
    assert (fresh.conv1.out_channels, fresh.bn.num_features, fresh.conv2.in_channels) == (3, 3, 3)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(fresh.eval()(x), small.eval()(x))
    save(fresh, tmp_path / "b.fw", bare=bare)
    assert (tmp_path / "a.fw").read_bytes() == (tmp_path / "b.fw").read_bytes()


@pytest.mark.parametrize("bare", [False, True])
def test_tied_weights_are_stored_once_and_come_back_tied(bare: bool, tmp_path: Path) -> None:
    loose = save(Tied(), tmp_path / "loose.fw", bare=bare)
    model = Tied()
    model.second.weight = model.first.weight
    model.head.weight = model.first.weight
    tied = save(model, tmp_path / "a.fw", bare=bare)
    assert tied.weights_bytes < loose.weights_bytes * 0.4
    fresh = load(tmp_path / "a.fw", into=Tied())
    assert fresh.first.weight is fresh.second.weight is fresh.head.weight
    assert_same(model, fresh)
    assert len(unpack(tmp_path / "a.fw")) == 3
    untied = load(tmp_path / "loose.fw", into=fresh)
    assert untied.first.weight is not untied.second.weight
    assert same_bits(untied.second.weight, unpack(tmp_path / "loose.fw")["1" if bare else "second.weight"])
    assert not torch.equal(untied.first.weight, untied.second.weight)


def test_a_tie_under_one_mask_is_stored_once(tmp_path: Path) -> None:
    model = Tied()
    model.second.weight = model.first.weight
    attach(model.first, Mask(torch.rand(30, 8) < 0.5), root=model)
    save(model, tmp_path / "a.fw")
    fresh = load(tmp_path / "a.fw", into=Tied())
    assert fresh.first.weight is fresh.second.weight
    assert torch.equal(fresh.second.weight, model.second.weight)


def test_types_other_than_float32_keep_theirs(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = net().to(dtype)
        save(model, tmp_path / "a.fw")
        fresh = load(tmp_path / "a.fw", into=Net())
        assert_same(model, fresh)
        assert fresh.conv1.weight.dtype == dtype


SMALL = "nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))"


def test_a_recurrent_layer_computes_with_what_was_loaded(tmp_path: Path) -> None:
    model = nn.LSTM(4, 5).double()
    save(model, tmp_path / "a.fw")
    fresh = load(tmp_path / "a.fw", into=nn.LSTM(4, 5))
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    assert torch.equal(model(x)[0], fresh(x)[0])


def test_a_fresh_process_loads_and_trains_on(tmp_path: Path) -> None:
    model = eval(SMALL)
    x = torch.randn(5, 1, 8, 8)
    model(x)
    model[0].weight.data.copy_((model[0].weight * 4).round() / 4)
    save(model, tmp_path / "a.fw")
    torch.save({"x": x, "y": model.eval()(x)}, tmp_path / "y.pt")
    script = f"""
import torch
from torch import nn
from featherweight.coding import load
model = load({str(tmp_path / "a.fw")!r}, into={SMALL})
held = torch.load({str(tmp_path / "y.pt")!r}, weights_only=True)
assert torch.equal(model.eval()(held["x"]), held["y"])
optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
before = model[0].weight.clone()
model(held["x"]).square().sum().backward()
optimizer.step()
assert not torch.equal(before, model[0].weight)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- what is refused --------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    model = net()
    model.conv2.weight.data[0, 0, 0, 0] = nan
    with pytest.raises(BadData, match=r"conv2\.weight"):
        save(model, tmp_path / "a.fw")
    assert list(tmp_path.iterdir()) == []


def test_a_buffer_may_hold_infinities_but_not_nan(tmp_path: Path) -> None:
    model = net()
    model.register_buffer("mask", torch.tensor([0.0, -inf]))
    save(model, tmp_path / "a.fw")
    assert unpack(tmp_path / "a.fw")["mask"].tolist() == [0.0, -inf]
    model.mask[0] = nan
    with pytest.raises(BadData, match="mask"):
        save(model, tmp_path / "a.fw")


def test_a_folder_that_does_not_exist_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="choose a folder"):
        save(net(), tmp_path / "absent" / "a.fw")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadOption, match="choose a folder"):
        save(net(), tmp_path / "file" / "a.fw")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(net(), tmp_path / "a.fw")
    old = (tmp_path / "a.fw").read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadOption, match="No space left"):
        save(net(1), tmp_path / "a.fw")
    assert [p.name for p in tmp_path.iterdir()] == ["a.fw"]
    assert (tmp_path / "a.fw").read_bytes() == old


def test_loading_without_a_class_says_what_to_do(tmp_path: Path) -> None:
    save(net(), tmp_path / "a.fw")
    with pytest.raises(FormatError, match="into="):
        load(tmp_path / "a.fw")


def test_another_class_is_refused_with_the_tensor_that_differs(tmp_path: Path) -> None:
    save(net(), tmp_path / "a.fw")
    with pytest.raises(BadData, match="same class"):
        load(tmp_path / "a.fw", into=Tied())
    save(net(), tmp_path / "b.fw", bare=True)
    with pytest.raises(BadData, match="same class"):
        load(tmp_path / "b.fw", into=Tied())


def test_a_layer_that_a_file_cannot_name_is_refused(tmp_path: Path) -> None:
    model = net()
    swap(model, "head", nn.MultiheadAttention(2, 1))
    with pytest.raises(FeatherweightError, match="MultiheadAttention"):
        save(model, tmp_path / "a.fw")


def test_provenance_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="JSON"):
        save(net(), tmp_path / "a.fw", provenance={"metric": torch.zeros(1)})


# --- golden files and a second reader ---------------------------------------------------------------------------------


def digests(path: Path, into: nn.Module | None = None) -> dict[str, str]:
    def told(tensor: Tensor) -> str:
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"

    return {name: told(tensor) for name, tensor in unpack(path, into=into).items()}


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_golden_files_read_as_they_always_did(name: str) -> None:
    """Set FEATHERWEIGHT_REGENERATE=1 to write them anew; a change of the format is a change of its version."""
    path, told = GOLDEN / f"{name}.fw", GOLDEN / "digests.json"
    if os.environ.get(REGENERATE):
        GOLDEN.mkdir(exist_ok=True)
        make, options = GOLDEN_FILES[name]
        save(make(), path, **options)
        known = json.loads(told.read_text()) if told.exists() else {}
        told.write_text(json.dumps({**known, name: digests(path, fresh(name))}, indent=1) + "\n")
    assert digests(path, fresh(name)) == json.loads(told.read_text())[name]
    model, found = GOLDEN_FILES[name][0](), load(path, into=fresh(name))
    assert_same(model, found)
    assert structure(found) == structure(model)
    assert activation_forms(found).keys() == activation_forms(model).keys()


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_a_reader_written_from_the_specification_alone_agrees(name: str) -> None:
    path = GOLDEN / f"{name}.fw"
    # what the class tells a reader of a compact file
    model = load(path, into=fresh(name)) if (data := path.read_bytes())[0] >= 0xE0 else nn.Module()
    told, independent = independent_reader.read(data, [tuple(place.tensor.shape) for place in slots(model)])
    tensors = unpack(path, into=fresh(name))
    assert independent.keys() == tensors.keys()
    for key, (dtype, shape, raw) in independent.items():
        assert DTYPES[dtype] == tensors[key].dtype, key
        assert shape == tuple(tensors[key].shape), key
        assert raw == tensors[key].reshape(-1).view(torch.uint8).numpy().tobytes(), key
    manifest = inspect(path, into=fresh(name))["manifest"]
    assert told == {key: value for key, value in manifest.items() if value}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_reader_s_arithmetic_is_ours_to_the_last_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-(1 << 20), 1 << 20, (6, 7), generator=generator)
    for zero_type in (
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
    ):
        for size, axis in (((), None), ((1,), None), ((6,), 0), ((7,), 1)):
            scale = (torch.rand(size, generator=generator) + 0.3).to(dtype)
            zero = (torch.rand(size, generator=generator) * 99).to(zero_type)
            codes = Codes(whole, Affine(scale, zero, axis), (6, 7))
            if not codes.decode().isfinite().all():  # integers beyond float16
                codes = Codes(whole % 1000, Affine(scale, zero, axis), (6, 7))
            data = pack_tensor(codes.decode(), codes)
            number, shape, raw = independent_reader.tensor(independent_reader.Bytes(data))
            assert (DTYPES[number], shape) == (dtype, (6, 7))
            assert raw == codes.decode().view(torch.uint8).numpy().tobytes()
            assert data[3] & 7 == 3  # the codes were used


def test_the_reader_needs_the_page_alone_and_is_short() -> None:
    source = Path(independent_reader.__file__).read_text()
    code = [line for line in source.splitlines() if line.strip() and not line.strip().startswith(("#", '"""'))]
    imports = [line.split()[1].partition(".")[0] for line in code if line.startswith(("import ", "from "))]
    assert {*imports} <= {*sys.stdlib_module_names, "numpy"}
    assert len(code) - len(imports) <= 530  # six layouts of tensors, eight coders, compact files
    assert independent_reader.WORDS == WORDS
