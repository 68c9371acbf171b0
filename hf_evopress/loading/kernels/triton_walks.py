"""Triton: products with trellis codes in the rotated basis, and their rows.

Eight weights, half a row of a tile, bring as many bytes as a weight has bits; the state of each is
the last bits up to its own (methods/maths/walks.py). A program has half rows of BN outputs and BK
tiles' halves, and takes the first of each eight weights, then the second, ... Values of states are
computed where the codebook has a formula (methods/maths/codebook.py), else read from a table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import finish, multiply, nothing, rows_of, write


@triton.jit
def half_of(bits):  # type: ignore[no-untyped-def]
    """Return float32 of half-precision numbers given as the low 16 bits of integers."""
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def value_of(state, table, is_there, BOOK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the value float32 of each state uint32; every step is exact but the one rounding."""
    if BOOK == "mul1":
        x = state * 0x83DCD12D
        total = (x & 255) + ((x >> 8) & 255) + ((x >> 16) & 255) + (x >> 24)
        scale, shift = half_of(tl.zeros_like(x) + 0x1EEE), half_of(tl.zeros_like(x) + 0xC931)
        value = half_of(total + 0x6400) * scale + shift
        value = value.to(tl.float16).to(tl.float32)
    elif BOOK == "mcg" or BOOK == "3inst":
        if BOOK == "mcg":
            x = state * 0xCBAC1FED
        else:
            x = state * 89226354 + 64248484
        x = (x & 0x8FFF8FFF) ^ 0x3B603B60
        value = (half_of(x & 0xFFFF) + half_of(x >> 16)).to(tl.float16).to(tl.float32)
    else:
        value = tl.load(table + state, mask=is_there, other=0.0).to(tl.float32)
    return value


@triton.jit
def bits_of(codes, row, half, is_there, tiles, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the 8 K bits of eight weights, uint64, and the 16 bits before them, uint32.

    Those before the first row of a tile are at the tile's end.
    """
    tile = (row // 16).to(tl.int64)[:, None] * tiles + (half // 2)[None, :]
    base = codes + tile * (32 * K)
    at = (2 * K * (row % 16))[:, None] + (K * (half % 2))[None, :]
    new = tl.zeros_like(at).to(tl.uint64)
    for b in tl.static_range(K):
        byte = tl.load(base + at + b, mask=is_there, other=0)
        new = (new << 8) | byte.to(tl.uint64)
    before = tl.where(at == 0, 32 * K, at)
    past = tl.load(base + before - 2, mask=is_there, other=0).to(tl.uint32) << 8
    past |= tl.load(base + before - 1, mask=is_there, other=0).to(tl.uint32)
    return new, past


@triton.jit
def weights_of(  # type: ignore[no-untyped-def]
    new, past, table, is_there, J: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
    BOOK: tl.constexpr,
):  # fmt: skip
    """Return the J-th of each eight weights, float32."""
    state = (new >> (K * (7 - J))).to(tl.uint32)
    if K * (J + 1) < L:
        # bits of this and of earlier weights of the eight alone, then those of the past
        state = (state & ((1 << (K * (J + 1))) - 1)) | (past << (K * (J + 1)))
    return value_of(state & ((1 << L) - 1), table, is_there, BOOK)


@triton.jit
def product(  # type: ignore[no-untyped-def]
    x, codes, table, start, bias, order, y, tokens, rows, n, width, tiles,
    K: tl.constexpr, L: tl.constexpr, BOOK: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write x Y^T + start + bias to y for BN stored rows and BM tokens."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    sums = nothing(ONE, BM, BN, BK)
    for h0 in range(0, 2 * tiles, BK):
        half = h0 + tl.arange(0, BK)
        is_there = (row < rows)[:, None] & (half < 2 * tiles)[None, :]
        new, past = bits_of(codes, row, half, is_there, tiles, K)
        for J in tl.static_range(8):
            w = weights_of(new, past, table, is_there, J, K, L, BOOK)
            column = 8 * half + J
            sums = multiply(sums, w, x, token, tokens, column, column < n, n, ONE, EXACT)
    finish(sums, y, start, bias, order, row, rows, token, tokens, width, ONE)


@triton.jit
def unpack(  # type: ignore[no-untyped-def]
    codes, table, ids, y, first, rows, all_rows, n, tiles,
    K: tl.constexpr, L: tl.constexpr, BOOK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write stored rows, those that ids names or from `first` on, to y (rows, n)."""
    out, row, is_row = rows_of(ids, first, rows, all_rows, BN)
    half = tl.program_id(1) * BK + tl.arange(0, BK)
    is_there = is_row[:, None] & (half < 2 * tiles)[None, :]
    new, past = bits_of(codes, row, half, is_there, tiles, K)
    for J in tl.static_range(8):
        w = weights_of(new, past, table, is_there, J, K, L, BOOK)
        column = 8 * half + J
        write(w, y, out, rows, is_row, column, column < n, n)
