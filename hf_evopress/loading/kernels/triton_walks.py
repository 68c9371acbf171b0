"""Triton: products with trellis codes in the rotated basis, and their rows.

A walk is read in runs of weights of one row: eight, half a row of a tile, or four: in the order mma
(methods/maths/tile_order.py) and at half bits. PAIR is the bits of two weights. The state of a
weight is the last bits up to its own (methods/maths/walks.py). A program has runs of BN outputs, BK
runs of each at once, and takes the first weight of each run, then the second, ... Values of states
are computed where the codebook has a formula (methods/maths/codebook.py), else read from a table.
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
def start_of(starts, walk, is_there, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the WIDTH <= 15 bits before a walk, uint32: those of all walks are one string."""
    bit = walk * WIDTH
    byte, some = bit // 8, tl.zeros_like(walk).to(tl.uint32)
    for b in tl.static_range(3):
        is_needed = is_there & (8 * (byte + b) < bit + WIDTH)
        some = (some << 8) | tl.load(starts + byte + b, mask=is_needed, other=0).to(tl.uint32)
    return (some >> (24 - WIDTH - bit % 8).to(tl.uint32)) & ((1 << WIDTH) - 1)


@triton.jit
def past_of(  # type: ignore[no-untyped-def]
    codes, starts, walk, at, is_there, PAIR: tl.constexpr, L: tl.constexpr
):
    """Return the 16 bits before byte `at` of a walk, uint32.

    Before its first byte is its last, or where it does not bite its tail, a start.
    """
    past, base = tl.zeros_like(at).to(tl.uint32), codes + walk * (16 * PAIR)
    if starts is not None:
        start = start_of(starts, walk, is_there & (at < 2), L - PAIR // 2)
    for b in tl.static_range(2):
        byte = at - 2 + b
        own = tl.load(base + tl.where(byte < 0, byte + 16 * PAIR, byte), mask=is_there, other=0)
        own = own.to(tl.uint32)
        if starts is not None:
            own = tl.where(byte < 0, (start >> tl.where(byte < -1, 8, 0)) & 255, own)
        past = (past << 8) | own
    return past


@triton.jit
def bits_of(  # type: ignore[no-untyped-def]
    codes, starts, row, run, is_there, wide,
    PAIR: tl.constexpr, L: tl.constexpr, MMA: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Return the bits of runs, uint64, and the 16 bits before them, uint32 (0: among the former).

    A run of eight has whole bytes. One of four may begin within a byte, and then the bits before
    it are above its own.
    """
    each: tl.constexpr = 16 // RUN  # runs in a row of a tile
    own: tl.constexpr = RUN * PAIR // 2  # bits of a run
    # its bytes: a run of four begins at any even bit at half bits, else at a multiple of four
    most: tl.constexpr = 7 if RUN == 8 or PAIR % 4 == 0 else 11 if PAIR % 2 == 0 else 13
    size: tl.constexpr = (own + most) // 8
    walk = (row // 16).to(tl.int64)[:, None] * wide + (run // each)[None, :]
    if MMA:
        bit = (own * (8 * (row % 8) + row // 8 % 2))[:, None] + (2 * own * (run % 4))[None, :]
    else:
        bit = (8 * PAIR * (row % 16))[:, None] + (own * (run % each))[None, :]
    at = bit // 8
    past = past_of(codes, starts, walk, at, is_there, PAIR, L)
    new = tl.zeros_like(at).to(tl.uint64)
    if RUN == 4:
        new += past
    for b in tl.static_range(size):
        is_needed = is_there
        if RUN == 4:
            is_needed = is_there & (at + b < 16 * PAIR)
        byte = tl.load(codes + walk * (16 * PAIR) + at + b, mask=is_needed, other=0)
        new = (new << 8) | byte.to(tl.uint64)
    if RUN == 4:
        past = tl.zeros_like(past)
        new = new >> (8 * size - own - bit % 8).to(tl.uint64)
    return new, past


@triton.jit
def weights_of(  # type: ignore[no-untyped-def]
    new, past, table, is_there, J: tl.constexpr, PAIR: tl.constexpr, L: tl.constexpr,
    BOOK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Return the J-th weight of each run, float32."""
    upto: tl.constexpr = (J + 1) * PAIR // 2  # bits of the run up to and with this weight
    state = (new >> (RUN * PAIR // 2 - upto)).to(tl.uint32)
    if RUN == 8 and upto < L:
        # bits of this and of earlier weights of the run alone, then those of the past
        state = (state & ((1 << upto) - 1)) | (past << upto)
    return value_of(state & ((1 << L) - 1), table, is_there, BOOK)


@triton.jit
def column_of(run, J: tl.constexpr, MMA: tl.constexpr, RUN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the column of the J-th weight of each run."""
    if MMA:
        column = 16 * (run // 4) + 2 * (run % 4) + 8 * (J // 2) + J % 2
    else:
        column = RUN * run + J
    return column


@triton.jit
def add_up(  # type: ignore[no-untyped-def]
    x, codes, starts, table, row, is_row, token, tokens, n, wide,
    PAIR: tl.constexpr, L: tl.constexpr, BOOK: tl.constexpr, MMA: tl.constexpr, RUN: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return the sums of x Y^T for BN stored rows and BM tokens, as `finish` takes them."""
    sums = nothing(ONE, BM, BN, BK)
    runs = wide * (16 // RUN)
    for r0 in range(0, runs, BK):
        run = r0 + tl.arange(0, BK)
        is_there = is_row[:, None] & (run < runs)[None, :]
        new, past = bits_of(codes, starts, row, run, is_there, wide, PAIR, L, MMA, RUN)
        for J in tl.static_range(RUN):
            w = weights_of(new, past, table, is_there, J, PAIR, L, BOOK, RUN)
            column = column_of(run, J, MMA, RUN)
            sums = multiply(sums, w, x, token, tokens, column, column < n, n, ONE, EXACT)
    return sums


@triton.jit
def product(  # type: ignore[no-untyped-def]
    x, codes, starts, table, start, bias, order, y, tokens, rows, n, width, wide,
    PAIR: tl.constexpr, L: tl.constexpr, BOOK: tl.constexpr, MMA: tl.constexpr, RUN: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write x Y^T + start + bias to y for BN stored rows and BM tokens."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    sums = add_up(
        x, codes, starts, table, row, row < rows, token, tokens, n, wide,
        PAIR, L, BOOK, MMA, RUN, ONE, EXACT, BM, BN, BK,
    )  # fmt: skip
    finish(sums, y, start, bias, order, row, rows, token, tokens, width, ONE)


@triton.jit
def unpack(  # type: ignore[no-untyped-def]
    codes, starts, table, ids, y, first, rows, all_rows, n, wide,
    PAIR: tl.constexpr, L: tl.constexpr, BOOK: tl.constexpr, MMA: tl.constexpr, RUN: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write stored rows, those that ids names or from `first` on, to y (rows, n)."""
    out, row, is_row = rows_of(ids, first, rows, all_rows, BN)
    run = tl.program_id(1) * BK + tl.arange(0, BK)
    is_there = is_row[:, None] & (run < wide * (16 // RUN))[None, :]
    new, past = bits_of(codes, starts, row, run, is_there, wide, PAIR, L, MMA, RUN)
    for J in tl.static_range(RUN):
        w = weights_of(new, past, table, is_there, J, PAIR, L, BOOK, RUN)
        column = column_of(run, J, MMA, RUN)
        write(w, y, out, rows, is_row, column, column < n, n)
