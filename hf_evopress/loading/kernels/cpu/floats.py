"""Codes to weights and float32 to bfloat16, in vectors: 16 numbers at a time.

The numbers are those of PyTorch, to the bit: (code - zero) * scale in float32, rounded to nearest,
ties to even. AVX-512's own instruction for the latter makes tiny numbers zero.
"""

from __future__ import annotations

from typing import Any

from .lanes import constant_of, loop_of, place_of, splat_at, vector_of

WIDE = 16  # numbers
FAST = ("fast",)  # sums in any order, a product and a sum as one instruction


def intrinsics() -> dict[str, Any]:
    """Return name -> function for numba code; each does `n` times 16 numbers, `dot_by_64` 64."""
    return {
        "narrow_bfloat16": loop_of(3, _narrow),
        "weigh": loop_of(5, _weigh),
        "weigh_bfloat16": loop_of(5, _weigh_bfloat16),
        "dot_by_64": loop_of(3, _dot, result="sum", lanes=WIDE),
        "dot_rest": loop_of(4, _dot_rest, result="sum", lanes=WIDE),
    }


def rounded(b: Any, value: Any) -> Any:
    """Return floats as bfloat16, to nearest, ties to even."""
    ints = vector_of(32, value.type.count)
    bits = b.bitcast(value, ints)
    odd = b.and_(b.lshr(bits, constant_of(ints, 16)), constant_of(ints, 1))
    bits = b.lshr(b.add(b.add(bits, constant_of(ints, 0x7FFF)), odd), constant_of(ints, 16))
    bits = b.select(b.fcmp_unordered("uno", value, value), constant_of(ints, 0x7FC0), bits)
    return b.trunc(bits, vector_of(16, value.type.count))


def _narrow(b: Any, i: Any, source: Any, target: Any) -> None:
    value = b.load(place_of(b, source, i, vector_of(0, WIDE), 4 * WIDE), align=1)
    b.store(rounded(b, value), place_of(b, target, i, vector_of(16, WIDE), 2 * WIDE), align=1)


def _moved(b: Any, i: Any, codes: Any, zero: Any) -> Any:
    """Return code - zero point."""
    floats = vector_of(0, WIDE)
    code = b.load(place_of(b, codes, i, vector_of(8, WIDE), WIDE), align=1)
    value = b.sitofp(b.zext(code, vector_of(32, WIDE)), floats)
    return b.fsub(value, splat_at(b, zero, floats))


def _weight(b: Any, i: Any, codes: Any, scale: Any, zero: Any) -> Any:
    return b.fmul(_moved(b, i, codes, zero), splat_at(b, scale, vector_of(0, WIDE)))


def _weigh(b: Any, i: Any, codes: Any, scale: Any, zero: Any, target: Any) -> None:
    """target = (code - zero point) * scale, float32; both are addresses."""
    place = place_of(b, target, i, vector_of(0, WIDE), 4 * WIDE)
    b.store(_weight(b, i, codes, scale, zero), place, align=1)


def _weigh_bfloat16(b: Any, i: Any, codes: Any, scale: Any, zero: Any, target: Any) -> None:
    place = place_of(b, target, i, vector_of(16, WIDE), 2 * WIDE)
    b.store(rounded(b, _weight(b, i, codes, scale, zero)), place, align=1)


def _dot(b: Any, i: Any, w: Any, x: Any) -> Any:
    """Return products of float32: the sums of four neighbours' do not wait for one another."""
    total, floats = None, vector_of(0, WIDE)
    for k in range(4):
        at = b.add(b.mul(i, i.type(4)), i.type(k))
        one, other = (b.load(place_of(b, a, at, floats, 4 * WIDE), align=1) for a in (w, x))
        product = b.fmul(one, other, flags=FAST)
        total = product if total is None else b.fadd(total, product, flags=FAST)
    return total


def _dot_rest(b: Any, i: Any, codes: Any, zero: Any, x: Any) -> Any:
    """Return (code - zero point) * input; `zero` is an address."""
    floats = vector_of(0, WIDE)
    value = b.load(place_of(b, x, i, floats, 4 * WIDE), align=1)
    return b.fmul(_moved(b, i, codes, zero), value)
