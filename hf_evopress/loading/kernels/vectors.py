"""Vector instructions that compilers do not find: unpack 256 codes, multiply 16-bit integers.

LLVM's own terms, through numba, which brings LLVM along: no compiler at the user's. Measured on
one core of an AMD EPYC with AVX2, a 4096 x 4096 weight, one token (ms): 3 bits 1.5, 4 bits 1.2,
dense bfloat16 3.4; PyTorch's int4 kernel 1.4, on a copy of its own.
"""

from __future__ import annotations

from typing import Any

from ...methods.maths.packing import PLANES

CHUNKS = (128, 64, 32, 16)  # weights whose products are summed as integers
STEP = 32  # bytes of a vector


def intrinsics(*, has_avx2: bool) -> dict[str, Any]:
    """Return name -> function for numba code; `dot_C` need AVX2, the others any processor."""
    made = {f"unpack_{bits}": _unpack(bits) for bits in PLANES}
    made |= {f"dot_{chunk}": _dot(chunk, has_avx2=has_avx2) for chunk in CHUNKS}
    return made


def _types() -> Any:
    from llvmlite import ir

    return ir, ir.IntType(8), ir.IntType(32), ir.IntType(64)


def _unpack(bits: int) -> Any:
    """unpack(source, target, octets): 32 neighbours of each eighth of a packed row of codes.

    source: of the first of 32 bytes in the first plane; target: of the first code, uint8.
    """
    from numba import types
    from numba.extending import intrinsic

    ir, _, _, i64 = _types()
    lanes = STEP // 8
    vector = ir.VectorType(i64, lanes)

    def every(number: int) -> Any:
        return ir.Constant(vector, [number] * lanes)

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        source, target, octets = arguments

        def at(base: Any, n: int) -> Any:
            place = b.add(base, b.mul(octets, ir.Constant(i64, n)))
            return b.inttoptr(place, vector.as_pointer())

        loaded, first = [], 0
        for p in PLANES[bits]:
            loaded.append([b.load(at(source, first + k), align=1) for k in range(p)])
            first += p
        for eighth in range(8):
            below, code = bits, None
            for p, parts in zip(PLANES[bits], loaded, strict=True):
                below -= p
                # a byte's bits come to their place in the code at once; those of its
                # neighbours, which move along, are masked out
                part, shift = parts[eighth % p], p * (eighth // p) - below
                if shift:
                    part = (b.lshr if shift > 0 else b.shl)(part, every(abs(shift)))
                part = b.and_(part, every(int.from_bytes([(2**p - 1) << below] * 8, "little")))
                code = part if code is None else b.or_(code, part)
            b.store(code, at(target, eighth), align=1)
        return context.get_dummy_value()

    def typing(context: Any, source: Any, target: Any, octets: Any) -> Any:
        return types.void(types.int64, types.int64, types.int64), emit

    return intrinsic(typing)


def _dot(chunk: int, *, has_avx2: bool) -> Any:
    """dot(codes, x, factors, n) -> sum over n chunks of factor * sum(code * x), float32.

    codes uint8, x int16, factors float32: addresses. A chunk's sum of integers is exact:
    128 / 8 * 255 * 32767 is below 2^31.
    """
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    ir, i8, i32, i64 = _types()
    floats, ints = ir.VectorType(ir.FloatType(), 8), ir.VectorType(i32, 8)
    words, bytes_ = ir.VectorType(ir.IntType(16), 16), ir.VectorType(i8, 16)

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        codes, x, factors, n = arguments

        def load(base: Any, offset: Any, kind: Any, align: int) -> Any:
            return b.load(b.inttoptr(b.add(base, offset), kind.as_pointer()), align=align)

        madd = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(ints, [words, words]), "llvm.x86.avx2.pmadd.wd"
        )
        sums = cgutils.alloca_once_value(b, ir.Constant(floats, [0.0] * 8))
        with cgutils.for_range(b, n) as loop:
            first, total = b.mul(loop.index, ir.Constant(i64, chunk)), None
            for k in range(0, chunk, 16):
                here = b.add(first, ir.Constant(i64, k))
                code = b.zext(load(codes, here, bytes_, 1), words)
                value = load(x, b.mul(here, ir.Constant(i64, 2)), words, 2)
                pairs = b.call(madd, [code, value])
                total = pairs if total is None else b.add(total, pairs)
            offset = b.mul(loop.index, ir.Constant(i64, 4))
            factor = load(factors, offset, ir.FloatType(), 4)
            factor = b.insert_element(
                ir.Constant(floats, ir.Undefined), factor, ir.Constant(i32, 0)
            )
            factor = b.shuffle_vector(factor, factor, ir.Constant(ints, [0] * 8))
            part = b.fmul(b.sitofp(total, floats), factor)
            b.store(b.fadd(b.load(sums), part), sums)
        total = b.load(sums)
        for distance in (4, 2, 1):
            other = ir.Constant(ints, [i ^ distance for i in range(8)])
            total = b.fadd(total, b.shuffle_vector(total, total, other))
        return b.extract_element(total, ir.Constant(i32, 0))

    def without(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.FloatType(), 0.0)  # never called: rows take the float32 way

    def typing(context: Any, codes: Any, x: Any, factors: Any, n: Any) -> Any:
        kind = types.float32(types.int64, types.int64, types.int64, types.int64)
        return kind, emit if has_avx2 else without

    return intrinsic(typing)
