"""The profile for speed, streams that are cut into blocks, and threads: all of it is the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import independent_reader
from featherweight.coding import inspect, load, save, streams
from featherweight.coding.bits import Reader, entropy_bits, pack_list, varint
from featherweight.coding.coders.interleaved_rans import interleaved_decode, interleaved_rans, normalised
from featherweight.coding.streams import BLOCKS, FAST, LEAST_BLOCK, allowed, pack_symbols, unpack_all, unpack_symbols
from featherweight.core.forms import codes_of
from featherweight.errors import FormatError
from test_inspect import gaussian, told_once

PLENTY = 1 << 30
RNG = np.random.default_rng(0)


def bell(count: int, size: int = 61, spread: float = 5.0) -> np.ndarray:
    return np.clip(np.rint(RNG.normal(size / 2, spread, count)), 0, size - 1).astype(np.int64)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 1023, 1024, 8191, 8192, 8200])
@pytest.mark.parametrize("size", [2, 61, 256, 257, 5000])
def test_interleaved_codes_come_back_whatever_the_number_of_states(count: int, size: int) -> None:
    symbols = RNG.integers(0, size, count) if count % 2 else bell(count, size, size / 9)
    source = Reader(interleaved_rans(symbols, size), PLENTY)
    assert np.array_equal(interleaved_decode(source, count, size), symbols)
    assert source.left == 0


def test_interleaved_codes_are_within_a_hundredth_of_the_entropy() -> None:
    for spread in (0.3, 1.0, 5.0, 12.0):
        symbols = bell(100_000, 61, spread)
        bound = entropy_bits(np.bincount(symbols)) / 8
        assert bound <= len(interleaved_rans(symbols, 61)) <= 1.01 * bound + 100


def test_one_symbol_alone_and_all_of_many_symbols_have_codes() -> None:
    for symbols, size in ((np.full(5000, 3), 7), (np.arange(65536), 65536)):
        source = Reader(interleaved_rans(symbols, size), PLENTY)
        assert np.array_equal(interleaved_decode(source, len(symbols), size), symbols)


@pytest.mark.parametrize("bits", [9, 12])
def test_frequencies_fill_the_table_and_leave_no_symbol_out(bits: int) -> None:
    counts = np.concatenate([[0, 1, 10**7, 3], RNG.integers(0, 3, 400)])
    found = normalised(counts, bits)
    assert found.sum() == 1 << bits
    assert ((found > 0) == (counts > 0)).all()


def table(
    *frequencies: int, bits: int = 4, lanes: int = 0, words: int = 0, states: tuple[int, ...] = (1 << 16,)
) -> bytes:
    held = np.array(states, "<u4").tobytes()
    return bytes([bits | lanes << 5]) + pack_list(np.array(frequencies)) + varint(words) + held


WRONG = {
    "frequencies below the sum": table(8, 7),
    "frequencies above the sum": table(8, 9),
    "frequencies that wrap around": table(*[1 << 39] * 2, bits=16),
    "no precision": table(1, 0, bits=0),
    "too much precision": table(1 << 16, 1 << 16, bits=17),
    "more states than there are": table(8, 8, lanes=4, states=(1 << 16,) * 16),
    "a state that is too low": table(8, 8, states=(65535,)),
    "a state that does not end where it began": table(8, 8, states=(1 << 20,)),
    "words that are not there": table(8, 8, words=1 << 40),
    "missing words": table(8, 8, states=(65537,)),
    "nothing": b"",
    "half a table": table(8, 8)[:2],
}


@pytest.mark.parametrize("name", WRONG)
def test_codes_that_no_writer_makes_are_refused(name: str) -> None:
    with pytest.raises(FormatError):
        interleaved_decode(Reader(WRONG[name], PLENTY), 9, 2)


def test_damaged_codes_are_refused_or_give_symbols_of_the_alphabet() -> None:
    good = interleaved_rans(bell(3000), 61)
    for at in range(0, len(good), 7):
        bad = bytearray(good)
        bad[at] ^= 1 << int(RNG.integers(8))
        try:
            found = interleaved_decode(Reader(bytes(bad), PLENTY), 3000, 61)
        except FormatError:
            continue
        assert found.max() < 61


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coder", ["fast", "context_mixing", "deepcabac", "huffman", "rans", None])
@pytest.mark.parametrize("threads", [1, 2])
def test_long_streams_are_cut_and_come_back(coder: str | None, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LONG", 9000), ("BLOCK", 6000), ("FAST_BLOCK", 5000)):
        monkeypatch.setattr(streams, name, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    symbols = bell(20_000)
    data = pack_symbols(symbols, 61, allowed(coder), (100,), 30)
    assert data[0] & 3 == BLOCKS
    source = Reader(data + b"rest", PLENTY)
    found, told = unpack_all(source, len(symbols), 61)
    assert np.array_equal(found, symbols)
    assert source.left == 4
    assert told.startswith(("3 blocks", "4 blocks"))
    if coder in ("fast", "huffman"):  # others take it long
        assert independent_reader.symbols(independent_reader.Bytes(data), len(symbols), 61) == symbols.tolist()


def test_a_stream_is_cut_where_rows_end_and_its_trellis_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from featherweight.coding.mixing_kernels import STATES

    levels, state, points = bell(40_000, 15, 2.0) - 7, 0, []
    for level in levels.tolist():
        points.append(2 * level - (state & 1) * int(np.sign(level)))
        state = STATES[2, state, abs(level) & 1]
    symbols = np.array(points) + 20
    whole = pack_symbols(symbols, 41, allowed("context_mixing"), (50,), 20)
    for name, value in (("LONG", 20_000), ("BLOCK", 10_000)):
        monkeypatch.setattr(streams, name, value)
    cut = pack_symbols(symbols, 41, allowed("context_mixing"), (50,), 20)
    found, told = unpack_all(Reader(cut, PLENTY), len(symbols), 41)
    assert np.array_equal(found, symbols)
    assert told == "4 blocks (context_mixing)"
    assert len(cut) < 1.03 * len(whole)  # points coded as any integers would take a third more


def test_blocks_of_a_large_tensor_cost_less_than_half_a_percent() -> None:
    symbols = np.concatenate([bell(1 << 17, 31, 2.0), bell(1 << 17, 31, 3.0)])
    whole = len(pack_symbols(symbols, 31, (0, FAST), (512,)))
    pieces = [len(pack_symbols(piece, 31, (0, FAST), (512,))) for piece in np.split(symbols, 2)]
    assert sum(pieces) < 1.005 * whole


def blocks(*sizes: int, number: int | None = None, rest: bytes = b"") -> bytes:
    made = [pack_symbols(np.zeros(size, np.int64), 3, (0,)) for size in sizes]
    told = b"".join(varint(size) + varint(len(stream)) for size, stream in zip(sizes, made, strict=True))
    return bytes([BLOCKS]) + varint(len(sizes) if number is None else number) + told + b"".join(made) + rest


@pytest.mark.parametrize(
    "data",
    [
        blocks(LEAST_BLOCK - 1, LEAST_BLOCK + 1),
        blocks(LEAST_BLOCK, LEAST_BLOCK - 1),
        blocks(LEAST_BLOCK, LEAST_BLOCK + 1),
        blocks(number=0),
        blocks(2 * LEAST_BLOCK, number=1 << 40),
        bytes([BLOCKS | 4]) + blocks(2 * LEAST_BLOCK)[1:],
        bytes([BLOCKS, 1]) + varint(2 * LEAST_BLOCK) + varint(1 << 50),
        bytes([BLOCKS, 1]) + varint(2 * LEAST_BLOCK) + varint(8) + blocks(2 * LEAST_BLOCK),
    ],
)
def test_blocks_that_do_not_make_their_stream_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        unpack_all(Reader(data, PLENTY), 2 * LEAST_BLOCK, 3)


def test_no_block_stands_in_another_stream() -> None:
    with pytest.raises(FormatError):
        unpack_symbols(Reader(blocks(2 * LEAST_BLOCK), PLENTY), 2 * LEAST_BLOCK, 3)


@pytest.mark.parametrize("coder", ["fast", "context_mixing"])
def test_a_large_layer_in_blocks_comes_back_with_its_codes(
    coder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LONG", 5000), ("BLOCK", 5000), ("FAST_BLOCK", 5000)):
        monkeypatch.setattr(streams, name, value)
    layer = gaussian()
    save(layer, tmp_path / "a.fw", coder=coder)
    told_once(tmp_path / "a.fw")
    assert "blocks" in inspect(tmp_path / "a.fw")["tensors"][0]["coder"]
    found = load(tmp_path / "a.fw", into=torch.nn.Linear(200, 64, bias=False))
    assert torch.equal(found.weight, layer.weight)
    assert torch.equal(codes_of(found).symbols, codes_of(layer).symbols)
