"""The loops of context-adaptive coding, compiled by numba; with NUMBA_DISABLE_JIT=1 the same Python runs as it stands.

Integers alone, none beyond 2**48, so that every machine makes the same bytes. A symbol becomes bins (is it the centre,
its sign, how far beyond one, ...); each bin has a context, and each context two estimates of the probability of a one
that learn at two rates; a binary range coder writes the bin at their mean.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from featherweight.coding.bits import Ints

ONE = 1 << 16  # a probability of one
LEAST = 48  # no bin is more certain than this, of ONE
TOP = 1 << 24  # the range is kept above this
FLAGS = 14  # greater-than flags before the escape
SIG, SIGN, GREATER, PREFIX = 0, 18, 27, 27 + 6 * FLAGS
CONTEXTS = PREFIX + 20


@njit(cache=True)
def _learn(state: Any, context: int, bit: int, fast: int, slow: int) -> None:
    """Moves both estimates towards the bit; while a context is young both learn as fast as its age allows."""
    age = state[2, context]
    for row, rate in ((0, fast), (1, slow)):
        step = rate if age >= rate else age + 1
        if bit:
            state[row, context] += (ONE - state[row, context]) >> step
        else:
            state[row, context] -= state[row, context] >> step
    if age < 16:
        state[2, context] = age + 1


@njit(cache=True)
def _chance(state: Any, context: int) -> int:
    """The probability of a one, of ONE."""
    p = (state[0, context] + state[1, context]) >> 1
    return min(max(p, LEAST), ONE - LEAST)


@njit(cache=True)
def _fresh() -> Any:
    state = np.full((3, CONTEXTS), ONE >> 1, dtype=np.int64)
    state[2, :] = 0
    return state


@njit(cache=True)
def _near(values: Any, i: int, width: int) -> tuple[int, int, int]:
    """The neighbours of a symbol: the one before, the one before that, in its row; the one above."""
    at = i % width
    left = values[i - 1] if at >= 1 else 0
    beyond = values[i - 2] if at >= 2 else 0
    above = values[i - width] if i >= width else 0
    return left, beyond, above


@njit(cache=True)
def _contexts(left: int, beyond: int, above: int) -> tuple[int, int, int]:
    """Where the significance, the sign and the greater-than flags of a symbol with these neighbours are learned."""
    a, b = min(abs(left), 2), min(abs(above), 2)
    sig = SIG + (a * 3 + b) * 2 + (1 if beyond != 0 else 0)
    sign = SIGN + (1 + np.sign(left)) * 3 + 1 + np.sign(above)
    near = abs(left) + abs(above)
    return sig, sign, GREATER + (0 if near <= 2 else 1 if near <= 6 else 2) * 2 * FLAGS


@njit(cache=True)
def _put(coder: Any, out: Any, bit: int, p: int) -> None:
    """Writes a bin whose chance of being one is p. coder: low, range, the byte held back, how many wait, position."""
    bound = (coder[1] >> 16) * p
    if bit:
        coder[1] = bound
    else:
        coder[0] += bound
        coder[1] -= bound
    while coder[1] < TOP:
        coder[1] <<= 8
        _shift(coder, out)


@njit(cache=True)
def _shift(coder: Any, out: Any) -> None:
    """Moves the highest byte out; bytes of 255 wait until it is known whether a carry comes."""
    if coder[0] < 0xFF000000 or coder[0] >= 1 << 32:
        carry = coder[0] >> 32
        if coder[2] >= 0:
            out[coder[4]] = (coder[2] + carry) & 255
            coder[4] += 1
        for _ in range(coder[3]):
            out[coder[4]] = (255 + carry) & 255
            coder[4] += 1
        coder[3] = 0
        coder[2] = (coder[0] >> 24) & 255
    else:
        coder[3] += 1
    coder[0] = (coder[0] & 0x00FFFFFF) << 8


@njit(cache=True)
def _room(coder: Any, out: Any) -> Any:
    if coder[4] + coder[3] + 64 < len(out):
        return out
    wider = np.zeros(2 * len(out) + coder[3], dtype=np.uint8)
    wider[: len(out)] = out
    return wider


@njit(cache=True)
def _ended(coder: Any, out: Any) -> Any:
    """The fewest bytes that lie in the last interval: everything behind them reads as zero."""
    low, reach = coder[0], coder[0] + coder[1] - 1
    for bits in (24, 16, 8, 0):
        rounded = (reach >> bits) << bits
        if rounded >= low:
            coder[0] = rounded
            break
    for _ in range(5):
        _shift(coder, out)
    return out[: coder[4]]


@njit(cache=True)
def encode(values: Ints, width: int, fast: int, slow: int) -> Any:
    """The bytes of signed values (the centre is 0) in rows of `width`."""
    state, out = _fresh(), np.zeros(len(values) // 4 + 128, dtype=np.uint8)
    coder = np.array([0, 0xFFFFFFFF, -1, 0, 0], dtype=np.int64)
    for i in range(len(values)):
        out = _room(coder, out)
        value = values[i]
        left, beyond, above = _near(values, i, width)
        sig, sign, greater = _contexts(left, beyond, above)
        bit = 1 if value != 0 else 0
        _put(coder, out, bit, _chance(state, sig))
        _learn(state, sig, bit, fast, slow)
        if not bit:
            continue
        bit = 1 if value < 0 else 0
        _put(coder, out, bit, _chance(state, sign))
        _learn(state, sign, bit, fast, slow)
        greater += bit * FLAGS
        rest = abs(value) - 1
        for k in range(FLAGS):
            bit = 1 if rest > k else 0
            _put(coder, out, bit, _chance(state, greater + k))
            _learn(state, greater + k, bit, fast, slow)
            if not bit:
                break
        if rest >= FLAGS:
            _put_escape(state, coder, out, rest - FLAGS + 1, fast, slow)
    return _ended(coder, out)


@njit(cache=True)
def _put_escape(state: Any, coder: Any, out: Any, value: int, fast: int, slow: int) -> None:
    """Exp-Golomb code of order 0 of a value from 1: its length in learned bins, its lower bits as they are."""
    length = 0
    while value >> (length + 1):
        length += 1
    for k in range(length):
        _put(coder, out, 1, _chance(state, PREFIX + k))
        _learn(state, PREFIX + k, 1, fast, slow)
    _put(coder, out, 0, _chance(state, PREFIX + length))
    _learn(state, PREFIX + length, 0, fast, slow)
    for k in range(length - 1, -1, -1):
        _put(coder, out, (value >> k) & 1, ONE >> 1)


@njit(cache=True)
def _get(coder: Any, data: Any, p: int) -> int:
    """Reads a bin. coder: code, range, position and, to be told it, the ideal length so far in 2**-24 bits."""
    bound = (coder[1] >> 16) * p
    if coder[0] < bound:
        coder[1] = bound
        bit = 1
    else:
        coder[0] -= bound
        coder[1] -= bound
        bit = 0
    if len(coder) > 3:
        coder[3] -= np.int64(math.log2((p if bit else ONE - p) / ONE) * (1 << 24))
    while coder[1] < TOP:
        coder[1] <<= 8
        coder[0] = (coder[0] << 8) | (data[coder[2]] if coder[2] < len(data) else 0)
        coder[2] += 1
    return bit


def ready(weigh: bool) -> Ints:
    """The state of a decoder before its first byte, with a place for the ideal length if that is asked for."""
    return np.array([0, 0xFFFFFFFF, 0, 0] if weigh else [0, 0xFFFFFFFF, 0], dtype=np.int64)


@njit(cache=True, nogil=True)
def decode(data: Any, count: int, width: int, fast: int, slow: int, coder: Any) -> Any:
    """`count` signed values, and how many bytes were looked at; -1 where an escape is longer than any symbol.

    Args:
        coder: as `ready` makes it.
    """
    state, values = _fresh(), np.zeros(count, dtype=np.int64)
    for _ in range(4):
        coder[0] = (coder[0] << 8) | (data[coder[2]] if coder[2] < len(data) else 0)
        coder[2] += 1
    for i in range(count):
        left, beyond, above = _near(values, i, width)
        sig, sign, greater = _contexts(left, beyond, above)
        bit = _get(coder, data, _chance(state, sig))
        _learn(state, sig, bit, fast, slow)
        if not bit:
            continue
        negative = _get(coder, data, _chance(state, sign))
        _learn(state, sign, negative, fast, slow)
        greater += negative * FLAGS
        rest = 0
        while rest < FLAGS:
            bit = _get(coder, data, _chance(state, greater + rest))
            _learn(state, greater + rest, bit, fast, slow)
            if not bit:
                break
            rest += 1
        if rest == FLAGS:
            length = 0
            while length < 19:
                bit = _get(coder, data, _chance(state, PREFIX + length))
                _learn(state, PREFIX + length, bit, fast, slow)
                if not bit:
                    break
                length += 1
            if length == 19:
                return values, -1
            value = 1
            for _ in range(length):
                value = value << 1 | _get(coder, data, ONE >> 1)
            rest += value - 1
        values[i] = -(rest + 1) if negative else rest + 1
    return values, coder[2]
