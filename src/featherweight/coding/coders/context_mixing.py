"""Context mixing of integer weights: several adaptive models foretell each bin, and what they say is added up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from featherweight.catalogue import recipe
from featherweight.coding.bits import Ints, Reader, varint
from featherweight.errors import FormatError

PACES = (6, 12, 24, 48)  # how fast the weights of the mixer learn in the end
USUAL = 1  # the pace of long streams
MANY = 3  # mean magnitude from which they have a slower one
GLANCE = 1 << 15  # symbols that are looked at to find kernels in the rows of a matrix
PAYS = 6  # bytes that must be gained by it
SHORT = 1 << 14  # symbols up to which every pace is tried
FEWEST = 32  # symbols from which a trellis is looked for
SMALL = 8  # mean magnitude up to which every bit of a symbol is modelled
TRELLISES = (0, 4, 8)  # states of the quantizer, by their number in the file


@recipe(
    paper="Mahoney, Florida Institute of Technology CS-2005-16, 2005; Kirchhoffer et al., IEEE TCSVT 2022",
    family="code",
    kind="coder",
    aliases=("cm",),
)
def context_mixing(symbols: Ints, size: int, widths: Sequence[int] = (), zero: int | None = None) -> bytes:
    """Eight models of a weight's neighbourhood, mixed in the logistic domain by weights that learn on the way.

    A symbol is told by its distance from the most frequent one: whether it is that one, flags for greater than 1 to
    14, an Exp-Golomb code beyond, the sign. The models look at the mean magnitude of the row so far, of the column in
    the rows above (of the columns beside it, or of all kernels of the same input), of the last few weights, of the
    place in the kernel, at products of these, and at neighbours, in a kernel those to the left and above. Before
    anything was learned they foretell a two-sided geometric distribution of that mean. A sign is foretold from twelve
    signed neighbours too. Rows of a matrix are seen as square kernels where that pays: behind a convolution they are.

    Args:
        widths: the length of a row and, if there is one, of a kernel in it, and of a line of that.
        zero: the symbol that stands for zero on an integer grid. Where all integers turn out to be those of dependent
            quantization with 8 or 4 states, levels are coded, and the state of the trellis is part of every context.

    Departs from the paper: binary decisions and the mixer are those of the context-mixing compressors, the binarisation
    and the trellis states that of neural network coding (ISO/IEC 15938-17); mean magnitudes as contexts are our own.
    """
    from featherweight.coding.mixing_kernels import encode, levels

    trellis = 0 if zero is None or not 0 <= zero <= 1 << 17 else trellis_of(symbols.astype(np.int64) - zero)
    centre = _centre(symbols) if not trellis or zero is None else zero
    values = symbols.astype(np.int64) - centre
    values = levels(values, trellis)[0] if trellis else values
    width, kernel, line = _rows(len(values), widths)
    shift, mean = shift_of(values)
    if kernel == 1 and len(widths) == 1:
        kernel, line = fold_of(values, width, trellis)
    made = []
    for more in (shift, shift + 1) if shift and len(values) <= SHORT else (shift,):
        level = nearest_level(2 * mean / (1 << more))
        for number in paces_for(len(values), mean):
            head = bytes([more | trellis << 5, level | number << 6])
            code = encode(values, (width, kernel, line, trellis, more, mean_of(level), PACES[number]))
            made.append(varint(centre) + varint(width) + varint(kernel) + varint(line) + head + _sized(code))
    return min(made, key=len)


def _centre(symbols: Ints) -> int:
    """The most frequent symbol; the median where none is frequent."""
    if not len(symbols):
        return 0
    counts = np.bincount(symbols)
    often = int(counts.argmax())
    return often if counts[often] * 32 > len(symbols) else int(np.sort(symbols)[len(symbols) // 2])


def trellis_of(whole: Ints) -> int:
    """The number of the trellis whose points these are, 0 if they are any integers."""
    from featherweight.coding.mixing_kernels import levels

    if len(whole) < FEWEST:
        return 0
    return next((number for number in (2, 1) if (whole & 1).any() and levels(whole, number)[1]), 0)


def shift_of(values: Ints) -> tuple[int, float]:
    """How many low bits of large values are not modelled, and their mean magnitude."""
    mean = float(np.abs(values).mean()) if len(values) else 0.0
    return (max(int(mean / SMALL * 2).bit_length() - 1, 0) if mean > SMALL else 0), mean


def paces_for(count: int, mean: float) -> tuple[int, ...]:
    """The paces that are tried, by number: for long streams one, a slow one where there are many bins to a symbol."""
    return tuple(range(len(PACES))) if count <= SHORT else (0,) if mean > MANY else (USUAL,)


def _rows(count: int, widths: Sequence[int]) -> tuple[int, int, int]:
    """The length of a row, of a kernel in it, and of a line of that."""
    row = next((w for w in widths if 0 < w < count), max(count, 1))
    kernel = next((w for w in widths[1:2] if 0 < w <= row and row % w == 0), 1)
    return row, kernel, next((w for w in widths[2:] if 0 < w <= kernel and kernel % w == 0), 1)


def fold_of(values: Ints, width: int, trellis: int) -> tuple[int, int]:
    """The square kernels that the rows of a matrix are best seen as, and their lines; 1 and 1 for none."""
    from featherweight.coding.mixing_kernels import encode

    some = values[:GLANCE]
    squares = [(side * side, side) for side in range(2, 9) if width % (side * side) == 0 and width > side * side]
    if not squares or not some.any():
        return 1, 1
    shift, mean = shift_of(some)
    level = mean_of(nearest_level(2 * mean / (1 << shift)))
    sizes = {
        fold: len(encode(some, (width, *fold, trellis, shift, level, PACES[USUAL]))) for fold in [(1, 1), *squares]
    }
    best = min(sizes, key=lambda fold: sizes[fold])
    return best if sizes[best] + PAYS <= sizes[1, 1] else (1, 1)


def mean_of(level: int) -> int:
    """The mean magnitude, in units of 1 / 256, that stands for a level from 0 to 63: eight levels to an octave."""
    return 4 * (level if level < 16 else (8 + level % 8) << (level // 8 - 1))


def nearest_level(halves: float) -> int:
    """The level of a mean magnitude that is given in halves of a step."""
    return min(range(64), key=lambda level: abs(mean_of(level) - 128 * halves))


def _sized(code: np.ndarray) -> bytes:
    data = code.tobytes()
    kept = data[: max(len(data) - 4, 0)] + data[-4:].rstrip(b"\0")  # what is not there reads as zero
    return varint(len(kept)) + kept


def context_mixing_decode(reader: Reader, count: int, size: int) -> Ints:
    """`count` symbols below `size`.

    Raises:
        FormatError: the code is none that a writer makes.
    """
    from featherweight.coding.context_kernels import ready
    from featherweight.coding.mixing_kernels import decode

    centre, width, kernel, line = reader.varint(), reader.varint(), reader.varint(), reader.varint()
    first, second = reader.byte(), reader.byte()
    data = reader.code(reader.varint())
    shift, trellis = first & 31, first >> 5
    rows = 0 < width < 1 << 48 and 0 < kernel <= width and width % kernel == 0
    rows = rows and 0 < line <= kernel and kernel % line == 0
    outside = data[:4] == b"\xff" * 4  # such a code lies beyond the first range, and would grow without end
    if centre >= size or not rows or shift > 16 or trellis >= len(TRELLISES) or outside:
        raise FormatError("the file is corrupt: the head of a context-mixing code is impossible")
    code = np.frombuffer(data, dtype=np.uint8)
    head, state = (width, kernel, line, trellis, shift, mean_of(second & 63), PACES[second >> 6]), ready(reader.weigh)
    values, used = decode(code, count, head, state)
    reader.spare += len(data) - state[3] / (8 << 24) if reader.weigh else 0
    symbols = values + centre
    if used < len(data) or (count and not 0 <= int(symbols.min()) <= int(symbols.max()) < size):
        raise FormatError("the file is corrupt: a context-mixing code goes on, or leaves its alphabet")
    return np.asarray(symbols, dtype=np.int64)
