"""Counts of common bits of packed words, added to sums, or of different bits, taken off; sixteen lanes at a time.

The inner loop is given to LLVM as vectors of eight words: with AVX512-VPOPCNTDQ each is one instruction, elsewhere LLVM
puts in what the machine has. With NUMBA_DISABLE_JIT=1 the Python beside it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

LANES = 16  # words counted side by side: two vectors
ROWS = 4  # rows that one pass over the lanes serves, so that 8 sums and 2 vectors of lanes stay in registers
VECTOR = 8  # words of a vector
WORD = ir.IntType(64)
WORDS = ir.VectorType(WORD, VECTOR)
SUMS = ir.VectorType(ir.IntType(32), VECTOR)


def popcount(word: Any) -> int:
    """The number of ones of an unsigned word."""
    return int(word).bit_count()


@intrinsic
def _popcount(typing: Any, word: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), emit


# lambdas: numba compares names, and annotations too
overload(popcount)(lambda word: lambda word: _popcount(word))  # type: ignore[call-arg]


def _python(rows: int, xor: bool) -> Callable[..., None]:
    """What a tile does, on NumPy arrays."""

    def tile(
        words: Any, at: int, stride: int, lanes: Any, start: int, length: int, shift: int, sums: Any, to: int
    ) -> None:
        block = lanes[start : start + length * LANES].reshape(length, LANES)
        for r in range(rows):
            row = words[at + r * stride : at + r * stride + length, None]
            ones = np.bitwise_count(row ^ block if xor else row & block).sum(0, dtype=np.int32) << shift
            sums[r, to : to + LANES] += -ones if xor else ones

    return tile


def _compiled(rows: int, xor: bool) -> Any:
    """The same as LLVM's own instructions, the sums in registers."""

    @intrinsic
    def tile(
        typing: Any,
        words: Any,
        at: Any,
        stride: Any,
        lanes: Any,
        start: Any,
        length: Any,
        shift: Any,
        sums: Any,
        to: Any,
    ) -> Any:
        size = types.intp
        signature = types.void(words, size, size, lanes, size, size, size, sums, size)

        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit(context, builder, signature, args, rows, xor)
            return context.get_dummy_value()

        return signature, emit

    return tile


def _emit(context: Any, builder: Any, signature: Any, args: Any, rows: int, xor: bool) -> None:
    """One loop over the words of the rows and the lanes, then the sums are added to what is there."""
    _, at, stride, _, start, length, shift, _, to = args
    words, lanes, sums = (context.make_array(signature.args[i])(context, builder, args[i]) for i in (0, 3, 7))
    pitch = cgutils.unpack_tuple(builder, sums.shape)[1]
    vectors = range(LANES // VECTOR)
    heads = [builder.gep(words.data, [builder.add(at, builder.mul(stride, WORD(r)))]) for r in range(rows)]
    block = builder.gep(lanes.data, [start])
    zero, entry = ir.Constant(WORDS, [0] * VECTOR), builder.block
    loop, done = builder.append_basic_block("words"), builder.append_basic_block("counted")
    builder.branch(loop)  # there is at least one word

    builder.position_at_end(loop)
    k = builder.phi(WORD)
    held = [[builder.phi(WORDS) for _ in vectors] for _ in range(rows)]
    side = [_load(builder, block, builder.add(builder.mul(k, WORD(LANES)), WORD(VECTOR * v)), WORDS) for v in vectors]
    count = cgutils.get_or_insert_function(builder.module, ir.FunctionType(WORDS, [WORDS]), f"llvm.ctpop.v{VECTOR}i64")
    found = []
    for r in range(rows):
        word = _spread(builder, builder.load(builder.gep(heads[r], [k])))
        pairs = [builder.xor(word, one) if xor else builder.and_(word, one) for one in side]
        found.append([builder.add(old, builder.call(count, [pair])) for old, pair in zip(held[r], pairs, strict=True)])
    after = builder.add(k, WORD(1))
    builder.cbranch(builder.icmp_signed("<", after, length), loop, done)
    for phi, first, later in [
        (k, WORD(0), after),
        *((held[r][v], zero, found[r][v]) for r in range(rows) for v in vectors),
    ]:
        phi.add_incoming(first, entry)
        phi.add_incoming(later, loop)

    builder.position_at_end(done)
    by = _spread(builder, builder.trunc(shift, SUMS.element))
    for r in range(rows):
        for v in vectors:
            place = builder.add(builder.add(to, builder.mul(pitch, WORD(r))), WORD(VECTOR * v))
            told, old = builder.shl(builder.trunc(found[r][v], SUMS), by), _load(builder, sums.data, place, SUMS)
            new = builder.sub(old, told) if xor else builder.add(old, told)
            builder.store(new, _pointer(builder, sums.data, place, SUMS)).align = SUMS.element.width // 8


def _pointer(builder: Any, data: Any, at: Any, kind: Any) -> Any:
    return builder.bitcast(builder.gep(data, [at]), kind.as_pointer())


def _load(builder: Any, data: Any, at: Any, kind: Any) -> Any:
    loaded = builder.load(_pointer(builder, data, at, kind))
    loaded.align = kind.element.width // 8
    return loaded


def _spread(builder: Any, value: Any) -> Any:
    """A vector of one value."""
    kind = ir.VectorType(value.type, VECTOR)
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.IntType(32)(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(ir.IntType(32), VECTOR), [0] * VECTOR))


def _offered(rows: int, xor: bool) -> Callable[..., None]:
    """A tile under one name: NumPy where Python calls it, the compiled one where compiled code does."""
    python, compiled = _python(rows, xor), _compiled(rows, xor)

    overload(python)(
        lambda words, at, stride, lanes, start, length, shift, sums, to: (
            lambda words, at, stride, lanes, start, length, shift, sums, to: compiled(
                words, at, stride, lanes, start, length, shift, sums, to
            )
        )
    )
    return python


differing_four, differing_one = _offered(ROWS, True), _offered(1, True)
common_four, common_one = _offered(ROWS, False), _offered(1, False)
