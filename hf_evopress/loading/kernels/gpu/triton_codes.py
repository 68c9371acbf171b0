"""Triton: products with packed codes of 1 to 8 bits, and their rows.

A packed row is bit planes in eighths of its columns (methods/maths/packing.py): the byte i of
a plane holds the bits of columns i, i + n/8, ... So a program takes BK bytes of every plane and
has the codes of 8 BK columns, those of one eighth at a time; every byte is read once. Four bytes
are worked on as one word where rows have whole words (WIDE). Codes become numbers as the last bits
of 2^23: no conversion, and the difference from a zero point is exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_fours import add_up_fours
from .triton_grids import grid_at, row_grid
from .triton_tiles import finish, multiply, nothing, rows_of, write


@triton.jit
def eighth(base, j, is_there, words, E: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes of words j of the eighth E of rows that begin at `base`, uint32.

    words: of an eighth; each byte of a word is a code.
    """
    if BITS == 8:
        code = tl.load(base + E * words + j, mask=is_there, other=0).to(tl.uint32)
    else:
        code = tl.zeros_like(j + is_there.to(tl.int32)).to(tl.uint32)
        if BITS & 4:
            part = tl.load(base + (E % 4) * words + j, mask=is_there, other=0).to(tl.uint32)
            code = ((part >> (4 * (E // 4))) & 0x0F0F0F0F) << (BITS & 3)
        if BITS & 2:
            place = base + ((BITS & 4) + E % 2) * words + j
            part = tl.load(place, mask=is_there, other=0).to(tl.uint32)
            code |= ((part >> (2 * (E // 2))) & 0x03030303) << (BITS & 1)
        if BITS & 1:
            place = base + (BITS & 6) * words + j
            part = tl.load(place, mask=is_there, other=0).to(tl.uint32)
            code |= (part >> E) & 0x01010101
    return code


@triton.jit
def number_of(code, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return 2^23 + the byte B of words, float32."""
    return (((code >> (8 * B)) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def numbers_of(code, WIDE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return 2^23 + each byte of words (BN, BK / WIDE), float32 (BN, BK)."""
    q = number_of(code, 0)
    if WIDE == 4:
        even, odd = tl.join(q, number_of(code, 2)), tl.join(number_of(code, 1), number_of(code, 3))
        q = tl.reshape(tl.join(even, odd), (BN, BK))
    return q


@triton.jit
def weights_of(  # type: ignore[no-untyped-def]
    codes, scales, zeros, row, is_row, i0, i, n, octets, zero_octets, groups,
    E: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, WHOLE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return the weights (BN, BK) float32 of columns E * octets + i: (code - zero) * scale.

    ALIGNED: those columns of a row have one scale. WHOLE: the same, all rows and columns are there,
    and the number of rows is a multiple of 8.
    """
    words, places = octets // WIDE, codes
    if WIDE == 4:
        places = codes.to(tl.pointer_type(tl.uint32))
    j = i0 // WIDE + tl.arange(0, BK // WIDE)
    is_there = is_row[:, None] & (j < words)[None, :]
    if WHOLE:
        is_there = tl.full((BN, BK // WIDE), True, tl.int1)
    base = places + row.to(tl.int64)[:, None] * (BITS * words)
    q = numbers_of(eighth(base, j[None, :], is_there, words, E, BITS), WIDE, BN, BK)
    if ALIGNED:
        # columns that pad the last byte of a row belong to no group
        group = tl.minimum((E * octets + i0) // GROUP, groups - 1)
        if WHOLE:
            scale, zero = row_grid(scales, zeros, row, group, zero_octets, groups, BITS)
            zero = zero.to(tl.float32)
        else:
            at = row * groups + group
            scale, zero = grid_at(scales, zeros, at, is_row, zero_octets, BITS)
        w = (q - (zero + 8388608.0)[:, None]) * scale[:, None]
    else:
        column = E * octets + i
        at = row[:, None] * groups + (column // GROUP)[None, :]
        is_there = is_row[:, None] & ((i < octets) & (column < n))[None, :]
        scale, zero = grid_at(scales, zeros, at, is_there, zero_octets, BITS)
        w = (q - (zero + 8388608.0)) * scale
    return w


@triton.jit
def add_up_weights(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, row, is_row, token, tokens, n, octets, zero_octets, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return the same by weights: for any number of tokens, and any codes."""
    sums = nothing(ONE, BM, BN, BK)
    for i0 in range(0, octets, BK):
        i = i0 + tl.arange(0, BK)
        for E in tl.static_range(8):
            w = weights_of(
                codes, scales, zeros, row, is_row, i0, i, n, octets, zero_octets, groups,
                E, BITS, GROUP, ALIGNED, WIDE, WHOLE, BN, BK,
            )  # fmt: skip
            column = E * octets + i
            is_column = (i < octets) & (column < n)
            if WHOLE:
                is_column = tl.full((BK,), True, tl.int1)
            sums = multiply(sums, w, x, token, tokens, column, is_column, n, ONE, EXACT)
    return sums


@triton.jit
def add_up(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, row, is_row, token, tokens, n, octets, zero_octets, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, PARTS: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return the sums of x W^T for BN rows of W and BM tokens, as `finish` takes them."""
    if WHOLE:
        row = tl.where(is_row, row, 0)
    if ONE and WHOLE and WIDE == 4 and BITS < 8 and x.dtype.element_ty.primitive_bitwidth == 16:
        sums = add_up_fours(
            x, codes, scales, zeros, row, octets, zero_octets, groups, BITS, GROUP, PARTS, BN, BK
        )
    else:
        sums = add_up_weights(
            x, codes, scales, zeros, row, is_row, token, tokens, n, octets, zero_octets, groups,
            BITS, GROUP, ALIGNED, WIDE, WHOLE, ONE, EXACT, BM, BN, BK,
        )  # fmt: skip
    return sums


@triton.jit
def product(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, start, bias, order, y,
    tokens, rows, n, width, octets, zero_octets, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, PARTS: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write x W^T + start + bias to y for BN rows of W and BM tokens."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    sums = add_up(
        x, codes, scales, zeros, row, row < rows, token, tokens, n, octets, zero_octets, groups,
        BITS, GROUP, ALIGNED, WIDE, WHOLE, PARTS, ONE, EXACT, BM, BN, BK,
    )  # fmt: skip
    finish(sums, y, start, bias, order, row, rows, token, tokens, width, ONE)


@triton.jit
def unpack(  # type: ignore[no-untyped-def]
    codes, scales, zeros, ids, y,
    first, rows, all_rows, n, octets, zero_octets, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write rows of W, those that ids names or from `first` on, to y (rows, n)."""
    out, row, is_there = rows_of(ids, first, rows, all_rows, BN)
    i0 = tl.program_id(1) * BK
    i = i0 + tl.arange(0, BK)
    for E in tl.static_range(8):
        w = weights_of(
            codes, scales, zeros, row, is_there, i0, i, n, octets, zero_octets, groups,
            E, BITS, GROUP, ALIGNED, WIDE, False, BN, BK,  # rows may be anywhere
        )  # fmt: skip
        column = E * octets + i
        is_column = (i < octets) & (column < n)
        write(w, y, out, rows, is_there, column, is_column, n)
