"""The loops of interleaved rANS, compiled by numba; with NUMBA_DISABLE_JIT=1 the same Python runs as it stands.

Unsigned integers below 2**33 alone, so that every machine makes the same bytes. Symbol i belongs to state i mod N: the
states do not wait for one another, which is what makes a processor fast at it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from featherweight.coding.bits import Ints

LOWEST = 1 << 16  # a state is kept from here to 2**32
DELTA = 0x10  # of a list of integers: differences follow


@njit(cache=True)
def encode(symbols: Any, frequencies: Ints, bits: int, count: int) -> Any:
    """The final states of `count` interleaved coders, and the words of 16 bits in the order in which they are read.

    Args:
        bits: frequencies add up to 2**bits.
    """
    starts = np.zeros(len(frequencies) + 1, dtype=np.int64)
    starts[1:] = np.cumsum(frequencies)
    states = np.full(count, LOWEST, dtype=np.int64)
    words, at = np.zeros(len(symbols) + 1, dtype=np.uint16), len(symbols) + 1
    for i in range(len(symbols) - 1, -1, -1):
        state, symbol = states[i % count], symbols[i]
        often = frequencies[symbol]
        if state >= often << (32 - bits):
            at -= 1
            words[at] = state & 0xFFFF
            state >>= 16
        states[i % count] = ((state // often) << bits) + state % often + starts[symbol]
    return states, words[at:]


@njit(cache=True)
def slots(frequencies: Ints, bits: int) -> Any:
    """For each number below 2**bits the symbol that owns it, its frequency, and how far into it the number lies."""
    found, at = np.empty(1 << bits, dtype=np.uint64), 0
    for symbol in range(len(frequencies)):
        often = frequencies[symbol]
        for ahead in range(often):
            found[at + ahead] = np.uint64(symbol << 40 | often << 20 | ahead)
        at += often
    return found


@njit(cache=True, nogil=True)
def decode(words: Any, states: Any, table: Any, bits: int, out: Any) -> bool:
    """Fills `out` with symbols; False where words are missing or left over, or a state does not end where it began."""
    one, sixteen, twenty, forty = np.uint64(1), np.uint64(16), np.uint64(20), np.uint64(40)
    low, mask, shift, field = np.uint64(LOWEST), np.uint64((1 << bits) - 1), np.uint64(bits), np.uint64((1 << 20) - 1)
    lanes, count, room, at, i = (
        np.uint64(len(states)),
        np.uint64(len(out)),
        np.uint64(len(words)),
        np.uint64(0),
        np.uint64(0),
    )
    while i < count:
        some = min(lanes, count - i)
        if at + some > room:  # near the end: each word is looked for
            break
        for j in range(some):
            state = states[j]
            slot = table[state & mask]
            out[i + j] = slot >> forty
            state = ((slot >> twenty) & field) * (state >> shift) + (slot & field)
            short = np.uint64(state < low)
            states[j] = state << (short * sixteen) | np.uint64(words[at]) * short
            at += short
        i += some
    while i < count:
        state = states[i % lanes]
        slot = table[state & mask]
        out[i] = slot >> forty
        state = ((slot >> twenty) & field) * (state >> shift) + (slot & field)
        if state < low:
            if at == room:
                return False
            state = state << sixteen | np.uint64(words[at])
            at += one
        states[i % lanes] = state
        i += one
    return at == room and bool(np.all(states == low))


@njit(cache=True, nogil=True)
def spread(symbols: Any, table: Any, out: Any, start: int, run: int, size: int) -> None:
    """Fills `out` with the entry of a table of (rows, size) for each symbol: `run` places have a row, then the next."""
    rows, i = len(table) // size, 0
    while i < len(symbols):
        row, stop = (start + i) // run % rows * size, min(len(symbols), i + run - (start + i) % run)
        own = table[row : row + size]
        for k in range(i, stop):
            out[k] = own[symbols[k]]
        i = stop


@njit(cache=True)
def read_list(data: Any, out: Ints) -> int:
    """Fills `out` with a list of integers as `bits.pack_list` writes it; the bytes it took, -1 if it is none."""
    order, at, last = np.int64(data[0] & 15), 8, np.int64(0)
    for i in range(len(out)):
        zeros = 0
        while at < 8 * len(data) and not (data[at >> 3] >> (7 - (at & 7))) & 1:
            at, zeros = at + 1, zeros + 1
        if zeros > 32 or at + zeros + order + 1 > 8 * len(data):
            return -1
        value = np.int64(0)
        for _ in range(zeros + order + 1):
            value = value << 1 | ((data[at >> 3] >> (7 - (at & 7))) & 1)
            at += 1
        value -= 1 << order
        if data[0] & DELTA:
            last += value >> 1 if value & 1 == 0 else -(value >> 1) - 1
            value = last
        out[i] = value
    return (at + 7) >> 3
