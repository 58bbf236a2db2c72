"""Rows as a multiset: exact, shorter by what their order would cost; a reader written from the page alone agrees."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from fractions import Fraction
from math import comb, lgamma, log, log2
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import independent_reader
from featherweight.coding.bits import Ints, Reader, entropy_bits
from featherweight.coding.coders.unlabeled_graph import unlabeled_graph, unlabeled_graph_decode
from featherweight.coding.multiset_kernels import HIGH, MOST, OLDEST, _count, _sums
from featherweight.errors import FormatError


def back(data: bytes, count: int, size: int) -> Ints:
    reader = Reader(data, 1 << 40)
    found = unlabeled_graph_decode(reader, count, size)
    assert reader.left == 0
    return found


def ordered(rows: Ints) -> Ints:
    return rows[np.lexsort(rows.T[::-1])]


def order_bits(rows: Ints) -> float:
    """log2(N! / prod mult!)."""
    counts = np.unique(rows, axis=0, return_counts=True)[1]
    return (lgamma(len(rows) + 1) - sum(lgamma(n + 1) for n in counts)) / log(2)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 65535), max_size=60),
    st.sampled_from([1, 2, 3, 17, 256, 65536]),
    st.sampled_from([(), (1,), (3,), (12, 4)]),
    st.booleans(),
)
def test_any_symbols_come_back(values: list[int], size: int, widths: tuple[int, ...], in_order: bool) -> None:
    symbols = np.array(values, dtype=np.int64) % size
    if in_order and widths and len(symbols) % widths[0] == 0:
        symbols = ordered(symbols.reshape(-1, widths[0])).ravel()
    code = unlabeled_graph(symbols, size, widths)
    assert np.array_equal(back(code, len(symbols), size), symbols)
    if size > 1 and len(symbols):
        assert independent_reader.multiset(independent_reader.Bytes(code), len(symbols), size) == symbols.tolist()


@pytest.mark.parametrize(
    ("rows", "columns", "size", "kept"), [(40, 30, 3, 1.0), (40, 8, 2, 0.1), (16, 9, 3, 0.5), (500, 20, 4, 0.3)]
)
def test_order_is_not_paid_for(rows: int, columns: int, size: int, kept: float) -> None:
    """At most the length of independent symbols, less the logarithm of the number of orders, and 64 bits."""
    rng = np.random.default_rng(0)
    drawn = np.where(rng.random((rows, columns)) < kept, rng.integers(kept < 1, size, (rows, columns)), 0)
    alone = entropy_bits(np.bincount(drawn.ravel(), minlength=size))
    code = 8 * len(unlabeled_graph(ordered(drawn).ravel(), size, (columns,)))
    assert code <= alone - order_bits(drawn) + 64
    assert code >= alone - order_bits(drawn) - 8
    if rows == 40:  # log2(40!) where no two rows are equal; equal ones have one order among them
        assert order_bits(drawn) == pytest.approx(159.16, abs=0.01) if kept == 1.0 else order_bits(drawn) < 130


def test_rows_in_no_order_cost_what_they_cost_one_by_one() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 3, (60, 40))
    assert len(unlabeled_graph(rows.ravel(), 3, (40,))) <= 60 * 40 * log2(3) / 8 + 10
    two = np.concatenate([ordered(rows[:30]), ordered(rows[30:])])  # two runs: groups of units that keep apart
    saved = order_bits(rows[:30]) + order_bits(rows[30:])
    assert 8 * len(unlabeled_graph(two.ravel(), 3, (40,))) <= 60 * 40 * log2(3) - saved + 64


@pytest.mark.parametrize(
    ("rows", "zeros", "ones"), [(1, 0, 0), (5, 0, 0), (7, 3, 0), (7, 0, 3), (12, 5, 2), (40, 90, 11)]
)
def test_counts_are_as_likely_as_a_beta_binomial_says(rows: int, zeros: int, ones: int) -> None:
    """Against exact fractions: C(n, k) times the product of what each next bit is given, with a half for each kind."""
    sums = np.zeros(rows + 2, dtype=np.int64)
    _sums(sums, rows, zeros, ones)
    exact = []
    for k in range(rows + 1):
        chance = Fraction(comb(rows, k))
        for i in range(rows):
            own, other = (zeros, i) if i < k else (ones, i - k)
            chance *= Fraction(2 * (own + other) + 1, 2 * (zeros + ones + i) + 2)
        exact.append(float(chance))
    assert sum(exact) == pytest.approx(1)
    assert np.allclose(np.diff(sums) / sums[-1], exact, atol=8 / HIGH, rtol=1e-4)


def test_counts_are_halved_before_they_are_too_large_for_the_arithmetic() -> None:
    counts = np.array([[OLDEST - 5, 3], [4, 0]], dtype=np.int64)
    _count(counts, 0, 1, 0)
    assert counts[:, 0].tolist() == [OLDEST - 4, 4]
    _count(counts, 0, 1, 0)
    assert counts[:, 0].tolist() == [(OLDEST - 3) >> 1, 2]
    sums = np.zeros(MOST + 2, dtype=np.int64)
    _sums(sums, MOST, OLDEST // 2, OLDEST // 2)
    assert (np.diff(sums) > 0).all()
    assert int(np.diff(sums).max()) <= HIGH


def test_without_compiled_kernels_the_bytes_are_the_same() -> None:
    script = "import numpy as np; from featherweight.coding.coders.unlabeled_graph import *; "
    script += "x = np.sort(np.arange(90) * 7919 % 5).reshape(-1, 3); "
    script += "print(unlabeled_graph(x.ravel(), 5, (3,)).hex())"
    ran = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, check=True
    )
    assert ran.stdout.decode().strip() == unlabeled_graph(np.sort(np.arange(90) * 7919 % 5), 5, (3,)).hex()


def test_codes_that_no_writer_makes_are_refused() -> None:
    code = unlabeled_graph(ordered(np.random.default_rng(0).integers(0, 3, (20, 6))).ravel(), 3, (6,))
    for broken in (b"\0" + code[1:], b"\x07" + code[1:], code[:1] + b"\x15" + code[2:]):
        with pytest.raises(FormatError):
            back(broken, 120, 3)
    for empty in (b"\x06\x02\0\0", b"\x06\x02\x14\0", b"\x06\x01\x04\xff\xff\xff\xff", b"\x06\x01\x01\x80" + b"\0" * 9):
        reader = Reader(empty, 1 << 40)
        with suppress(FormatError):
            unlabeled_graph_decode(reader, 120, 3)
            assert reader.left, "what is not refused leaves bytes, which its record refuses"


def test_a_file_of_few_bytes_and_many_symbols_ends() -> None:
    with pytest.raises(FormatError, match="goes on"):
        back(b"\x01\x00\x01\x80", 1 << 16, 65536)


def test_the_page_names_the_coder() -> None:
    assert "7 multiset" in (Path(__file__).parents[2] / "docs" / "format.md").read_text()
