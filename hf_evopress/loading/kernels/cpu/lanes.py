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
        "clear": loop_of(2, _clear),
        "largest": loop_of(2, _sizes, result="most"),
        "sum_sizes": loop_of(2, _sizes, result="sum"),
        "round_inputs": loop_of(4, _round_inputs, result="sum"),
    }


def loop_of(count: int, body: Callable[..., Any], *, result: str = "", lanes: int = LANES) -> Any:
    """f(a1, ..., n) of `count` int64: body(builder, index, a1, ...) for each index below n.

    With a result, body returns `lanes` floats, and f the "sum" of all or the "most" of them and 0.
    """
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    floats = ir.VectorType(ir.FloatType(), lanes)

    def join(b: Any, one: Any, other: Any) -> Any:
        if result == "sum":
            return b.fadd(one, other)
        return b.select(b.fcmp_ordered(">", one, other), one, other)

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        *given, n = arguments
        total = cgutils.alloca_once_value(b, ir.Constant(floats, [0.0] * lanes))
        with cgutils.for_range(b, n) as loop:
            made = body(b, loop.index, *given)
            if result:
                b.store(join(b, made, b.load(total)), total)
        if not result:
            return context.get_dummy_value()
        return fold(b, b.load(total), join)

    made_for = (types.float32 if result else types.void)(*[types.int64] * count)
    return intrinsic(_typing(count, (made_for, emit)))


def _typing(count: int, answer: Any) -> Callable[..., Any]:
    """Return a function of a context and `count` arguments that answers so."""
    functions: dict[int, Callable[..., Any]] = {
        2: lambda context, a, n: answer,
        3: lambda context, a, b, n: answer,
        4: lambda context, a, b, c, n: answer,
        5: lambda context, a, b, c, d, n: answer,
        6: lambda context, a, b, c, d, e, n: answer,
    }
    return functions[count]


def fold(b: Any, found: Any, join: Callable[..., Any]) -> Any:
    """Return what join(builder, one, other) makes of all elements of a vector."""
    ir, lanes = llvm_ir(), found.type.count
    distance = lanes // 2
    while distance:
        order = ir.Constant(vector_of(32, lanes), [i ^ distance for i in range(lanes)])
        found = join(b, found, b.shuffle_vector(found, found, order))
        distance //= 2
    return b.extract_element(found, ir.Constant(ir.IntType(32), 0))


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


def _clear(b: Any, i: Any, target: Any) -> None:
    """target = 0, 32 bytes at a time."""
    kind = vector_of(8, BYTES)
    b.store(constant_of(kind, 0), place_of(b, target, i, kind, BYTES), align=1)


def _sizes(b: Any, i: Any, x: Any) -> Any:
    """Return absolute values."""
    value = b.load(place_of(b, x, i, vector_of(32), 4 * LANES), align=1)
    return b.bitcast(b.and_(value, constant_of(vector_of(32), 0x7FFFFFFF)), vector_of(0))


def _round_inputs(b: Any, i: Any, x: Any, factor: Any, target: Any) -> Any:
    """target = x * the number at `factor`, int16, to nearest; returned as floats, too."""
    floats, half = vector_of(0), constant_of(vector_of(0), 0.5)
    value = b.load(place_of(b, x, i, floats, 4 * LANES), align=1)
    value = b.fmul(value, splat_at(b, factor, floats))
    is_positive = b.fcmp_ordered(">", value, constant_of(floats, 0.0))
    value = b.fadd(value, b.select(is_positive, half, constant_of(floats, -0.5)))
    number = b.fptosi(value, vector_of(32))
    place = place_of(b, target, i, vector_of(16), 2 * LANES)
    b.store(b.trunc(number, vector_of(16)), place, align=1)
    return b.sitofp(number, floats)


def splat_at(b: Any, address: Any, kind: Any) -> Any:
    """Return a vector of the float32 at an address."""
    ir = llvm_ir()
    one = b.load(b.inttoptr(address, ir.FloatType().as_pointer()), align=4)
    one = b.insert_element(ir.Constant(kind, ir.Undefined), one, ir.Constant(ir.IntType(32), 0))
    return b.shuffle_vector(one, one, ir.Constant(vector_of(32, kind.count), [0] * kind.count))
