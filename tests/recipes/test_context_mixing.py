"""Context mixing: exact, below the adaptive coder with one context, near the entropy without structure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import featherweight as fw
import independent_reader
from featherweight.coding import pack_tensor, unpack_tensor
from featherweight.coding.bits import Ints, Reader, entropy_bits
from featherweight.coding.coders.context_mixing import context_mixing, context_mixing_decode
from featherweight.coding.coders.deepcabac import deepcabac
from featherweight.coding.mixing_kernels import SQUASH, STRETCH
from featherweight.errors import FormatError


def back(data: bytes, count: int, size: int) -> Ints:
    reader = Reader(data, 1 << 40)
    found = context_mixing_decode(reader, count, size)
    assert reader.left == 0
    return found


def drawn(rows: int, columns: int, scale: float, uneven: float, seed: int = 0) -> tuple[Ints, int]:
    """Weights whose spread differs from row to row and from column to column, as symbols from 0."""
    rng = np.random.default_rng(seed)
    spread = scale * np.exp(uneven * (rng.normal(size=(rows, 1)) + rng.normal(size=(1, columns))))
    whole = np.round(rng.normal(size=(rows, columns)) * spread).astype(np.int64).ravel()
    return whole - whole.min(), int(whole.max() - whole.min()) + 1


def trellis(levels: Ints, states: int) -> tuple[Ints, int, int]:
    """The points of dependent quantization that levels stand for, as symbols from 0; the symbol of zero; how many."""
    follows = {4: ((0, 1), (2, 3), (1, 0), (3, 2)), 8: ((0, 2), (7, 5), (1, 3), (6, 4), (2, 0), (5, 7), (3, 1), (4, 6))}
    points, state = [], 0
    for level in levels.tolist():
        points.append(2 * level - state % 2 * int(np.sign(level)))
        state = follows[states][state][level % 2]
    low = min(points, default=0)
    low = min(low, 0)
    return np.array(points, dtype=np.int64) - low, -low, max(points, default=0) - low + 1


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 65535), max_size=60),
    st.sampled_from([1, 2, 3, 17, 256, 65536]),
    st.sampled_from([(), (1,), (7,), (12, 4), (12, 6), (40, 5), (12, 4, 2), (18, 9, 3), (16,)]),
    st.sampled_from([0, 4, 8]),
)
def test_any_symbols_come_back(values: list[int], size: int, widths: tuple[int, ...], states: int) -> None:
    symbols = np.array(values, dtype=np.int64) % size
    symbols, zero, size = trellis(symbols - size // 2, states) if states else (symbols, None, size)
    assert np.array_equal(back(context_mixing(symbols, size, widths, zero), len(symbols), size), symbols)


@pytest.mark.parametrize("widths", [(), (500,), (500, 25, 5)])
def test_runs_and_lonely_symbols_come_back_in_next_to_nothing(widths: tuple[int, ...]) -> None:
    at = np.arange(20_000)
    for symbols, size, most in ((at * 0 + 7, 8, 32), ((at == 9999) * 65535, 65536, 45), (at // 5000 * 3, 10, 120)):
        code = context_mixing(symbols, size, widths)
        assert np.array_equal(back(code, len(symbols), size), symbols)
        assert len(code) <= most


@pytest.mark.parametrize("scale", [0.3, 2.0, 40.0])
def test_where_there_is_nothing_to_learn_it_is_near_the_entropy(scale: float) -> None:
    symbols, size = drawn(100, 400, scale, 0.0)
    code = context_mixing(symbols, size, (400,))
    assert np.array_equal(back(code, len(symbols), size), symbols)
    assert len(code) <= 1.02 * entropy_bits(np.bincount(symbols, minlength=size)) / 8 + 16


def test_it_is_shorter_than_one_context_at_a_time() -> None:
    """What rows, columns and kernels have in common is worth more, the more of it there is."""
    for uneven, gain in ((0.3, 0.985), (0.8, 0.96)):
        symbols, size = drawn(120, 270, 1.5, uneven)
        assert len(context_mixing(symbols, size, (270, 9))) < gain * len(deepcabac(symbols, size, (270, 9)))


def test_the_code_is_as_long_as_its_model_says() -> None:
    """Within 0.1 % of the ideal length, summed from the chances that an independent reader meets on the way."""
    symbols, size = drawn(20, 45, 2.0, 0.5)
    code = context_mixing(symbols, size, (45, 9))
    ideal = 0.0
    taken = independent_reader.Mixture.taken

    def counted(self: independent_reader.Mixture, chance: int) -> int:
        nonlocal ideal
        one = taken(self, chance)
        ideal -= np.log2((chance if one else (1 << 16) - chance) / (1 << 16))
        return one

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(independent_reader.Mixture, "taken", counted)
        found = independent_reader.mixed(independent_reader.Bytes(code), len(symbols), size)
    assert found == symbols.tolist()
    assert ideal / 8 <= len(code) <= 1.001 * ideal / 8 + 12


@pytest.mark.parametrize("states", [0, 4, 8])
@pytest.mark.parametrize(
    ("shape", "scale"), [((6, 20), 0.4), ((5, 3, 2, 2), 30.0), ((4, 2, 3, 5), 2.0), ((9, 1), 300.0), ((200,), 3.0)]
)
def test_a_reader_written_from_the_page_alone_agrees(shape: tuple[int, ...], scale: float, states: int) -> None:
    count, widths = int(np.prod(shape)), (int(np.prod(shape[1:])), int(np.prod(shape[2:])), shape[-1])
    widths = widths if len(shape) > 3 else widths[: max(len(shape) - 1, 1)]
    symbols, size = drawn(1, count, scale, 0.5, states)
    symbols, zero, size = trellis(symbols - int(np.median(symbols)), states) if states else (symbols, None, size)
    code = context_mixing(symbols, size, widths, zero)
    if len(symbols) > 31:
        heads = independent_reader.Bytes(code)
        _ = heads.varint(), heads.varint(), heads.varint(), heads.varint()
        assert heads.take(1)[0] >> 5 == states // 4
    assert independent_reader.mixed(independent_reader.Bytes(code), count, size) == symbols.tolist()


def test_the_tables_are_those_of_the_page() -> None:
    """Whole numbers all over: squash and stretch are each other's inverse, and at most half a unit in 256 from them."""
    assert SQUASH.tolist() == independent_reader.SQUASH
    assert STRETCH.tolist() == independent_reader.STRETCH
    x = np.arange(-2815, 2816)
    assert np.abs(SQUASH - 65536 / (1 + np.exp(-x / 256))).max() < 200
    assert (np.diff(SQUASH) >= 0).all()


def test_a_tensor_and_a_file_come_back_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(40, 50) * (torch.rand(40, 50) < 0.2)).mul(4).round() / 8
    assert torch.equal(unpack_tensor(pack_tensor(weight, coder="context_mixing")), weight)
    model = torch.nn.Linear(50, 40)
    model.weight.data.copy_(weight)
    fw.save(model, tmp_path / "a.fw", coder="context_mixing", example_inputs=torch.randn(2, 50))
    assert torch.equal(fw.load(tmp_path / "a.fw").weight, weight)  # type: ignore[arg-type]
    assert "context_mixing" in {row["coder"] for row in fw.inspect(tmp_path / "a.fw")["tensors"]}


SCRIPT = """
import hashlib, numpy as np
from featherweight.coding.bits import Reader
from featherweight.coding.coders.context_mixing import context_mixing, context_mixing_decode
rng = np.random.default_rng(3)
symbols = np.abs(np.round(rng.laplace(0, 9, 300))).astype(np.int64)
code = context_mixing(symbols, 500, (30, 6), 8)
assert (context_mixing_decode(Reader(code, 1 << 30), 300, 500) == symbols).all()
print(hashlib.sha256(code).hexdigest())
"""


def test_compiled_and_interpreted_kernels_make_the_same_bytes() -> None:
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    told = subprocess.run([sys.executable, "-c", SCRIPT], env=env, check=True, capture_output=True, text=True).stdout
    seen: list[str] = []
    exec(SCRIPT, {"print": seen.append})
    assert len(seen[0]) == 64
    assert told.strip() == seen[0]


def test_what_no_writer_makes_is_refused() -> None:
    symbols, size = drawn(10, 40, 2.0, 0.4)
    good = context_mixing(symbols, size, (40, 8))
    assert good[1:4] == bytes([40, 8, 1])
    heads = {1: (0, 4), 2: (0, 7, 80), 3: (0, 3, 16), 4: (0x11, 0x60)}  # width, kernel, line, shift and trellis
    for place, values in heads.items():
        for value in values:
            bad = bytearray(good)
            bad[place] = value
            with pytest.raises(FormatError):
                context_mixing_decode(Reader(bytes(bad), 1 << 20), 400, size)
    for cut in (b"\0\0\0\0\0\0\0\0", b""):  # longer, and much shorter, than what the bins look at
        data = (good[7:] + cut) if cut else good[7:21]
        with pytest.raises(FormatError):
            context_mixing_decode(
                Reader(good[:6] + bytes([len(data) & 127 | 128, len(data) >> 7]) + data, 1 << 20), 400, size
            )


def test_mutated_codes_end_in_a_format_error_or_in_symbols_of_the_alphabet() -> None:
    symbols, size = drawn(8, 50, 5.0, 0.5)
    data = bytearray(context_mixing(symbols, size, (50, 5)))
    rng = np.random.default_rng(4)
    for _ in range(300):
        bad = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            bad[rng.integers(len(bad))] = rng.integers(256)
        try:
            found = context_mixing_decode(Reader(bytes(bad), 1 << 20), 400, size)
        except FormatError:
            continue
        assert found.min() >= 0
        assert found.max() < size
