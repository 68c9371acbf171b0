"""Sums of codes times 16-bit integers, for several rows and tokens at a time.

A code that is made a 16-bit integer is multiplied with several tokens, an input that is loaded
with several rows: alone, loading either takes longer than multiplying. LLVM makes one instruction
of a multiplication and its sum where a processor has it (AVX-512 VNNI).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .lanes import constant_of, fold, llvm_ir, place_of, splat_at, spread_of, vector_of
from .vectors import fetch_ahead

CHUNKS = (128, 64, 32, 16)  # weights whose products are summed as integers
AT_ONCE = {0: 2, 32: 2, 64: 4}  # rows, by the bytes of a vector: AVX2 has registers for two
TOGETHER = 2  # tokens, where there are as many
SUMMED = ("contract",)  # a product and a sum may be one instruction


def intrinsics(*, width: int) -> dict[str, Any]:
    """Return name -> function for numba code; width: bytes of a vector, 0 without AVX2."""
    rows = AT_ONCE[width]
    shapes = {"dot_row": (1, 1), "dot": (rows, 1), "dots": (rows, TOGETHER)}
    return {
        f"{name}_{chunk}": dot_of(chunk, *shape, width)
        for chunk in CHUNKS
        for name, shape in shapes.items()
    }


def dot_of(chunk: int, rows: int, tokens: int, width: int) -> Any:
    """dot(codes, step, x, scales, zeros, x_scales, x_sums, room, n, sums).

    Writes to sums (rows, tokens) float32 the sums over n chunks of
    scale * x_scale * sum(code * x) - scale * zero * x_sum, for codes uint8 of rows `step` bytes
    apart, x (tokens, n * chunk) int16, and per row or token n scales, zeros and sums. All are
    addresses, room that of memory to work in. A chunk's sum of integers is exact:
    128 / 8 * 255 * 32767 is below 2^31.
    """
    from numba import types
    from numba.extending import intrinsic

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        if width:  # else never called: rows take the float32 way
            _Emitter(b, chunk, rows, tokens, width, *arguments).emit()
        return context.get_dummy_value()

    def typing(  # type: ignore[no-untyped-def]
        context, codes, step, x, scales, zeros, x_scales, x_sums, room, n, sums
    ) -> Any:
        return types.void(*[types.int64] * 10), emit

    return intrinsic(typing)


@dataclass
class _Emitter:
    """The code of one of them: b is the builder, the rest its arguments."""

    b: Any
    chunk: int
    rows: int
    tokens: int
    width: int
    codes: Any
    step: Any
    x: Any
    scales: Any
    zeros: Any
    x_scales: Any
    x_sums: Any
    room: Any
    n: Any
    sums: Any

    def __post_init__(self) -> None:
        from numba.core import cgutils

        self.words = min(self.width // 2, self.chunk)  # of a vector
        self.lanes = self.words // 2
        self.floats, self.ints = vector_of(0, self.lanes), vector_of(32, self.lanes)
        self.pairs = [(row, token) for row in range(self.rows) for token in range(self.tokens)]
        zero = constant_of(self.floats, 0.0)
        self.totals = [cgutils.alloca_once_value(self.b, zero) for _ in self.pairs]
        # of the factors of one pair, a whole number of vectors
        self.row_of_room = self.b.and_(self.b.add(self.times(self.n, 4), _number(63)), _number(-64))

    def emit(self) -> None:
        from numba.core import cgutils

        b = self.b
        steps = b.sdiv(b.add(self.n, _number(self.lanes - 1)), _number(self.lanes))
        with cgutils.for_range(b, steps) as loop:
            self.scale(loop.index)
        with cgutils.for_range(b, self.n) as loop:
            self.add(loop.index)
        for i, total in enumerate(self.totals):
            found = fold(b, b.load(total), lambda b, one, other: b.fadd(one, other))
            b.store(found, place_of(b, self.sums, _number(i), found.type, 4), align=4)

    def times(self, number: Any, factor: int) -> Any:
        return self.b.mul(number, _number(factor))

    def row(self, base: Any, number: int) -> Any:
        """Return the address of what n chunks of a row or token have, float32."""
        return self.b.add(base, self.times(self.n, 4 * number))

    def factors(self, pair: int) -> Any:
        return self.b.add(self.room, self.times(self.row_of_room, pair))

    def scale(self, i: Any) -> None:
        """Write the i-th factors, a vector of them, and take from totals what zero points add."""
        b = self.b
        numbers = llvm_ir().Constant(self.ints, list(range(self.lanes)))
        left = spread_of(b, b.sub(self.n, self.times(i, self.lanes)), self.ints)
        is_there = b.icmp_signed("<", numbers, left)  # what comes after may be anything

        def load(base: Any, number: int) -> Any:
            place = place_of(b, self.row(base, number), i, self.floats, 4 * self.lanes)
            return b.load(place, align=4)

        of_tokens = [(load(self.x_scales, t), load(self.x_sums, t)) for t in range(self.tokens)]
        for row in range(self.rows):
            scale = load(self.scales, row)
            shift = b.fmul(scale, load(self.zeros, row))
            for token, (x_scale, x_sum) in enumerate(of_tokens):
                pair = row * self.tokens + token
                place = place_of(b, self.factors(pair), i, self.floats, 4 * self.lanes)
                b.store(b.fmul(scale, x_scale), place, align=4)
                part = b.fmul(shift, x_sum, flags=SUMMED)
                part = b.select(is_there, part, constant_of(self.floats, 0.0))
                total = b.fsub(b.load(self.totals[pair]), part, flags=SUMMED)
                b.store(total, self.totals[pair])

    def add(self, i: Any) -> None:
        """Add the products of the i-th chunk."""
        b, sums = self.b, dict[int, Any]()
        words, bytes_ = vector_of(16, self.words), vector_of(8, self.words)
        for k in range(0, self.chunk, self.words):
            here = b.add(self.times(i, self.chunk), _number(k))
            inputs = []
            for token in range(self.tokens):
                base = b.add(self.x, self.times(self.n, 2 * self.chunk * token))
                inputs.append(b.load(place_of(b, base, here, words, 2), align=2))
            for row in range(self.rows):
                base = b.add(self.codes, self.times(self.step, row))
                place = place_of(b, base, here, bytes_, 1)
                if self.rows == 1:  # which are read where they are stored
                    fetch_ahead(b, place)
                code = b.zext(b.load(place, align=1), words)
                for token in range(self.tokens):
                    pair = row * self.tokens + token
                    product = self.multiply(code, inputs[token])
                    sums[pair] = b.add(sums[pair], product) if pair in sums else product
        for pair, total in enumerate(self.totals):
            factor = splat_at(b, b.add(self.factors(pair), self.times(i, 4)), self.floats)
            part = b.fmul(b.sitofp(sums[pair], self.floats), factor, flags=SUMMED)
            b.store(b.fadd(b.load(total), part, flags=SUMMED), total)

    def multiply(self, code: Any, x: Any) -> Any:
        """Return sums of two neighbours' products, int32."""
        from numba.core import cgutils

        name = {16: "avx2.pmadd.wd", 32: "avx512.pmaddw.d.512"}[self.words]
        kind = llvm_ir().FunctionType(self.ints, [x.type, x.type])
        call = cgutils.get_or_insert_function(self.b.module, kind, f"llvm.x86.{name}")
        return self.b.call(call, [code, x])


def _number(value: int) -> Any:
    return llvm_ir().Constant(llvm_ir().IntType(64), value)
