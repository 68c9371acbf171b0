"""Kept weights of a sparse row put to their places, in vectors: which are kept is a byte each.

AVX-512 has an instruction for it, for bytes AVX-512 VBMI2; AVX2 permutes eight, in one of 256 ways.
One by one, whether a weight is kept is a branch that no processor foresees: a 4096 x 4096 weight at
half its weights took 50 to 67 ms.
"""

from __future__ import annotations

from typing import Any

from .lanes import constant_of, llvm_ir, loop_of, place_of, spread_of, vector_of
from .vectors import fetch_ahead

BLOCK = 16  # weights; numbers of them are what the functions take
EIGHT = 8
GONE = 255  # of a permutation, where nothing is kept


def intrinsics(*, width: int, has_vbmi2: bool) -> dict[str, Any]:
    """Return name -> function for numba code; width: bytes of a vector, 0 for none of it."""
    by_bytes = "expand" if has_vbmi2 else "permute"
    kinds = {64: ("expand", by_bytes), 32: ("permute", "permute"), 0: ("", "")}
    of_floats, of_codes = kinds[width]
    return {
        "ones": _ones(),
        "fetch": loop_of(2, _fetch),
        "spread_masks": loop_of(4, _spread_masks) if width else loop_of(4, _nothing),
        "place_floats": _placing(vector_of(0, BLOCK), of_floats),
        "place_codes": _placing(vector_of(8, BLOCK), of_codes),
        "place_64_codes": _placing(vector_of(8, 4 * BLOCK), "expand" if has_vbmi2 else ""),
        "PLACES_AT_ONCE": BLOCK if width else 0,
        "CODES_AT_ONCE": 4 * BLOCK if has_vbmi2 else BLOCK,
    }


def _ones() -> Any:
    """ones(address) -> how many of 64 bits are set."""
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    def typing(context: Any, address: Any) -> Any:
        def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            word = llvm_ir().IntType(64)
            kind = llvm_ir().FunctionType(word, [word])
            count = cgutils.get_or_insert_function(b.module, kind, "llvm.ctpop.i64")
            place = b.inttoptr(arguments[0], word.as_pointer())
            return b.call(count, [b.load(place, align=1)])

        return types.int64(types.int64), emit

    return intrinsic(typing)


def _fetch(b: Any, i: Any, source: Any) -> None:
    """Bring what comes after some lines of the cache nearer."""
    fetch_ahead(b, place_of(b, source, i, llvm_ir().IntType(8), 64))


def _spread_masks(b: Any, i: Any, numbers: Any, table: Any, target: Any) -> None:
    """target = the masks of eight groups of four by number, of which there are up to eight."""
    from numba.core import cgutils

    ints, bytes_ = vector_of(32, EIGHT), vector_of(8, EIGHT)
    number = b.zext(b.load(place_of(b, numbers, i, bytes_, EIGHT), align=1), ints)
    known = b.load(b.inttoptr(table, ints.as_pointer()), align=1)
    function = llvm_ir().FunctionType(ints, [ints, ints])
    call = cgutils.get_or_insert_function(b.module, function, "llvm.x86.avx2.permd")
    found = b.call(call, [known, number])
    b.store(found, place_of(b, target, i, ints, 4 * EIGHT), align=1)


def _nothing(b: Any, i: Any, numbers: Any, table: Any, target: Any) -> None:
    """Where there are no vectors of 32 bytes, never called."""


def _placing(kind: Any, how: str) -> Any:
    """place(mask, kept, target, blocks, rest) -> where the kept ones of `blocks` vectors end.

    rest: the code where nothing is kept; zero for floats. Reads a vector beyond the last one kept.
    """
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    lanes, size = kind.count, 4 if kind.element == llvm_ir().FloatType() else 1

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        mask, kept, target, blocks, rest = arguments
        if not how:
            return kept
        end = cgutils.alloca_once_value(b, kept)
        step = lanes if how == "expand" else EIGHT
        part = vector_of(0 if size == 4 else 8, step)
        none = constant_of(part, 0.0) if size == 4 else spread_of(b, rest, part)
        with cgutils.for_range(b, blocks) as loop:
            for low in range(0, lanes, step):
                at = b.add(b.mul(loop.index, _number(lanes)), _number(low))
                is_kept = _mask(b, mask, at, step)
                here = b.load(end)
                put = _expand if how == "expand" else _permute
                found = put(b, b.inttoptr(here, part.as_pointer()), is_kept, none)
                b.store(found, place_of(b, target, at, part, size), align=size)
                bits = b.bitcast(is_kept, llvm_ir().IntType(step))
                count = b.mul(_count(b, bits), _number(size))
                b.store(b.add(here, count), end)
        return b.load(end)

    def typing(context: Any, mask: Any, kept: Any, target: Any, blocks: Any, rest: Any) -> Any:
        return types.int64(*[types.int64] * 5), emit

    return intrinsic(typing)


def _mask(b: Any, mask: Any, at: Any, lanes: int) -> Any:
    """Return which of some weights are kept, a bit each."""
    kind = vector_of(8, lanes)
    return b.icmp_unsigned(
        "!=", b.load(place_of(b, mask, at, kind, 1), align=1), constant_of(kind, 0)
    )


def _count(b: Any, bits: Any) -> Any:
    """Return how many bits of an integer are set, int64."""
    from numba.core import cgutils

    word = llvm_ir().IntType(64)
    wide = bits if bits.type == word else b.zext(bits, word)
    kind = llvm_ir().FunctionType(word, [word])
    count = cgutils.get_or_insert_function(b.module, kind, "llvm.ctpop.i64")
    return b.call(count, [wide])


def _expand(b: Any, place: Any, is_kept: Any, none: Any) -> Any:
    from numba.core import cgutils

    kind = none.type
    element = "f32" if kind.element == llvm_ir().FloatType() else "i8"
    name = f"llvm.x86.avx512.mask.expand.v{kind.count}{element}"
    function = llvm_ir().FunctionType(kind, [kind, kind, is_kept.type])
    call = cgutils.get_or_insert_function(b.module, function, name)
    return b.call(call, [b.load(place, align=1), none, is_kept])


def _permute(b: Any, place: Any, is_kept: Any, none: Any) -> Any:
    """Put up to eight numbers or bytes to their places by a table of permutations."""
    from numba.core import cgutils

    ir, kind = llvm_ir(), none.type
    bytes_ = vector_of(8, EIGHT)
    known = cgutils.global_constant(b, "evopress_permutations", _permutations())
    number = b.zext(b.bitcast(is_kept, ir.IntType(8)), ir.IntType(64))
    base = b.ptrtoint(known, ir.IntType(64))
    order = b.load(place_of(b, base, number, bytes_, EIGHT), align=8)
    found = b.load(place, align=1)
    if kind.element == ir.FloatType():
        ints = vector_of(32, EIGHT)
        function = ir.FunctionType(kind, [kind, ints])
        call = cgutils.get_or_insert_function(b.module, function, "llvm.x86.avx2.permps")
        found = b.call(call, [found, b.zext(order, ints)])
    else:
        wide = vector_of(8, 2 * EIGHT)
        function = ir.FunctionType(wide, [wide, wide])
        call = cgutils.get_or_insert_function(b.module, function, "llvm.x86.ssse3.pshuf.b.128")
        both = ir.Constant(vector_of(32, 2 * EIGHT), list(range(2 * EIGHT)))
        halves = ir.Constant(vector_of(32, EIGHT), list(range(EIGHT)))
        found = b.call(call, [b.shuffle_vector(v, v, both) for v in (found, order)])
        found = b.shuffle_vector(found, found, halves)
    return b.select(is_kept, found, none)


def _permutations() -> Any:
    """Return per mask of eight bits which of the kept ones each lane takes, (256, 8) bytes."""
    ir = llvm_ir()
    rows = []
    for mask in range(256):
        kept = [mask >> lane & 1 for lane in range(EIGHT)]
        rows += [sum(kept[:lane]) if kept[lane] else GONE for lane in range(EIGHT)]
    return ir.Constant(ir.ArrayType(ir.IntType(8), len(rows)), bytearray(rows))


def _number(value: int) -> Any:
    return llvm_ir().Constant(llvm_ir().IntType(64), value)
