"""Short loops over addresses, many lanes at a time: compilers keep them scalar, as any may overlap.

Where groups are few weights, their scales and zero points took as long as the codes: a 576 x 576
weight in groups of 64 lost two fifths of its time to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LANES, BYTES = 8, 32  # of float32 and of uint8 in a vector
MOVE_OF_EXPONENT = 2.0**112  # float16's bits in float32's places are that much too small


def intrinsics() -> dict[str, Any]:
    """Return name -> function for numba code; each does `n` whole vectors."""
    return {
        "widen_bfloat16": loop_of(3, _widen_bfloat16),
        "widen_float16": loop_of(3, _widen_float16),
        "widen_bytes": loop_of(3, _widen_bytes),
        "merge_bits": loop_of(6, _merge_bits),
        "scale_chunks": loop_of(6, _scale_chunks, returns_sum=True),
    }


def loop_of(count: int, body: Callable[..., Any], *, returns_sum: bool = False) -> Any:
    """f(a1, ..., n) of `count` int64: body(builder, index, a1, ...) for each index below n.

    With returns_sum, body returns 8 floats, and f the sum of all.
    """
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    floats = ir.VectorType(ir.FloatType(), LANES)

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        *given, n = arguments
        total = cgutils.alloca_once_value(b, ir.Constant(floats, [0.0] * LANES))
        with cgutils.for_range(b, n) as loop:
            made = body(b, loop.index, *given)
            if returns_sum:
                b.store(b.fadd(b.load(total), made), total)
        if not returns_sum:
            return context.get_dummy_value()
        found = b.load(total)
        ints = ir.VectorType(ir.IntType(32), LANES)
        for distance in (4, 2, 1):
            other = ir.Constant(ints, [i ^ distance for i in range(LANES)])
            found = b.fadd(found, b.shuffle_vector(found, found, other))
        return b.extract_element(found, ir.Constant(ir.IntType(32), 0))

    result = types.float32 if returns_sum else types.void
    made_for = result(*[types.int64] * count)

    if count == 3:

        def three(context: Any, a: Any, b: Any, n: Any) -> Any:
            return made_for, emit

        return intrinsic(three)

    if count == 4:

        def four(context: Any, a: Any, b: Any, c: Any, n: Any) -> Any:
            return made_for, emit

        return intrinsic(four)

    def six(context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, n: Any) -> Any:
        return made_for, emit

    return intrinsic(six)


def llvm_ir() -> Any:
    from llvmlite import ir

    return ir


def vector_of(bits: int, lanes: int = LANES) -> Any:
    ir = llvm_ir()
    return ir.VectorType(ir.FloatType() if bits == 0 else ir.IntType(bits), lanes)


def constant_of(kind: Any, value: float) -> Any:
    return llvm_ir().Constant(kind, [value] * kind.count)


def place_of(b: Any, base: Any, index: Any, kind: Any, size: int) -> Any:
    offset = b.mul(index, llvm_ir().Constant(llvm_ir().IntType(64), size))
    return b.inttoptr(b.add(base, offset), kind.as_pointer())


def spread_of(b: Any, value: Any, kind: Any) -> Any:
    """Return a vector whose elements are the low bits of an int64."""
    ir = llvm_ir()
    one = b.insert_element(
        ir.Constant(kind, ir.Undefined),
        b.trunc(value, kind.element),
        ir.Constant(ir.IntType(32), 0),
    )
    return b.shuffle_vector(one, one, ir.Constant(vector_of(32, kind.count), [0] * kind.count))


def _widen_bfloat16(b: Any, i: Any, source: Any, target: Any) -> None:
    words, ints = vector_of(16), vector_of(32)
    wide = b.zext(b.load(place_of(b, source, i, words, 2 * LANES), align=1), ints)
    b.store(b.shl(wide, constant_of(ints, 16)), place_of(b, target, i, ints, 4 * LANES), align=1)


def _widen_float16(b: Any, i: Any, source: Any, target: Any) -> None:
    words, ints, floats = vector_of(16), vector_of(32), vector_of(0)
    wide = b.zext(b.load(place_of(b, source, i, words, 2 * LANES), align=1), ints)
    sign = b.shl(b.and_(wide, constant_of(ints, 0x8000)), constant_of(ints, 16))
    rest = b.shl(b.and_(wide, constant_of(ints, 0x7FFF)), constant_of(ints, 13))
    number = b.fmul(b.bitcast(b.or_(sign, rest), floats), constant_of(floats, MOVE_OF_EXPONENT))
    b.store(number, place_of(b, target, i, floats, 4 * LANES), align=1)


def _widen_bytes(b: Any, i: Any, source: Any, target: Any) -> None:
    bytes_, ints, floats = vector_of(8), vector_of(32), vector_of(0)
    wide = b.zext(b.load(place_of(b, source, i, bytes_, LANES), align=1), ints)
    place = place_of(b, target, i, floats, 4 * LANES)
    b.store(b.uitofp(wide, floats), place, align=1)


def _merge_bits(
    b: Any, i: Any, source: Any, shift: Any, mask: Any, below: Any, target: Any
) -> None:
    """target |= ((source >> shift) & mask) << below, 32 bytes at a time."""
    kind = vector_of(8, BYTES)
    part = b.load(place_of(b, source, i, kind, BYTES), align=1)
    part = b.and_(b.lshr(part, spread_of(b, shift, kind)), spread_of(b, mask, kind))
    place = place_of(b, target, i, kind, BYTES)
    part = b.or_(b.load(place, align=1), b.shl(part, spread_of(b, below, kind)))
    b.store(part, place, align=1)


def _scale_chunks(
    b: Any, i: Any, scales: Any, zeros: Any, x_scales: Any, x_sums: Any, scaled: Any
) -> Any:
    """scaled = scale * scale of x; returned: scale * zero point * sum of x."""
    kind = vector_of(0)

    def load(base: Any) -> Any:
        return b.load(place_of(b, base, i, kind, 4 * LANES), align=1)

    scale = load(scales)
    b.store(b.fmul(scale, load(x_scales)), place_of(b, scaled, i, kind, 4 * LANES), align=1)
    return b.fmul(b.fmul(scale, load(zeros)), load(x_sums))
