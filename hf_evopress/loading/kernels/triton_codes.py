"""Triton: products with packed codes of 1 to 8 bits, and their rows.

A packed row is bit planes in eighths of its columns (methods/maths/packing.py): the byte i of
a plane holds the bits of columns i, i + n/8, ... So a program takes BO bytes of every plane and
has the codes of 8 BO columns, those of one eighth at a time; every byte is read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import finish, multiply, nothing, rows_of, write


@triton.jit
def eighth(base, i, is_there, octets, E: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes int32 of columns E * octets + i of rows that begin at `base`."""
    if BITS == 8:
        code = tl.load(base + E * octets + i, mask=is_there, other=0).to(tl.int32)
    else:
        code = tl.zeros_like(i + is_there.to(tl.int32)).to(tl.int32)
        if BITS & 4:
            part = tl.load(base + (E % 4) * octets + i, mask=is_there, other=0).to(tl.int32)
            code += ((part >> (4 * (E // 4))) & 15) << (BITS & 3)
        if BITS & 2:
            place = base + ((BITS & 4) + E % 2) * octets + i
            part = tl.load(place, mask=is_there, other=0).to(tl.int32)
            code += ((part >> (2 * (E // 2))) & 3) << (BITS & 1)
        if BITS & 1:
            place = base + (BITS & 6) * octets + i
            part = tl.load(place, mask=is_there, other=0).to(tl.int32)
            code += (part >> E) & 1
    return code


@triton.jit
def code_at(base, index, is_there, octets, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes int32 at any places of one packed row of 8 * octets codes."""
    if BITS == 8:
        code = tl.load(base + index, mask=is_there, other=0).to(tl.int32)
    else:
        code = tl.zeros_like(index).to(tl.int32)
        if BITS & 4:
            part = tl.load(base + index % (4 * octets), mask=is_there, other=0).to(tl.int32)
            code += ((part >> (4 * (index // (4 * octets)))) & 15) << (BITS & 3)
        if BITS & 2:
            place = base + (BITS & 4) * octets + index % (2 * octets)
            part = tl.load(place, mask=is_there, other=0).to(tl.int32)
            code += ((part >> (2 * (index // (2 * octets)))) & 3) << (BITS & 1)
        if BITS & 1:
            place = base + (BITS & 6) * octets + index % octets
            part = tl.load(place, mask=is_there, other=0).to(tl.int32)
            code += (part >> (index // octets)) & 1
    return code


@triton.jit
def grid_at(scales, zeros, index, is_there, zero_octets, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return scale and zero point, float32, of groups numbered over all rows; 0 where masked."""
    scale = tl.load(scales + index, mask=is_there, other=0.0).to(tl.float32)
    if zeros is not None:
        zero = code_at(zeros, index, is_there, zero_octets, BITS).to(tl.float32)
    else:
        zero = tl.zeros_like(scale) + (1 << (BITS - 1))
    return scale, zero


@triton.jit
def weights_of(  # type: ignore[no-untyped-def]
    codes, scales, zeros, row, is_row, i0, i, n, octets, zero_octets, groups,
    E: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return the weights (BN, BO) float32 of columns E * octets + i: (code - zero) * scale.

    ALIGNED: those columns of a row have one scale.
    """
    is_there = is_row[:, None] & (i < octets)[None, :]
    base = codes + row.to(tl.int64)[:, None] * (BITS * octets)
    q = eighth(base, i[None, :], is_there, octets, E, BITS)
    if ALIGNED:
        # columns that pad the last byte of a row belong to no group
        at = row * groups + tl.minimum((E * octets + i0) // GROUP, groups - 1)
        scale, zero = grid_at(scales, zeros, at, is_row, zero_octets, BITS)
        w = (q.to(tl.float32) - zero[:, None]) * scale[:, None]
    else:
        column = E * octets + i
        at = row[:, None] * groups + (column // GROUP)[None, :]
        is_there = is_there & (column < n)[None, :]
        scale, zero = grid_at(scales, zeros, at, is_there, zero_octets, BITS)
        w = (q.to(tl.float32) - zero) * scale
    return w


@triton.jit
def add_up(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, row, is_row, token, tokens, n, octets, zero_octets, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return the sums of x W^T for BN rows of W and BM tokens, as `finish` takes them."""
    sums = nothing(ONE, BM, BN, BK)
    for i0 in range(0, octets, BK):
        i = i0 + tl.arange(0, BK)
        for E in tl.static_range(8):
            w = weights_of(
                codes, scales, zeros, row, is_row, i0, i, n, octets, zero_octets, groups,
                E, BITS, GROUP, ALIGNED,
            )  # fmt: skip
            column = E * octets + i
            is_column = (i < octets) & (column < n)
            sums = multiply(sums, w, x, token, tokens, column, is_column, n, ONE, EXACT)
    return sums


@triton.jit
def product(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, start, bias, order, y,
    tokens, rows, n, width, octets, zero_octets, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write x W^T + start + bias to y for BN rows of W and BM tokens."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    sums = add_up(
        x, codes, scales, zeros, row, row < rows, token, tokens, n, octets, zero_octets, groups,
        BITS, GROUP, ALIGNED, ONE, EXACT, BM, BN, BK,
    )  # fmt: skip
    finish(sums, y, start, bias, order, row, rows, token, tokens, width, ONE)


@triton.jit
def unpack(  # type: ignore[no-untyped-def]
    codes, scales, zeros, ids, y,
    first, rows, all_rows, n, octets, zero_octets, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write rows of W, those that ids names or from `first` on, to y (rows, n)."""
    out, row, is_there = rows_of(ids, first, rows, all_rows, BN)
    i0 = tl.program_id(1) * BK
    i = i0 + tl.arange(0, BK)
    for E in tl.static_range(8):
        w = weights_of(
            codes, scales, zeros, row, is_there, i0, i, n, octets, zero_octets, groups,
            E, BITS, GROUP, ALIGNED,
        )  # fmt: skip
        column = E * octets + i
        is_column = (i < octets) & (column < n)
        write(w, y, out, rows, is_there, column, is_column, n)
