"""The loops of context mixing, compiled by numba; with NUMBA_DISABLE_JIT=1 the same Python runs as it stands.

Integers alone, none beyond 2**63, so that every machine makes the same bytes. A symbol becomes bins; each bin is
foretold by eight models, each of which looks at something else of the neighbourhood; what they say is added up in the
logistic domain by two sets of weights that learn on the way, and a binary range coder writes the bin.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from featherweight.coding.bits import Ints
from featherweight.coding.context_kernels import _ended, _get, _put, _room

MODELS = 8
FULL_STATE = (True, False, False, True, False, True, False, True)  # models that look at the whole state of a trellis
UNARY = 15  # bins that ask "greater?", the first of them being "not the centre?"
SIGN, PREFIX, BINS = UNARY, UNARY + 1, UNARY + 20
BUCKETS = 64
ESCAPE = 19  # the longest prefix of an escape
FULL = 1 << 22  # a model's chance of one
HEAVIEST = 1 << 20  # bound of a weight, in units of 2**-16
YOUNG, OLDEST = 3, 1000  # the age of a new context, and that at which it stops learning more slowly
LARGEST = 1 << 14  # sizes beyond are taken for this: products of three means stay below 2**63
MOST = (1 << 16) - 1  # how often a set of weights is counted
EDGE = 2815  # logits go no further, in 1 / 256
CERTAIN = 256  # the input that is always the same
NEIGHBOURS = 12  # signed weights that a sign is foretold from
LEANING = 20000  # their weight for the two nearest in a kernel, of 65536
# 65536 / (1 + exp(-x / 256)) at x = -2816, -2688, ..., 0
LOWER = (
    1,
    2,
    3,
    5,
    8,
    13,
    22,
    36,
    60,
    98,
    162,
    267,
    440,
    724,
    1179,
    1921,
    3108,
    4971,
    7812,
    11955,
    17625,
    24743,
    32768,
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


def _tables() -> tuple[Any, Any, Any, Any]:
    """Squash (index x + EDGE), its inverse, the weight of a new bit by age, what is added to a pace by use."""
    x = np.arange(1, 2 * EDGE + 2)
    knots, i, w = np.array([*LOWER, *((1 << 16) - k for k in LOWER[-2::-1])], dtype=np.int64), x >> 7, x & 127
    squash = (knots[i] * (128 - w) + knots[i + 1] * w) >> 7
    stretch = np.minimum(np.searchsorted(squash, np.arange(1 << 16), side="right"), 2 * EDGE) - EDGE
    rates = 655360 // (10 * np.arange(1024) + 16)
    haste = 95200 // (700 + np.arange(MOST + 1))
    return squash.astype(np.int32), stretch.astype(np.int16), rates.astype(np.int32), haste.astype(np.int16)


SQUASH, STRETCH, RATES, HASTE = _tables()


class Mixer(NamedTuple):
    """What is learned: chances of the models' contexts, their ages, weights; and scratch for the bin at hand."""

    cells: Any  # (MODELS, contexts, 2): chance and age
    weight: Any  # (2, sets, MODELS + 1)
    used: Any  # (2, sets): how often
    said: Any  # (MODELS + 3): what each model says, what is always said, the two sums
    start: Any  # (MODELS): logits at which the contexts of this symbol start
    place: Any  # (MODELS + 2): the first context of each model, the two sets of weights
    near: Any  # (2, NEIGHBOURS): signed neighbours and their weights


@njit(cache=True)
def fresh() -> Any:
    cells = np.zeros((MODELS, BUCKETS * 8 * BINS, 2), dtype=np.int32)
    weight = np.full((2, 32 * BINS, MODELS + 1), 8400, dtype=np.int64)
    weight[:, :, MODELS] = 0
    lists = np.zeros((3, MODELS + 3), dtype=np.int64)
    lists[0, MODELS] = CERTAIN
    used = np.zeros((2, 32 * BINS), dtype=np.int64)
    return Mixer(cells, weight, used, lists[0], lists[1], lists[2], np.zeros((2, NEIGHBOURS), dtype=np.int64))


@njit(cache=True)
def _clamped(x: int, bound: int) -> int:
    return min(max(x, -bound), bound)


@njit(cache=True)
def _foretell(mixer: Any, bin: int, lift: int) -> int:
    """The chance of a one, of 2**16; contexts that are new start `lift` above their model's logit."""
    said, place, cells = mixer.said, mixer.place, mixer.cells
    one, other = mixer.weight[0, place[MODELS] + bin], mixer.weight[1, place[MODELS + 1] + bin]
    for j in range(MODELS):
        cell = cells[j, place[j] + bin]
        if cell[1] == 0:
            cell[0] = SQUASH[_clamped(mixer.start[j] + lift, 1536) + EDGE] << 6
            cell[1] = YOUNG
        said[j] = STRETCH[cell[0] >> 6]
    first = second = 0
    for j in range(MODELS + 1):
        first += said[j] * one[j]
        second += said[j] * other[j]
    if bin == SIGN:
        for j in range(NEIGHBOURS):
            x = mixer.near[0, j] * mixer.near[1, j]
            first += x
            second += x
    first, second = _clamped(first >> 16, EDGE), _clamped(second >> 16, EDGE)
    said[MODELS + 1], said[MODELS + 2] = first, second
    chance: int = np.int64(SQUASH[((first + second) >> 1) + EDGE])  # type: ignore[assignment]
    return chance


@njit(cache=True)
def _learn(mixer: Any, bin: int, bit: int, pace: int) -> None:
    said, one, other = mixer.said, mixer.place[MODELS] + bin, mixer.place[MODELS + 1] + bin
    first = (((bit << 16) - SQUASH[said[MODELS + 1] + EDGE]) * (pace + HASTE[mixer.used[0, one]])) >> 4
    second = (((bit << 16) - SQUASH[said[MODELS + 2] + EDGE]) * (pace + HASTE[mixer.used[1, other]])) >> 4
    mixer.used[0, one] = min(mixer.used[0, one] + 1, MOST)
    mixer.used[1, other] = min(mixer.used[1, other] + 1, MOST)
    weight, weights = mixer.weight[0, one], mixer.weight[1, other]
    for j in range(MODELS + 1):
        weight[j] = min(max(weight[j] + ((said[j] * first + (1 << 17)) >> 18), -HEAVIEST), HEAVIEST)
    for j in range(MODELS + 1):
        weights[j] = min(max(weights[j] + ((said[j] * second + (1 << 17)) >> 18), -HEAVIEST), HEAVIEST)
    for j in range(MODELS):
        cell = mixer.cells[j, mixer.place[j] + bin]
        chance, age = np.int64(cell[0]), cell[1]
        cell[0] = min(max(chance + (((bit * FULL - chance) * RATES[age]) >> 16), 64), FULL - 64)
        cell[1] = min(age + 1, OLDEST)
    if bin == SIGN:
        both = (first + second) >> 1
        for j in range(NEIGHBOURS):
            moved = mixer.near[1, j] + ((24 * mixer.near[0, j] * both + (1 << 19)) >> 20)
            mixer.near[1, j] = _clamped(moved, HEAVIEST)


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
def unseen(mixer: Any, count: int, width: int, kernel: int, line: int, mean: int) -> Any:
    reach = min(width, count)
    values, sizes = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int32)
    columns, inputs = np.zeros(reach + 2, dtype=np.int64), np.zeros(reach // kernel + 1, dtype=np.int64)
    totals = np.array([0, 0, mean, 0], dtype=np.int64)
    mixer.near[1] = 0
    if line > 1:
        mixer.near[1, :2] = LEANING
    return Seen(values, sizes, columns, inputs, np.zeros(min(kernel, count), dtype=np.int64), totals)


@njit(cache=True)
def _look(mixer: Any, seen: Any, i: int, rows: Any, mean: int, state: int) -> None:
    """Chooses the contexts of a symbol's magnitude; what is known of few symbols leans on the mean of all.

    Args:
        rows: the length of a row, of a kernel in it, of a line of that.
    """
    width, kernel, line = rows
    row, column = i // width, i % width
    place, which, odd, sizes = column % kernel, column // kernel, state & 1, seen.sizes
    overall = max((seen.totals[0] + 32 * mean) // (i + 32), 4)
    if column == 0:
        seen.totals[1] = 0
    along = (seen.totals[1] + 4 * overall) // (column + 4)
    down = (seen.columns[column + 1] + overall) // (row + 1)
    if kernel > 1:
        inputs = (seen.inputs[which] + 2 * overall) // (row * kernel + place + 2)
    else:
        beside = seen.columns[column] + 2 * seen.columns[column + 1] + seen.columns[column + 2]
        inputs = (beside + 2 * overall) // (4 * row + 2)
    places = (seen.places[place] + 2 * overall) // (row * (width // kernel) + which + 2)
    both = along * down // overall
    left = np.int64(sizes[i - 1]) if column >= 1 else 0
    beyond = np.int64(sizes[i - kernel]) if column >= kernel else 0
    above = np.int64(sizes[i - width]) if row else 0
    if line > 1:
        left = left if place % line else 0
        upper = np.int64(sizes[i - line]) if place >= line else 0
        corner = np.int64(sizes[i - line - 1]) if place >= line and place % line else 0
        near = (3 * ((4 * left + 4 * upper + 2 * corner + 2 * beyond) * 128 // 12) + both) // 4
    else:
        upper = above
        second = np.int64(sizes[i - 2]) if column >= 2 else 0
        higher = np.int64(sizes[i - 2 * width]) if row > 1 else 0
        near = (256 * (left + above + beyond) + 128 * (second + higher) + 4 * both) // 12
    close = min((left + 1) // 2, 3) * 16 + min((upper + 1) // 2, 3) * 4 + min((beyond + 1) // 2, 3)
    product = along * inputs // overall * places // overall
    pair = min(bucket(along >> 2, 1), 7) * 8 + min(bucket(down >> 2, 1), 7)
    found = (along, down, seen.totals[2], both, product, along, near, both)
    for j in range(MODELS):
        at = bucket(found[j] >> 2, 8)
        mixer.start[j] = _logit(at)
        context = close if j == 5 else pair if j == 7 else at
        mixer.place[j] = (8 * context + (state if FULL_STATE[j] else odd)) * BINS
    mixer.place[MODELS] = odd * BINS
    mixer.place[MODELS + 1] = (2 * min(bucket(both >> 2, 2), 15) + odd) * BINS


@njit(cache=True)
def _look_for_sign(mixer: Any, seen: Any, i: int, rows: Any, size: int) -> None:
    """Chooses the contexts of a symbol's sign: the signs of its neighbours; those beside it in a kernel, if it has one
    of two dimensions."""
    width, kernel, line = rows
    row, column, near, values = i // width, i % width, mixer.near[0], seen.values
    place = column % kernel
    near[:] = 0
    if line > 1:
        down, right = place // line, place % line
        near[0] = values[i - 1] if right else 0
        near[1] = values[i - line] if down else 0
        near[2] = values[i - line - 1] if down and right else 0
        near[3] = values[i - line + 1] if down and right + 1 < line else 0
        near[8] = values[i - 2] if right >= 2 else 0
        near[9] = values[i - 2 * line] if down >= 2 else 0
    else:
        near[0] = values[i - 1] if column >= 1 else 0
        near[1] = values[i - 2] if column >= 2 else 0
    near[4] = values[i - kernel] if column >= kernel else 0
    near[10] = values[i - 2 * kernel] if column >= 2 * kernel else 0
    near[5] = values[i - width] if row >= 1 else 0
    near[6] = values[i - 2 * width] if row >= 2 else 0
    near[7] = values[i - 3 * width] if row >= 3 else 0
    first, second, corner, left = 1 + np.sign(near[0]), 1 + np.sign(near[1]), 1 + np.sign(near[2]), 0
    beyond, above, higher = 1 + np.sign(near[4]), 1 + np.sign(near[5]), 1 + np.sign(near[6])
    left = 1 + (np.sign(values[i - 1]) if column >= 1 else 0)
    far = (9 * above + 3 * higher + left, min(column // kernel, 60))
    if line > 1:
        five = (
            3 * first + second,
            9 * first + 3 * second + corner,
            3 * second + beyond,
            9 * first + 3 * second + beyond,
        )
    else:
        five = (3 * first + second, 3 * above + higher, 3 * first + above, 9 * first + 3 * beyond + above)
    found = (five[0], 3 * beyond + above, five[1], five[2], five[3], 0, far[0], far[1])
    for j in range(NEIGHBOURS):
        near[j] = -_clamped(128 * near[j], 384)
    for j in range(MODELS):
        mixer.start[j] = 0
        mixer.place[j] = 8 * found[j] * BINS
    mixer.place[MODELS], mixer.place[MODELS + 1] = 0, min(size - 1, 3) * BINS


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
        head: width of a row, length of a kernel, and of a line in it (1 if it has one dimension), number of the
            trellis, shift, mean size, pace.
    """
    coder = started()
    return _ended(coder, put_values(coder, np.zeros(len(values) // 4 + 128, dtype=np.uint8), fresh(), values, head))


@njit(cache=True, nogil=True)
def put_values(coder: Any, out: Any, mixer: Any, values: Ints, head: Any) -> Any:
    """Writes values behind what the coder wrote before; the bytes, which may have had to grow."""
    width, kernel, line, trellis, shift, mean, pace = head
    seen = unseen(mixer, len(values), width, kernel, line, mean)
    for i in range(len(values)):
        out = _room(coder, out)
        value, state = values[i], seen.totals[3]
        odd = state & 1
        size = abs(value)
        _look(mixer, seen, i, (width, kernel, line), mean, state)
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
            _look_for_sign(mixer, seen, i, (width, kernel, line), size)
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
    width, kernel, line, trellis, shift, mean, pace = head
    seen = unseen(mixer, count, width, kernel, line, mean)
    for i in range(count):
        if coder[2] > len(data) + 4:  # a writer leaves out four bytes at most
            return seen.values, -1
        state = seen.totals[3]
        odd = state & 1
        _look(mixer, seen, i, (width, kernel, line), mean, state)
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
            _look_for_sign(mixer, seen, i, (width, kernel, line), value + 1)
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
