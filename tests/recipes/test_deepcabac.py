"""Context-adaptive coding: exact, close to what its model promises, below static codes where neighbours are alike."""

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
from featherweight.coding import pack_tensor, unpack_tensor
from featherweight.coding.bits import Ints, Reader, entropy_bits
from featherweight.coding.coders.deepcabac import deepcabac, deepcabac_decode
from featherweight.coding.coders.huffman import huffman
from featherweight.errors import FormatError


def back(data: bytes, count: int, size: int) -> Ints:
    reader = Reader(data, 1 << 40)
    found = deepcabac_decode(reader, count, size)
    assert reader.left == 0
    return found


def laplace(count: int, scale: float, seed: int = 0) -> tuple[Ints, int]:
    drawn = np.round(np.random.default_rng(seed).laplace(0, scale, count)).astype(np.int64)
    drawn -= drawn.min()
    return drawn, int(drawn.max()) + 1


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 65535), max_size=120),
    st.sampled_from([1, 2, 3, 17, 256, 65536]),
    st.lists(st.integers(1, 40), max_size=3),
)
def test_any_symbols_come_back(values: list[int], size: int, widths: list[int]) -> None:
    symbols = np.array(values, dtype=np.int64) % size
    assert np.array_equal(back(deepcabac(symbols, size, widths), len(symbols), size), symbols)


@pytest.mark.parametrize("scale", [0.2, 1.0, 4.0, 60.0, 400.0])
def test_without_structure_it_is_near_the_entropy(scale: float) -> None:
    symbols, size = laplace(60_000, scale)
    code = deepcabac(symbols, size, (300,))
    assert np.array_equal(back(code, len(symbols), size), symbols)
    sampled = entropy_bits(np.bincount(symbols, minlength=size))  # below the truth where most symbols occur once
    assert len(code) <= 1.03 * max(sampled, len(symbols) * np.log2(2 * np.e * scale)) / 8 + 16


@pytest.mark.parametrize("kept", [0.3, 0.1, 0.02])
def test_sparse_weights_take_no_more_than_huffman(kept: float) -> None:
    rng = np.random.default_rng(1)
    symbols = np.where(rng.random(20_000) < kept, rng.integers(1, 16, 20_000), 0)
    assert len(deepcabac(symbols, 16, (100,))) <= len(huffman(symbols, 16))


def test_neighbours_that_are_alike_are_learned() -> None:
    rng = np.random.default_rng(2)
    scale = np.abs(rng.normal(size=(200, 1))) * np.abs(rng.normal(size=(1, 1000))) * 3
    symbols = np.round(rng.laplace(0, 1, (200, 1000)) * scale).astype(np.int64).ravel()
    symbols -= symbols.min()
    size = int(symbols.max()) + 1
    assert len(deepcabac(symbols, size, (1000,))) < 0.96 * entropy_bits(np.bincount(symbols, minlength=size)) / 8


def test_a_tensor_and_a_file_come_back_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(40, 50) * (torch.rand(40, 50) < 0.2)).mul(4).round() / 8
    data = pack_tensor(weight, coder="deepcabac")
    assert torch.equal(unpack_tensor(data), weight)
    model = torch.nn.Linear(50, 40)
    model.weight.data.copy_(weight)
    fw.save(model, tmp_path / "a.fw", coder="deepcabac", example_inputs=torch.randn(2, 50))
    assert torch.equal(fw.load(tmp_path / "a.fw").weight, weight)  # type: ignore[arg-type]
    assert "deepcabac" in {row["coder"] for row in fw.inspect(tmp_path / "a.fw")["tensors"]}


SCRIPT = """
import hashlib, numpy as np
from featherweight.coding.bits import Reader
from featherweight.coding.coders.deepcabac import deepcabac, deepcabac_decode
rng = np.random.default_rng(3)
symbols = np.abs(np.round(rng.laplace(0, 9, 3000))).astype(np.int64)
code = deepcabac(symbols, 500, (30, 7))
assert (deepcabac_decode(Reader(code, 1 << 30), 3000, 500) == symbols).all()
print(hashlib.sha256(code).hexdigest())
"""


def test_compiled_and_interpreted_kernels_make_the_same_bytes() -> None:
    seen = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "NUMBA_DISABLE_JIT": off},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for off in ("0", "1")
    ]
    assert len(seen[0]) == 65
    assert seen[0] == seen[1]


# --- a reader written from docs/format.md alone -----------------------------------------------------------------------


def reference(data: bytes, count: int) -> list[int]:  # noqa: PLR0915 - one reader, top to bottom
    """The symbols of a context-adaptive code."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    centre, width = varint(), varint()
    rates = (data[place] & 15, data[place] >> 4)
    place += 1
    length = varint()
    body = iter(data[place : place + length])
    code = int.from_bytes(bytes(next(body, 0) for _ in range(4)), "big")
    span = (1 << 32) - 1
    states: dict[int, list[int]] = {}

    def read(chance: int) -> bool:
        nonlocal code, span
        bound = (span >> 16) * chance
        one = code < bound
        span, code = (bound, code) if one else (span - bound, code - bound)
        while span < 1 << 24:
            span, code = span << 8, code << 8 | next(body, 0)
        return one

    def learned(context: int) -> bool:
        state = states.setdefault(context, [1 << 15, 1 << 15, 0])
        one = read(min(max((state[0] + state[1]) >> 1, 48), (1 << 16) - 48))
        for i, rate in enumerate(rates):
            step = min(rate, state[2] + 1)
            state[i] += ((1 << 16) - state[i]) >> step if one else -(state[i] >> step)
        state[2] = min(state[2] + 1, 16)
        return one

    def sign(value: int) -> int:
        return (value > 0) - (value < 0)

    values: list[int] = []
    for i in range(count):
        left = values[i - 1] if i % width >= 1 else 0
        beyond = values[i - 2] if i % width >= 2 else 0
        above = values[i - width] if i >= width else 0
        value = 0
        if learned(2 * (3 * min(abs(left), 2) + min(abs(above), 2)) + (beyond != 0)):
            negative = learned(18 + 3 * (1 + sign(left)) + 1 + sign(above))
            near = abs(left) + abs(above)
            base = 27 + 28 * (0 if near <= 2 else 1 if near <= 6 else 2) + 14 * negative
            value = 1
            while value <= 14 and learned(base + value - 1):
                value += 1
            if value == 15:
                bits = 0
                while learned(111 + bits):
                    bits += 1
                rest = 1
                for _ in range(bits):
                    rest = rest << 1 | read(1 << 15)
                value = 14 + rest
            value = -value if negative else value
        values.append(value)
    return [centre + value for value in values]


@pytest.mark.parametrize("scale", [0.3, 3.0, 200.0])
def test_a_reader_from_the_page_alone_reads_it(scale: float) -> None:
    symbols, size = laplace(3000, scale, seed=5)
    assert reference(deepcabac(symbols, size, (50,)), len(symbols)) == symbols.tolist()


@pytest.mark.parametrize("seed", range(40))
def test_damaged_codes_give_symbols_of_the_alphabet_or_one_sentence(seed: int) -> None:
    symbols, size = laplace(400, 3.0, seed=6)
    rng = np.random.default_rng(seed)
    data = bytearray(deepcabac(symbols, size, (20,)))
    for _ in range(int(rng.integers(1, 4))):
        data[int(rng.integers(len(data)))] = int(rng.integers(256))
    try:
        found = deepcabac_decode(Reader(bytes(data), 1 << 20), 400, size)
    except FormatError as error:
        told = str(error)
    else:
        told = "corrupt" if 0 <= found.min() <= found.max() < size and len(found) == 400 else "out of its alphabet"
    assert "corrupt" in told
