"""The loops of context mixing, compiled by numba; with NUMBA_DISABLE_JIT=1 the same Python runs as it stands.

Integers alone, none beyond 2**63, so that every machine makes the same bytes. A symbol becomes bins; each bin is
foretold by six models, each of which looks at something else of the neighbourhood; what they say is added up in the
logistic domain by two sets of weights that learn on the way, and a binary range coder writes the bin.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from featherweight.coding.bits import Ints
from featherweight.coding.context_kernels import _ended, _get, _put, _room

MODELS = 6
UNARY = 15  # bins that ask "greater?", the first of them being "not the centre?"
SIGN, PREFIX, BINS = UNARY, UNARY + 1, UNARY + 20
BUCKETS = 64
ESCAPE = 19  # the longest prefix of an escape
FULL = 1 << 22  # a model's chance of one
HEAVIEST = 1 << 20  # bound of a weight, in units of 2**-16
OLDEST = 1000  # the age at which a context stops learning more slowly
LARGEST = 1 << 20  # magnitudes beyond are taken for this
# 65536 / (1 + exp(-x / 256)) at x = -2048, -1920, ..., 2048
KNOTS = (
    *(22, 36, 60, 98, 162, 267, 440, 724, 1179, 1921, 3108, 4971, 7812, 11955, 17625, 24743, 32768),
    *(40793, 47911, 53581, 57724, 60565, 62428, 63615, 64357, 64812, 65096, 65269, 65374, 65438, 65476, 65500, 65514),
)
# 256 * ln(t / 64) for t = 0 (taken as 1/2), 1, ..., 15
LOGS = (-1242, -1065, -887, -783, -710, -653, -606, -566, -532, -502, -475, -451, -429, -408, -389, -371)
# a trellis: the state that follows, by the parity of the level
STATES = np.array(
    [
        [[0, 0]] * 8,
        [[0, 1], [2, 3], [1, 0], [3, 2], *[[0, 0]] * 4],
        [[0, 2], [7, 5], [1, 3], [6, 4], [2, 0], [5, 7], [3, 1], [4, 6]],
    ],
    dtype=np.int64,
)


def _tables() -> tuple[Ints, Ints, Ints]:
    """Squash (index x + 2048), its inverse by steps of 16, and the weight of a new bit by age."""
    x = np.arange(4096)
    knots, i, w = np.array(KNOTS, dtype=np.int64), x >> 7, x & 127
    squash = (knots[i] * (128 - w) + knots[i + 1] * w) >> 7
    stretch = np.minimum(np.searchsorted(squash, np.arange(4096) * 16 + 8), 4095) - 2048
    rates = 655360 // (10 * np.arange(1024) + 16)
    return squash, np.clip(stretch, -2047, 2047).astype(np.int64), rates.astype(np.int64)


SQUASH, STRETCH, RATES = _tables()


class Mixer(NamedTuple):
    """What is learned: chances of the models' contexts, their ages, weights; and scratch for the bin at hand."""

    chance: Any  # (MODELS, contexts)
    age: Any
    weight: Any  # (2, sets, MODELS)
    said: Any  # (MODELS + 2): what each model says, and the two sums
    start: Any  # (MODELS): logits at which the contexts of this symbol start
    place: Any  # (MODELS + 2): the first context of each model, the two sets of weights


@njit(cache=True)
def fresh() -> Any:
    contexts = BUCKETS * 2 * BINS
    weight = np.full((2, 32 * BINS, MODELS), 11141, dtype=np.int64)
    zeros = np.zeros((MODELS, contexts), dtype=np.int32)
    lists = np.zeros((3, MODELS + 2), dtype=np.int64)
    return Mixer(zeros, zeros.copy(), weight, lists[0], lists[1], lists[2])


@njit(cache=True)
def _clamped(x: int, bound: int) -> int:
    return min(max(x, -bound), bound)


@njit(cache=True)
def _foretell(mixer: Any, bin: int, lift: int) -> int:
    """The chance of a one, of 2**16; contexts that are new start `lift` above their model's logit."""
    first = second = 0
    for j in range(MODELS):
        k = mixer.place[j] + bin
        if mixer.age[j, k] == 0:
            mixer.chance[j, k] = SQUASH[_clamped(mixer.start[j] + lift, 1536) + 2048] << 6
            mixer.age[j, k] = 8
        mixer.said[j] = STRETCH[mixer.chance[j, k] >> 10]
        first += mixer.said[j] * mixer.weight[0, mixer.place[MODELS] + bin, j]
        second += mixer.said[j] * mixer.weight[1, mixer.place[MODELS + 1] + bin, j]
    first, second = _clamped(first >> 16, 2047), _clamped(second >> 16, 2047)
    mixer.said[MODELS], mixer.said[MODELS + 1] = first, second
    return SQUASH[((first + second) >> 1) + 2048]


@njit(cache=True)
def _learn(mixer: Any, bin: int, bit: int, pace: int) -> None:
    first = ((bit << 16) - SQUASH[mixer.said[MODELS] + 2048]) * pace
    second = ((bit << 16) - SQUASH[mixer.said[MODELS + 1] + 2048]) * pace
    one, other = mixer.place[MODELS] + bin, mixer.place[MODELS + 1] + bin
    for j in range(MODELS):
        k = mixer.place[j] + bin
        said = mixer.said[j]
        mixer.weight[0, one, j] = _clamped(mixer.weight[0, one, j] + ((said * first + (1 << 17)) >> 18), HEAVIEST)
        mixer.weight[1, other, j] = _clamped(mixer.weight[1, other, j] + ((said * second + (1 << 17)) >> 18), HEAVIEST)
        chance, age = mixer.chance[j, k], mixer.age[j, k]
        mixer.chance[j, k] = min(max(chance + (((bit * FULL - chance) * RATES[age]) >> 16), 64), FULL - 64)
        mixer.age[j, k] = min(age + 1, OLDEST)


# --- the neighbourhood ------------------------------------------------------------------------------------------------


@njit(cache=True)
def bucket(x: int, steps: int) -> int:
    """A logarithmic scale: `steps` to an octave, x itself below twice as many."""
    octave = 0
    while x >= 2 * steps:
        x >>= 1
        octave += 1
    return min(octave * steps + x, BUCKETS - 1)


@njit(cache=True)
def _logit(at: int) -> int:
    """256 * ln of the mean magnitude that falls into a bucket (of 8 steps, in units of 1 / 64)."""
    return LOGS[at] if at < 16 else LOGS[8 + at % 8] + 177 * (at // 8 - 1)


class Seen(NamedTuple):
    """What was coded so far. Sizes are counted in halves of 2**shift steps; sums of them in 1 / 256 of as much."""

    values: Any
    sizes: Any
    columns: Any  # (width + 2): sums by column
    inputs: Any  # (width // kernel): sums by column of kernels
    places: Any  # (kernel): sums by place in the kernel
    totals: Any  # all, this row, a running mean, the state of the trellis


@njit(cache=True)
def unseen(count: int, width: int, kernel: int, mean: int) -> Any:
    reach = min(width, count)
    values, sizes = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int32)
    columns, inputs = np.zeros(reach + 2, dtype=np.int64), np.zeros(reach // kernel + 1, dtype=np.int64)
    totals = np.array([0, 0, mean, 0], dtype=np.int64)
    return Seen(values, sizes, columns, inputs, np.zeros(min(kernel, count), dtype=np.int64), totals)


@njit(cache=True)
def _look(mixer: Any, seen: Any, i: int, width: int, kernel: int, mean: int, odd: int) -> None:
    """Chooses the contexts of a symbol's magnitude; what is known of few symbols leans on the mean of all."""
    row, column = i // width, i % width
    place, which = column % kernel, column // kernel
    overall = max((seen.totals[0] + 32 * mean) // (i + 32), 4)
    if column == 0:
        seen.totals[1] = 0
    along = (seen.totals[1] + 4 * overall) // (column + 4)
    down = (seen.columns[column + 1] + overall) // (row + 1)
    if kernel > 1:
        inputs = (seen.inputs[which] + 2 * overall) // (row * kernel + place + 2)
    else:
        near = seen.columns[column] + 2 * seen.columns[column + 1] + seen.columns[column + 2]
        inputs = (near + 2 * overall) // (4 * row + 2)
    places = (seen.places[place] + 2 * overall) // (row * (width // kernel) + which + 2)
    both = along * down // overall
    left = seen.sizes[i - 1] if column >= 1 else 0
    beyond = seen.sizes[i - kernel] if column >= kernel else 0
    above = seen.sizes[i - width] if row else 0
    close = min((left + 1) // 2, 3) * 16 + min((above + 1) // 2, 3) * 4 + min((beyond + 1) // 2, 3)
    found = (along, down, seen.totals[2], both, along * inputs // overall * places // overall)
    for j in range(MODELS - 1):
        at = bucket(found[j] >> 2, 8)
        mixer.start[j] = _logit(at)
        mixer.place[j] = (2 * at + odd) * BINS
    mixer.start[MODELS - 1] = mixer.start[0]
    mixer.place[MODELS - 1] = (2 * close + odd) * BINS
    mixer.place[MODELS] = odd * BINS
    mixer.place[MODELS + 1] = (2 * min(bucket(both >> 2, 2), 15) + odd) * BINS


@njit(cache=True)
def _look_for_sign(mixer: Any, seen: Any, i: int, width: int, kernel: int, odd: int) -> None:
    """Chooses the contexts of a symbol's sign: the signs of its neighbours, its magnitude is not yet there."""
    column = i % width
    left = 1 + np.sign(seen.values[i - 1]) if column >= 1 else 1
    second = 1 + np.sign(seen.values[i - 2]) if column >= 2 else 1
    beyond = 1 + np.sign(seen.values[i - kernel]) if column >= kernel else 1
    above = 1 + np.sign(seen.values[i - width]) if i >= width else 1
    higher = 1 + np.sign(seen.values[i - 2 * width]) if i >= 2 * width else 1
    found = (
        left * 3 + second,
        beyond * 3 + above,
        above * 3 + higher,
        left * 3 + above,
        (left * 3 + beyond) * 3 + above,
        0,
    )
    for j in range(MODELS):
        mixer.start[j] = 0
        mixer.place[j] = 2 * found[j] * BINS
    mixer.place[MODELS], mixer.place[MODELS + 1] = 0, 0


@njit(cache=True)
def _note(seen: Any, i: int, value: int, width: int, kernel: int, trellis: int, shift: int) -> None:
    """Adds a symbol to what was seen."""
    column, state = i % width, seen.totals[3]
    odd = state & 1
    size = min((2 * abs(value) - (odd if value != 0 else 0)) >> shift, LARGEST)
    seen.values[i], seen.sizes[i] = value, size
    if trellis:
        seen.values[i] = 2 * value - odd * np.sign(value)
    size *= 128
    seen.columns[column + 1] += size
    seen.inputs[column // kernel] += size
    seen.places[column % kernel] += size
    seen.totals[0] += size
    seen.totals[1] += size
    seen.totals[2] += (size - seen.totals[2]) >> 2 if size > seen.totals[2] else -((seen.totals[2] - size) >> 2)
    seen.totals[3] = STATES[trellis, state, abs(value) & 1]


@njit(cache=True)
def _lift(bin: int, odd: int) -> int:
    """By how much the logit of a bin lies above that of its mean, for a two-sided geometric distribution."""
    return 102 + 179 * odd if bin == 0 else -90


@njit(cache=True)
def levels(whole: Ints, trellis: int) -> Any:
    """The levels of a trellis whose points are `whole`, and whether it has such points at all."""
    found, state = np.zeros(len(whole), dtype=np.int64), 0
    for i in range(len(whole)):
        odd, size = state & 1, abs(whole[i])
        if size and (size & 1) != odd:
            return found, False
        level = (size + odd) >> 1
        found[i] = level if whole[i] > 0 else -level
        state = STATES[trellis, state, level & 1]
    return found, True


@njit(cache=True)
def states(found: Ints, trellis: int) -> Any:
    """The state of a trellis before each of its levels."""
    out, state = np.zeros(len(found), dtype=np.int64), 0
    for i in range(len(found)):
        out[i] = state
        state = STATES[trellis, state, abs(found[i]) & 1]
    return out


# --- the two directions -----------------------------------------------------------------------------------------------


@njit(cache=True)
def started() -> Any:
    """A range coder that has written nothing: low, range, the byte held back, how many wait, position."""
    return np.array([0, 0xFFFFFFFF, -1, 0, 0], dtype=np.int64)


@njit(cache=True)
def open_coder(coder: Any, data: Any) -> None:
    """Reads what a range decoder must know before the first bin."""
    for _ in range(4):
        coder[0] = (coder[0] << 8) | (data[coder[2]] if coder[2] < len(data) else 0)
        coder[2] += 1


@njit(cache=True, nogil=True)
def encode(values: Ints, head: Any) -> Any:
    """The bytes of signed values (the centre is 0), or of the levels of a trellis.

    Args:
        head: width of a row, length of a kernel, number of the trellis, shift, mean size, pace.
    """
    coder = started()
    return _ended(coder, put_values(coder, np.zeros(len(values) // 4 + 128, dtype=np.uint8), fresh(), values, head))


@njit(cache=True, nogil=True)
def put_values(coder: Any, out: Any, mixer: Any, values: Ints, head: Any) -> Any:
    """Writes values behind what the coder wrote before; the bytes, which may have had to grow."""
    width, kernel, trellis, shift, mean, pace = head
    seen = unseen(len(values), width, kernel, mean)
    for i in range(len(values)):
        out = _room(coder, out)
        value, odd = values[i], seen.totals[3] & 1
        size = abs(value)
        _look(mixer, seen, i, width, kernel, mean, odd)
        # not zero comes first, so that the unary part tells (|v| - 1) >> shift
        rest = -1 if size == 0 else (size - 1) >> shift
        for b in range(UNARY):
            bit = 1 if rest >= b else 0
            _put(coder, out, bit, _foretell(mixer, b, _lift(b, odd)))
            _learn(mixer, b, bit, pace)
            if not bit:
                break
        if rest >= UNARY - 1:
            _put_escape(mixer, coder, out, rest - UNARY + 2, pace)
        if size:
            for k in range(shift - 1, -1, -1):
                _put(coder, out, ((size - 1) >> k) & 1, 1 << 15)
            _look_for_sign(mixer, seen, i, width, kernel, odd)
            bit = 1 if value < 0 else 0
            _put(coder, out, bit, _foretell(mixer, SIGN, 0))
            _learn(mixer, SIGN, bit, pace)
        _note(seen, i, value, width, kernel, trellis, shift)
    return out


@njit(cache=True)
def _put_escape(mixer: Any, coder: Any, out: Any, value: int, pace: int) -> None:
    """Exp-Golomb code of order 0 of a value from 1: its length in learned bins, its lower bits as they are."""
    length = 0
    while value >> (length + 1):
        length += 1
    for k in range(length + 1):
        bit = 1 if k < length else 0
        _put(coder, out, bit, _foretell(mixer, PREFIX + k, 0))
        _learn(mixer, PREFIX + k, bit, pace)
    for k in range(length - 1, -1, -1):
        _put(coder, out, (value >> k) & 1, 1 << 15)


@njit(cache=True, nogil=True)
def decode(data: Any, count: int, head: Any, coder: Any) -> Any:
    """`count` signed values (the points of a trellis), and how many bytes were looked at; -1 where an escape is
    longer than any symbol, or the bytes end too early.

    Args:
        coder: as `ready` makes it.
    """
    open_coder(coder, data)
    return get_values(coder, data, fresh(), count, head)


@njit(cache=True, nogil=True)
def get_values(coder: Any, data: Any, mixer: Any, count: int, head: Any) -> Any:
    """What `put_values` wrote, as `decode` gives it."""
    width, kernel, trellis, shift, mean, pace = head
    seen = unseen(count, width, kernel, mean)
    for i in range(count):
        if coder[2] > len(data) + 4:  # a writer leaves out four bytes at most
            return seen.values, -1
        odd = seen.totals[3] & 1
        _look(mixer, seen, i, width, kernel, mean, odd)
        rest = 0
        while rest < UNARY:
            bit = _get(coder, data, _foretell(mixer, rest, _lift(rest, odd)))
            _learn(mixer, rest, bit, pace)
            if not bit:
                break
            rest += 1
        value = rest
        if rest == UNARY:
            extra = _get_escape(mixer, coder, data, pace)
            if extra < 0:
                return seen.values, -1
            value += extra - 1
        if value:
            value -= 1
            for _ in range(shift):
                value = value << 1 | _get(coder, data, 1 << 15)
            _look_for_sign(mixer, seen, i, width, kernel, odd)
            bit = _get(coder, data, _foretell(mixer, SIGN, 0))
            _learn(mixer, SIGN, bit, pace)
            value = -value - 1 if bit else value + 1
        _note(seen, i, value, width, kernel, trellis, shift)
    return seen.values, coder[2] if coder[2] <= len(data) + 4 else -1


@njit(cache=True)
def _get_escape(mixer: Any, coder: Any, data: Any, pace: int) -> int:
    length = 0
    while length < ESCAPE:
        bit = _get(coder, data, _foretell(mixer, PREFIX + length, 0))
        _learn(mixer, PREFIX + length, bit, pace)
        if not bit:
            break
        length += 1
    if length == ESCAPE:
        return -1
    value = 1
    for _ in range(length):
        value = value << 1 | _get(coder, data, 1 << 15)
    return value
