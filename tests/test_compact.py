"""Compact bare files: how few bytes stand beside the code, and that nothing but the model they were made of opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import independent_reader
from featherweight.coding import inspect, load, save, unpack, unpack_codes
from featherweight.coding.bits import entropy_bits
from featherweight.coding.compact import _step, checksum, cut, short_scale
from featherweight.coding.records import same_bits
from featherweight.coding.restoring import slots
from featherweight.core.forms import Affine, Codes, attach, bake, codes_of, declare_codes
from featherweight.core.levels import FixedGrid
from featherweight.errors import FormatError
from featherweight.zoo.networks import lenet5

WIDTHS = (5, 10, 20)


def tiny(seed: int = 0, spread: float = 0.45, step: float = 0.09375) -> nn.Module:
    """A LeNet-5 of few units whose weights and biases are small integers on grids, put there as methods do."""
    torch.manual_seed(seed)
    model = lenet5(widths=WIDTHS)
    for module in [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]:
        for name in ("weight", "bias"):
            tensor = getattr(module, name)
            whole = (torch.randn(tensor.shape) * spread).round().clamp(-3, 3)
            tensor.data.copy_(whole * step)
            attach(module, FixedGrid(torch.tensor(step), -3, 3), at=name, root=model)
    return bake(model)


def saved(model: nn.Module, path: Path) -> int:
    return save(model, path, bare=True, coder="context_mixing").bytes


def test_a_network_of_few_integers_is_little_more_than_its_entropy(tmp_path: Path) -> None:
    """The weights are independent, no context can help: what is beyond the entropy is overhead."""
    model = tiny()
    size = saved(model, tmp_path / "a.fw")
    integers = [codes_of(place.module, place.leaf) for place in slots(model)]
    counts = [np.unique(codes.symbols.numpy(), return_counts=True)[1] for codes in integers if codes is not None]
    assert len(counts) == 8
    assert size <= sum(entropy_bits(one) for one in counts) / 8 + 40
    found = inspect(tmp_path / "a.fw", into=lenet5(widths=WIDTHS))
    ideal = sum(row["ideal_bytes"] or row["code_bytes"] for row in found["tensors"])
    assert size - ideal <= 18
    loaded = load(tmp_path / "a.fw", into=lenet5(widths=WIDTHS))
    for own, other in zip(slots(model), slots(loaded), strict=True):
        assert same_bits(own.tensor.detach(), other.tensor.detach())
        codes, again = codes_of(own.module, own.leaf), codes_of(other.module, other.leaf)
        assert codes is not None
        assert again is not None
        assert torch.equal(codes.symbols, again.symbols)
        assert codes.symbols.dtype == again.symbols.dtype


@settings(max_examples=60, deadline=None)
@given(st.floats(2.0**-23, 240.0))
def test_a_short_step_is_at_most_five_percent_away(value: float) -> None:
    step = short_scale(value)
    assert abs(step / value - 1) < 0.05
    assert step in {_step(n) for n in range(256)}
    assert torch.tensor(step).bfloat16().item() == step


def test_steps_beyond_the_list_are_its_ends() -> None:
    assert short_scale(0.0) == short_scale(1e-30) == 2.0**-24
    assert short_scale(float("inf")) == _step(255)


CASES = {
    "short": Affine(torch.tensor(0.1015625), torch.tensor(0, dtype=torch.int32)),
    "bfloat16": Affine(torch.tensor(0.109375 + 2**-10), torch.tensor(0, dtype=torch.int32)),
    "float": Affine(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32)),
    "half": Affine(torch.tensor(0.1).half(), torch.tensor(0, dtype=torch.int32)),
    "double": Affine(torch.tensor(0.1).double(), torch.tensor(0, dtype=torch.int32)),
    "rows": Affine(torch.arange(1, 13) / 64, torch.tensor(0), 0),
    "blocks": Affine(torch.arange(1, 25) / 64, torch.tensor(2), block=10),
    "half a step aside": Affine(torch.tensor(0.25), torch.tensor(1.5)),
    "many zeros": Affine(torch.tensor(0.25), torch.arange(20), 1),
}


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("name", CASES)
def test_every_grid_comes_back(name: str, kind: torch.dtype, tmp_path: Path) -> None:
    symbols = ((torch.arange(240) * 37 + torch.arange(240) ** 2 * 11) % 101 + 7).to(kind).view(12, 20)
    codes = Codes(symbols, CASES[name], (12, 20))
    model = nn.Module()
    model.register_buffer("weight", codes.decode())
    declare_codes(model, "weight", codes)
    size = saved(model, tmp_path / "a.fw")
    fresh = nn.Module()
    fresh.register_buffer("weight", torch.zeros(12, 20, dtype=codes.decode().dtype))
    found = unpack_codes(tmp_path / "a.fw", into=fresh)["0"]
    assert same_bits(unpack(tmp_path / "a.fw", into=fresh)["0"], codes.decode())
    assert torch.equal(found.symbols, symbols)
    assert found.symbols.dtype == kind
    assert isinstance(found.rule, Affine)
    assert same_bits(found.rule.scale, CASES[name].scale)
    assert same_bits(found.rule.zero_point, CASES[name].zero_point)
    assert (found.rule.axis, found.rule.block) == (CASES[name].axis, CASES[name].block)
    _, tensors = independent_reader.read((tmp_path / "a.fw").read_bytes(), [(12, 20)])
    assert tensors["0"][2] == codes.decode().view(torch.uint8).numpy().tobytes()
    assert size == (tmp_path / "a.fw").stat().st_size


def test_a_model_of_another_configuration_is_told_from_its_shapes(tmp_path: Path) -> None:
    saved(tiny(), tmp_path / "a.fw")
    with pytest.raises(FormatError, match="of another class or configuration"):
        load(tmp_path / "a.fw", into=lenet5(widths=(5, 10, 25)))
    with pytest.raises(FormatError, match="pass into="):
        load(tmp_path / "a.fw")
    with pytest.raises(FormatError, match="pass into="):
        inspect(tmp_path / "a.fw")


def test_every_byte_is_covered_by_the_checksum_and_a_newer_version_is_refused(tmp_path: Path) -> None:
    saved(tiny(), tmp_path / "a.fw")
    good = (tmp_path / "a.fw").read_bytes()
    into = lenet5(widths=WIDTHS)
    before = {name: tensor.clone() for name, tensor in into.state_dict().items()}
    for at in (*range(8), *range(8, len(good), 37), len(good) - 1):
        bad = bytearray(good)
        bad[at] ^= 0x11
        (tmp_path / "a.fw").write_bytes(bad)
        with pytest.raises(FormatError):
            load(tmp_path / "a.fw", into=into)
    assert all(torch.equal(tensor, before[name]) for name, tensor in into.state_dict().items())
    (tmp_path / "a.fw").write_bytes(bytes([good[0] | 0x08]) + good[1:])
    with pytest.raises(FormatError, match="of version 2"):
        load(tmp_path / "a.fw", into=into)


def test_sizes_in_a_stream_are_bounded_before_anything_is_allocated(tmp_path: Path) -> None:
    """A stream of a few bytes, signed as it should be, that says any shapes: none of them takes memory or time."""
    fresh = nn.Linear(3, 2)
    rng = np.random.default_rng(0)
    answers = set()
    for _ in range(300):
        body = bytes([0xE4]) + rng.integers(0, 256, size=int(rng.integers(1, 40))).astype(np.uint8).tobytes()
        (tmp_path / "a.fw").write_bytes(body + checksum(body, [], short=True))
        try:
            load(tmp_path / "a.fw", into=fresh)
        except FormatError as error:
            answers.add(str(error).partition(": ")[2][:40])
        except Exception as error:  # BadData: shapes that are not the model's
            answers.add(type(error).__name__)
    assert len(answers) >= 4


def test_the_parts_of_a_long_file_and_its_checksum(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    saved(model, tmp_path / "a.fw")
    data = (tmp_path / "a.fw").read_bytes()
    parts = cut(data)
    assert len(data) > 4096
    assert len(parts.sum) == 4
    assert len(parts.front) > 4000  # weights that are on no grid
    (tmp_path / "b.fw").write_bytes(data[:4000])
    with pytest.raises(FormatError, match="truncated"):
        load(tmp_path / "b.fw", into=nn.Linear(64, 64))
