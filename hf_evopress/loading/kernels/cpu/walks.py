"""Tiles of walks through a trellis: bits to states to values, and what is done with values.

The state of a weight is the last bits of its walk. Eight weights are read from one word of 64
bits, and each is looked up in the table: two instructions per weight, where a processor cuts bits
out in one. A 4096 x 4096 weight at 3 bits and one token, on one core of an AMD EPYC (ms): so 4.9;
with a shift and a mask 6.1; with states made in vectors, which takes 1.1, and AVX2's gather 7.5, or
element by element 6.3; with values computed in vectors (mul1, to the bit) 3.9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ....methods.maths.walks import BITS
from .floats import rounded
from .lanes import LANES, llvm_ir, loop_of, place_of, vector_of

SIDE = 16  # rows and columns of a tile
PAIRS = tuple(round(2 * bits) for bits in BITS)  # bits of two weights, the rate in the kernels
WORD = 8  # bytes


def intrinsics(*, has_bmi: bool) -> dict[str, Any]:
    """Return name -> function for numba code. has_bmi: x86's instruction that cuts bits out."""
    made = {f"decode_{pair}": _decode(pair, has_bmi=has_bmi) for pair in PAIRS}
    made["add_tile"] = loop_of(4, _add_tile)
    made["add_mma_tile"] = loop_of(4, _add_mma_tile)
    made["put_tiles"] = loop_of(5, _put_tiles)
    return made


def _decode(pair: int, *, has_bmi: bool) -> Any:
    """decode(tile, past, table, size, target): the 256 values of a tile of 16 * pair bytes.

    past: the eight bytes before its walk; table: float32 by state; size: the bits of a state.
    """
    from numba import types
    from numba.extending import intrinsic

    each = LANES if pair < 14 else LANES // 2  # states of 16 bits that one word holds

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        tile, past, table, size, target = arguments
        cut = _cut_by_bmi(b, size) if has_bmi else _cut(b, size)
        for first in range(0, SIDE * SIDE, LANES):
            values = llvm_ir().Constant(vector_of(0), llvm_ir().Undefined)
            for part in range(0, LANES, each):
                end = first + part + each
                word, after = _word(b, pair, tile, past, end)
                for j in range(each):
                    later = up_to(end, pair) - up_to(end - each + j + 1, pair)
                    state = cut(word, after + later)
                    value = b.load(place_of(b, table, state, llvm_ir().FloatType(), 4), align=4)
                    lane = llvm_ir().Constant(llvm_ir().IntType(32), part + j)
                    values = b.insert_element(values, value, lane)
            place = place_of(b, target, _number(first // LANES), vector_of(0), 4 * LANES)
            b.store(values, place, align=4)
        return context.get_dummy_value()

    def typing(context: Any, tile: Any, past: Any, table: Any, size: Any, target: Any) -> Any:
        return types.void(*[types.int64] * 5), emit

    return intrinsic(typing)


def up_to(weights: int, pair: int) -> int:
    """Return how many bits that many first weights of a walk have."""
    return weights * pair // 2


def _word(b: Any, pair: int, tile: Any, past: Any, end: int) -> tuple[Any, int]:
    """Return the 64 bits of a walk up to weight `end`, and how many of the next come after."""
    last = -(-up_to(end, pair) // 8)
    first, after = last - WORD, 8 * last - up_to(end, pair)
    if first >= 0:
        return _load(b, tile, first), after
    word = b.lshr(_load(b, tile, 0), _number(-8 * first))
    return b.or_(word, b.shl(_load(b, past, 0), _number(8 * last))), after


def _cut(b: Any, size: Any) -> Callable[[Any, int], Any]:
    """Return a function that emits `size` bits of a word above the lowest `shift`."""
    mask = b.sub(b.shl(_number(1), size), _number(1))
    return lambda word, shift: b.and_(b.lshr(word, _number(shift)), mask)


def _cut_by_bmi(b: Any, size: Any) -> Callable[[Any, int], Any]:
    from numba.core import cgutils

    ir = llvm_ir()
    word, high, known = ir.IntType(64), b.shl(size, _number(8)), dict[int, Any]()
    kind = ir.FunctionType(word, [word, word])
    instruction = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.bmi.bextr.64")

    def cut(word_: Any, shift: int) -> Any:
        if shift not in known:  # one register each, where LLVM would compute it anew at each use
            value = b.or_(high, _number(shift))
            known[shift] = b.asm(ir.FunctionType(word, [word]), "", "=r,0", [value], False)
        return b.call(instruction, [word_, known[shift]])

    return cut


def _load(b: Any, tile: Any, offset: int) -> Any:
    """Return eight bytes as one number, the first of them the highest."""
    from numba.core import cgutils

    word = llvm_ir().IntType(64)
    kind = llvm_ir().FunctionType(word, [word])
    turn = cgutils.get_or_insert_function(b.module, kind, "llvm.bswap.i64")
    return b.call(turn, [b.load(place_of(b, tile, _number(offset), word, 1), align=1)])


def _number(value: int) -> Any:
    return llvm_ir().Constant(llvm_ir().IntType(64), value)


def _add_tile(b: Any, i: Any, tile: Any, x: Any, sums: Any) -> None:
    """sums (16, 8) += the tile (16, 16) times 16 of x, eight parts of each row."""
    floats, fast = vector_of(0), ("fast",)
    xs = [b.load(place_of(b, x, _number(half), floats, 4 * LANES), align=4) for half in range(2)]
    for row in range(SIDE):
        place = place_of(b, sums, _number(row), floats, 4 * LANES)
        total = b.load(place, align=4)
        for half in range(2):
            own = place_of(b, tile, _number(2 * row + half), floats, 4 * LANES)
            product = b.fmul(b.load(own, align=4), xs[half], flags=fast)
            total = b.fadd(total, product, flags=fast)
        b.store(total, place, align=4)


def _add_mma_tile(b: Any, i: Any, tile: Any, x: Any, sums: Any) -> None:
    """sums (8, 8) += a tile in the order mma times 16 of x: rows o and o + 8, four parts of each.

    Eight weights of a walk are two rows' at inputs 2 r, 2 r + 1, 2 r + 8, 2 r + 9.
    """
    floats, fast, ir = vector_of(0), ("fast",), llvm_ir()
    xs = [b.load(place_of(b, x, _number(half), floats, 4 * LANES), align=4) for half in range(2)]
    order = [[2 * r, 2 * r + 1, 2 * r + LANES, 2 * r + LANES + 1] * 2 for r in range(4)]
    xs = [b.shuffle_vector(*xs, ir.Constant(vector_of(32), lanes)) for lanes in order]
    for row in range(SIDE // 2):
        place = place_of(b, sums, _number(row), floats, 4 * LANES)
        total = b.load(place, align=4)
        for r in range(4):
            own = place_of(b, tile, _number(4 * row + r), floats, 4 * LANES)
            product = b.fmul(b.load(own, align=4), xs[r], flags=fast)
            total = b.fadd(total, product, flags=fast)
        b.store(total, place, align=4)


def _put_tiles(b: Any, row: Any, tile: Any, other: Any, target: Any, far: Any) -> None:
    """target, whose rows lie `far` bytes apart, = two tiles side by side, as bfloat16.

    A whole line of the cache at a time: rows of 4096 weights are too far apart to keep 16 halves.
    """
    start = b.add(target, b.mul(row, far))
    for half, values in enumerate((tile, other)):
        kind = vector_of(0, SIDE)
        value = b.load(place_of(b, values, row, kind, 4 * SIDE), align=4)
        place = place_of(b, start, _number(half), vector_of(16, SIDE), 2 * SIDE)
        b.store(rounded(b, value), place, align=2)
