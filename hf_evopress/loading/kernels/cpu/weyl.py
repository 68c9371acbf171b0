"""Values of trellis states computed in vectors, no table: the codebook `weyl`.

A state times a multiplier, modulo 2^16, through an odd polynomial, in 16-bit integers
(methods/maths/codebook.py). The last 16 bits of a walk up to each weight are enough: what is above
a state vanishes from the product. With AVX-512 VBMI two instructions cut them out for 32 weights,
AVX2 takes ten for 16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ....methods.maths.codebook import WEYL_POLYNOMIAL, WEYL_UNIT
from .lanes import constant_of, llvm_ir, loop_of, place_of, splat_at, spread_of, vector_of
from .walks import PAIRS, SIDE, up_to

FAST = ("fast",)  # sums in any order, a product and a sum as one instruction
# inputs with one scale: 16 tiles times 2 products of 1536 and 32767 are below 2^31
CHUNKS = (256, 128, 64, 32, 16)
EACH = 16  # bytes that AVX2 shuffles
NONE = 255  # a byte that becomes zero


def intrinsics(*, width: int) -> dict[str, Any]:
    """Return name -> function for numba code; width: bytes of a vector, 0 for none of it.

    64 needs AVX-512 VBMI, 32 AVX2.
    """
    made = {f"weyl_{pair}": _words(pair, width) for pair in PAIRS}
    made |= {f"sum_weyl_{pair}": _sum(pair, width) for pair in PAIRS}
    return made | {"add_words": _add_words(width), "float_words": loop_of(3, _float_words)}


def _sum(pair: int, width: int) -> Any:
    """sum(tile, past, chunks, tiles, multiplier, half, x, scales, sums): products with integers.

    x: int16, a float32 scale for each chunk of `tiles` tiles; sums (16, 8): += in eight parts of
    each row. Tiles, and what is before them (eight bytes at `past`), are 16 * pair bytes apart.
    """
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    lanes = width // 4

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        tile, past, chunks, tiles, multiplier, half, x, scales, sums = arguments
        if not width:
            return context.get_dummy_value()
        floats, ints = vector_of(0, lanes), vector_of(32, lanes)
        vectors = range(SIDE * SIDE * 2 // width)  # of words, each one row or two
        totals = [cgutils.alloca_once_value(b, constant_of(floats, 0.0)) for _ in vectors]
        parts = [cgutils.alloca_once(b, ints) for _ in vectors]
        with cgutils.for_range(b, chunks) as outer:
            for part in parts:
                b.store(constant_of(ints, 0), part)
            with cgutils.for_range(b, tiles) as loop:
                i = b.add(b.mul(outer.index, tiles), loop.index)
                far = b.mul(i, _number(16 * pair))
                some = _inputs(b, x, i, width)
                walk = _Walk(b, pair, width, b.add(tile, far), b.add(past, far), multiplier, half)
                for at, values in walk.words():
                    part = parts[at // (width // 2)]
                    b.store(b.add(b.load(part), _pairs(b, values, some)), part)
            scale = splat_at(b, b.add(scales, b.mul(outer.index, _number(4))), floats)
            for part, total in zip(parts, totals, strict=True):
                more = b.fmul(b.sitofp(b.load(part), floats), scale, flags=FAST)
                b.store(b.fadd(b.load(total), more, flags=FAST), total)
        for i, total in enumerate(totals):
            _add_up(b, b.load(total), place_of(b, sums, _number(i), floats, width))
        return context.get_dummy_value()

    def typing(  # type: ignore[no-untyped-def]
        context, tile, past, chunks, tiles, multiplier, half, x, scales, sums
    ) -> Any:
        return types.void(*[types.int64] * 9), emit

    return intrinsic(typing)


def _words(pair: int, width: int) -> Any:
    """words(tile, past, tiles, multiplier, half, target): values of neighbouring tiles, int16.

    Times WEYL_UNIT; in the order of their walks.
    """
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        tile, past, tiles, multiplier, half, target = arguments
        if width:
            with cgutils.for_range(b, tiles) as loop:
                far = b.mul(loop.index, _number(16 * pair))
                own = b.add(target, b.mul(loop.index, _number(2 * SIDE * SIDE)))
                walk = _Walk(b, pair, width, b.add(tile, far), b.add(past, far), multiplier, half)
                for at, values in walk.words():
                    b.store(values, place_of(b, own, _number(at), values.type, 2), align=2)
        return context.get_dummy_value()

    def typing(  # type: ignore[no-untyped-def]
        context, tile, past, tiles, multiplier, half, target
    ) -> Any:
        return types.void(*[types.int64] * 6), emit

    return intrinsic(typing)


def _add_words(width: int) -> Any:
    """add(words, tiles, x, scale, sums): sums (16, 8) += products of such tiles with one chunk."""
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    lanes = width // 4

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        words, tiles, x, scale, sums = arguments
        if not width:
            return context.get_dummy_value()
        floats, ints, kind = vector_of(0, lanes), vector_of(32, lanes), vector_of(16, 2 * lanes)
        vectors = range(SIDE * SIDE * 2 // width)
        parts = [cgutils.alloca_once_value(b, constant_of(ints, 0)) for _ in vectors]
        with cgutils.for_range(b, tiles) as loop:
            some = _inputs(b, x, loop.index, width)
            own = b.add(words, b.mul(loop.index, _number(2 * SIDE * SIDE)))
            for i, part in enumerate(parts):
                values = b.load(place_of(b, own, _number(i), kind, width), align=2)
                b.store(b.add(b.load(part), _pairs(b, values, some)), part)
        factor = splat_at(b, scale, floats)
        for i, part in enumerate(parts):
            more = b.fmul(b.sitofp(b.load(part), floats), factor)
            _add_up(b, more, place_of(b, sums, _number(i), floats, width))
        return context.get_dummy_value()

    def typing(context: Any, words: Any, tiles: Any, x: Any, scale: Any, sums: Any) -> Any:
        return types.void(*[types.int64] * 5), emit

    return intrinsic(typing)


def _float_words(b: Any, i: Any, words: Any, target: Any) -> None:
    """target = values as float32, eight at a time."""
    some = b.load(place_of(b, words, i, vector_of(16), 16), align=2)
    values = b.sitofp(b.sext(some, vector_of(32)), vector_of(0))
    values = b.fmul(values, constant_of(values.type, 1.0 / WEYL_UNIT))
    b.store(values, place_of(b, target, i, values.type, 32), align=4)


def _inputs(b: Any, x: Any, i: Any, width: int) -> Any:
    """Return 16 inputs int16 for each row that a vector has."""
    some = b.load(place_of(b, x, i, vector_of(16, SIDE), 2 * SIDE), align=2)
    return b.shuffle_vector(some, some, _integers([*range(SIDE)] * (width // 32)))


def _pairs(b: Any, one: Any, other: Any) -> Any:
    """Return sums of two neighbours' products, int32."""
    from numba.core import cgutils

    name = {16: "avx2.pmadd.wd", 32: "avx512.pmaddw.d.512"}[one.type.count]
    kind = llvm_ir().FunctionType(vector_of(32, one.type.count // 2), [one.type] * 2)
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.x86.{name}"), [one, other])


def _add_up(b: Any, total: Any, place: Any) -> None:
    """Add a vector of sums of integers to those of values at a place."""
    total = b.fmul(total, constant_of(total.type, 1.0 / WEYL_UNIT))
    b.store(b.fadd(b.load(place, align=4), total), place, align=4)


@dataclass
class _Walk:
    """The code that reads one walk: b is the builder."""

    b: Any
    pair: int  # bits of two weights
    width: int
    tile: Any
    past: Any
    multiplier: Any
    half: Any

    def words(self) -> Iterator[tuple[int, Any]]:
        """Yield places in the walk and the values from there on, int16, times WEYL_UNIT."""
        b, words = self.b, self.width // 2
        kind = vector_of(16, words)
        multiplier, half = (spread_of(b, v, kind) for v in (self.multiplier, self.half))
        cut = self._cut_by_vbmi if self.width == 64 else self._cut
        for first in range(0, SIDE * SIDE, words):
            yield first, self._polynomial(b.or_(b.mul(cut(first), multiplier), half))

    def _polynomial(self, t: Any) -> Any:
        b, power, first = self.b, t, t
        factors = [constant_of(t.type, factor) for factor in WEYL_POLYNOMIAL]
        for i in range(5):
            power = self._times(power, power)
            first = power if i == 1 else first
        inner = b.add(self._times(power, factors[2]), factors[1])
        return self._times(t, b.add(self._times(first, inner), factors[0]))

    def _times(self, x: Any, y: Any) -> Any:
        """Return (x * y + 2^14) >> 15."""
        name = {32: "avx2.pmul.hr.sw", 64: "avx512.pmul.hr.sw.512"}[self.width]
        return _call(self.b, name, x.type, x, y)

    def _cut_by_vbmi(self, first: int) -> Any:
        """Return the 16 bits up to each of 32 weights."""
        b, pair, bytes_ = self.b, self.pair, vector_of(8, 64)
        own = up_to(first, pair) // 8  # the first byte
        size = 32 if pair < 16 else 64  # the bytes of 32 weights and two before them
        start = min(max(own - 2, 0), 16 * pair - size)
        known = b.load(place_of(b, self.tile, _number(start), vector_of(8, size), 1), align=1)
        known = b.shuffle_vector(known, known, _integers([i % size for i in range(64)]))
        places = {byte: byte - start for byte in range(start, start + size)}
        if own < 2:  # the first, after the end of the walk or its start
            words = b.bitcast(known, vector_of(64, 8))
            before = b.load(place_of(b, self.past, _number(0), words.type.element, 1), align=1)
            known = b.bitcast(b.insert_element(words, before, _lane(7)), bytes_)
            places |= {-8 + i: 56 + i for i in range(8)}
        order, shifts = [], []
        for weight in range(first, first + 32, 4):
            end = -(-up_to(weight + 4, pair) // 8)
            order += [places.get(byte, 0) for byte in range(end - 1, end - 9, -1)]
            for j in range(4):
                shift = 8 * end - up_to(weight + j + 1, pair)
                shifts += [shift, shift + 8]
        order, shifts = (llvm_ir().Constant(bytes_, values) for values in (order, shifts))
        turned = _call(b, "avx512.permvar.qi.512", bytes_, known, order)
        cut = _call(b, "avx512.pmultishift.qb.512", bytes_, shifts, turned)
        return b.bitcast(cut, vector_of(16, 32))

    def _cut(self, first: int) -> Any:
        """Return the 16 bits up to each of 16 weights: of even ones, of odd ones, then blended."""
        b, halves, known = self.b, [], vector_of(8, EACH)
        orders: list[list[int]] = [[], []]
        shifts: list[list[int]] = [[], []]
        for low in range(first, first + 16, 8):
            vector, places = self._bytes_of(low)
            halves.append(b.bitcast(vector, known))
            for weight in range(low, low + 8):
                bit = up_to(weight + 1, self.pair)
                end = -(-bit // 8)
                after = 8 * end - bit
                is_odd = weight % 2
                own = (end - i for i in range(1, 5))
                orders[is_odd] += [places.get(byte, NONE) for byte in own]
                shifts[is_odd].append(16 - after if is_odd else after)
        both = b.shuffle_vector(*halves, _integers(range(2 * EACH)))
        cut = []
        for order, shift, move in zip(orders, shifts, (b.lshr, b.shl), strict=True):
            place = llvm_ir().Constant(both.type, order)
            turned = _call(b, "avx2.pshuf.b", both.type, both, place)
            moved = move(b.bitcast(turned, vector_of(32)), llvm_ir().Constant(vector_of(32), shift))
            cut.append(b.bitcast(moved, vector_of(16, 16)))
        return b.shuffle_vector(*cut, _integers([i + 16 * (i % 2) for i in range(16)]))

    def _bytes_of(self, weight: int) -> tuple[Any, dict[int, int]]:
        """Return 16 bytes with those of 8 weights and two before, and where each byte is."""
        b, own = self.b, up_to(weight, self.pair) // 8
        if own < 2:
            pair = vector_of(64, 2)
            found = llvm_ir().Constant(pair, llvm_ir().Undefined)
            for lane, base in enumerate((self.past, self.tile)):
                word = b.load(place_of(b, base, _number(0), pair.element, 1), align=1)
                found = b.insert_element(found, word, _lane(lane))
            return found, {byte: byte + 8 for byte in range(-8, 8)}
        start = min(own - 2, 16 * self.pair - EACH)
        place = place_of(b, self.tile, _number(start), vector_of(8, EACH), 1)
        return b.load(place, align=1), {byte: byte - start for byte in range(start, start + EACH)}


def _call(b: Any, name: str, kind: Any, *arguments: Any) -> Any:
    """Return what an instruction of x86 makes of vectors of one kind."""
    from numba.core import cgutils

    function = llvm_ir().FunctionType(kind, [kind] * len(arguments))
    return b.call(cgutils.get_or_insert_function(b.module, function, f"llvm.x86.{name}"), arguments)


def _integers(values: Any) -> Any:
    values = list(values)
    return llvm_ir().Constant(vector_of(32, len(values)), values)


def _lane(value: int) -> Any:
    return llvm_ir().Constant(llvm_ir().IntType(32), value)


def _number(value: int) -> Any:
    return llvm_ir().Constant(llvm_ir().IntType(64), value)
