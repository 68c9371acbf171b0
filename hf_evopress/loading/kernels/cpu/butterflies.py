"""Vector instructions of rotations: Walsh-Hadamard steps, and the DCT that mixes odd factors.

64 neighbours are transformed in eight registers, then eight (four, two) vectors that lie far apart
at once: 4096 numbers are read and written three times instead of twelve. Additions are those of the
plain algorithm in its order, so that results are the same bits.
"""

from __future__ import annotations

from typing import Any

from .lanes import LANES, constant_of, llvm_ir, loop_of, place_of, splat_at, vector_of

AT_ONCE = 4  # vectors of columns that are mixed at once


def intrinsics() -> dict[str, Any]:
    """Return name -> function for numba code; each does `n` vectors, `hadamard_64` n times 64."""
    made = {f"butterflies_{count}": _far(count) for count in (2, 4, 8)}
    made["hadamard_64"] = loop_of(3, _near)
    made["multiply_by"] = loop_of(4, _multiply_by)
    made["multiply_all"] = loop_of(4, _multiply_all)
    return made | {"mix_columns": _mix_columns()}


def _transform(b: Any, values: list[Any]) -> list[Any]:
    """Return the Walsh-Hadamard transform across vectors, not scaled."""
    size = 1
    while size < len(values):
        for first in range(0, len(values), 2 * size):
            for low in range(first, first + size):
                one, other = values[low], values[low + size]
                values[low], values[low + size] = b.fadd(one, other), b.fsub(one, other)
        size *= 2
    return values


def _within(b: Any, value: Any) -> Any:
    """Return the transform of the elements of one vector, not scaled."""
    ints = vector_of(32)
    distance = 1
    while distance < LANES:
        order = llvm_ir().Constant(ints, [i ^ distance for i in range(LANES)])
        signs = llvm_ir().Constant(ints, [(i & distance and 1) << 31 for i in range(LANES)])
        own = b.bitcast(b.xor(b.bitcast(value, ints), signs), value.type)
        value = b.fadd(b.shuffle_vector(value, value, order), own)
        distance *= 2
    return value


def _near(b: Any, i: Any, x: Any, target: Any) -> None:
    """target = the transform of x, 64 neighbours."""
    floats, at = vector_of(0), b.mul(i, i.type(LANES))

    def places(base: Any) -> list[Any]:
        return [place_of(b, base, b.add(at, i.type(k)), floats, 4 * LANES) for k in range(LANES)]

    values = [_within(b, b.load(place, align=4)) for place in places(x)]
    for value, place in zip(_transform(b, values), places(target), strict=True):
        b.store(value, place, align=4)


def _far(count: int) -> Any:
    """butterflies(x, far, n): x = the transform of `count` numbers each, `far` bytes apart."""

    def body(b: Any, i: Any, x: Any, far: Any) -> None:
        starts = [b.add(x, b.mul(far, far.type(k))) for k in range(count)]
        places = [place_of(b, start, i, vector_of(0), 4 * LANES) for start in starts]
        values = [b.load(place, align=4) for place in places]
        for value, place in zip(_transform(b, values), places, strict=True):
            b.store(value, place, align=4)

    return loop_of(3, body)


def _multiply_by(b: Any, i: Any, x: Any, factors: Any, target: Any) -> None:
    """target = x * factors."""
    places = [place_of(b, base, i, vector_of(0), 4 * LANES) for base in (x, factors, target)]
    b.store(b.fmul(*(b.load(place, align=4) for place in places[:2])), places[2], align=4)


def _multiply_all(b: Any, i: Any, x: Any, factor: Any, target: Any) -> None:
    """target = x * the number at `factor`."""
    floats = vector_of(0)
    value = b.load(place_of(b, x, i, floats, 4 * LANES), align=4)
    place = place_of(b, target, i, floats, 4 * LANES)
    b.store(b.fmul(value, splat_at(b, factor, floats)), place, align=4)


def _mix_columns() -> Any:
    """mix(x, matrix, over_rows, over_columns, q, p, y): 32 columns of D X, for D (q, q), X (q, p).

    over_...: bytes from an element of D to the next row's and the next column's; p: bytes of a row
    of X and Y. Sums begin with zero, a product is rounded before it is added.
    """
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        x, matrix, over_rows, over_columns, q, p, y = arguments
        floats = vector_of(0)
        sums = [cgutils.alloca_once(b, floats) for _ in range(AT_ONCE)]
        with cgutils.for_range(b, q) as row:
            for one in sums:
                b.store(constant_of(floats, 0.0), one)
            factors = b.add(matrix, b.mul(row.index, over_rows))
            with cgutils.for_range(b, q) as column:
                at = b.add(factors, b.mul(column.index, over_columns))
                factor = splat_at(b, at, floats)
                source = b.add(x, b.mul(column.index, p))
                for k, one in enumerate(sums):
                    place = place_of(b, source, q.type(k), floats, 4 * LANES)
                    more = b.fmul(b.load(place, align=4), factor)
                    b.store(b.fadd(b.load(one), more), one)
            target = b.add(y, b.mul(row.index, p))
            for k, one in enumerate(sums):
                place = place_of(b, target, q.type(k), floats, 4 * LANES)
                b.store(b.load(one), place, align=4)
        return context.get_dummy_value()

    def typing(  # type: ignore[no-untyped-def]
        context, x, matrix, over_rows, over_columns, q, p, y
    ) -> Any:
        return types.void(*[types.int64] * 7), emit

    return intrinsic(typing)
