"""Vector instructions that compilers do not find: unpack 256 codes.

LLVM's own terms, through numba, which brings LLVM along: no compiler at the user's. What limited
4 to 6 bits was memory: a row of four to six streams is too short for the processor to foresee, and
fetched whole it fills the queue of loads. Line by line, 12 KB ahead, one core of an AMD EPYC
(Zen 4), 4096 x 4096, one token (ms): 4 bits 0.8 instead of 1.5, 6 bits 0.9 instead of 2.7.
"""

from __future__ import annotations

from typing import Any

from ....methods.maths.packing import PLANES
from .lanes import constant_of, llvm_ir

STEP = 32  # bytes of a vector
AHEAD = 12288  # bytes; half of it was too little at 5 to 8 bits


def intrinsics() -> dict[str, Any]:
    """Return name -> function for numba code, for any processor."""
    return {f"unpack_{bits}": _unpack(bits) for bits in PLANES}


def _unpack(bits: int) -> Any:
    """unpack(source, target, octets): 32 neighbours of each eighth of a packed row of codes.

    source: of the first of 32 bytes in the first plane; target: of the first code, uint8.
    """
    from numba import types
    from numba.extending import intrinsic

    i64 = llvm_ir().IntType(64)
    vector = llvm_ir().VectorType(i64, STEP // 8)

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        source, target, octets = arguments

        def at(base: Any, n: int) -> Any:
            place = b.add(base, b.mul(octets, llvm_ir().Constant(i64, n)))
            return b.inttoptr(place, vector.as_pointer())

        loaded, first = [], 0
        for p in PLANES[bits]:
            places = [at(source, first + k) for k in range(p)]
            loaded.append([b.load(place, align=1) for place in places])
            for place in places:
                fetch_ahead(b, place)
            first += p
        for eighth in range(8):
            below, code = bits, None
            for p, parts in zip(PLANES[bits], loaded, strict=True):
                below -= p
                # a byte's bits come to their place in the code at once; those of its
                # neighbours, which move along, are masked out
                part, shift = parts[eighth % p], p * (eighth // p) - below
                if shift:
                    part = (b.lshr if shift > 0 else b.shl)(part, constant_of(vector, abs(shift)))
                mask = int.from_bytes([(2**p - 1) << below] * 8, "little")
                part = b.and_(part, constant_of(vector, mask))
                code = part if code is None else b.or_(code, part)
            b.store(code, at(target, eighth), align=1)
        return context.get_dummy_value()

    def typing(context: Any, source: Any, target: Any, octets: Any) -> Any:
        return types.void(types.int64, types.int64, types.int64), emit

    return intrinsic(typing)


def fetch_ahead(b: Any, place: Any) -> None:
    """Bring the line AHEAD bytes after a pointer to the second-level cache; any address will do.

    One line for one that is read: many at once fill the queue of loads, and all wait.
    """
    ir = llvm_ir()
    i32, i64, any_ = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [any_, i32, i32, i32])
    call = b.module.declare_intrinsic("llvm.prefetch", [any_], kind)
    how = [ir.Constant(i32, value) for value in (0, 2, 1)]  # to read, second level, data
    later = b.add(b.ptrtoint(place, i64), ir.Constant(i64, AHEAD))
    b.call(call, [b.inttoptr(later, any_), *how])
