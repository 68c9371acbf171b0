"""Triton: products with trellis codes in the rotated basis, and their rows.

A walk, the 256 weights of a tile of 16 rows, is read in runs of weights of one row: eight, half a
row, or four: in the order mma (methods/maths/tile_order.py) and at half bits. PAIR is the bits of
two weights. The state of a weight is the last L bits up to its own (methods/maths/walks.py): those
of a run are in two words of 32 bits, or three. A program has BN rows and BK tiles of each at once,
neighbours in memory in neighbouring threads, and puts the weights of all runs in order before it
multiplies. Values of states are computed where the codebook has a formula
(methods/maths/codebook.py), else read from a table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import finish, multiply, nothing, rows_of, write


@triton.jit
def half_of(bits):  # type: ignore[no-untyped-def]
    """Return half-precision numbers given as the low 16 bits of integers uint32."""
    return bits.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def times(x, y):  # type: ignore[no-untyped-def]
    """Return the product of numbers in units of 2^-15, rounded."""
    return (x * y + 16384) >> 15


@triton.jit
def weyl(state, FACTOR: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the values of `weyl`; FACTOR is its multiplier times 2^(32 - L): all else is lost."""
    t = ((state * FACTOR).to(tl.int32, bitcast=True) >> 16) | HALF
    fourth = times(times(t, t), times(t, t))
    eighth = times(fourth, fourth)
    sixteenth = times(eighth, eighth)
    power = times(sixteenth, sixteenth)
    return times(t, 666 + times(fourth, 381 + times(power, 489))).to(tl.float32) / 512


@triton.jit
def value_of(  # type: ignore[no-untyped-def]
    state, table, n, L: tl.constexpr, BOOK: tl.constexpr, FACTOR: tl.constexpr, HALF: tl.constexpr
):
    """Return the values float32 of states uint32, whose lowest L bits count.

    Every step is exact but the one rounding, to half precision.
    """
    if BOOK == "weyl":
        value = weyl(state, FACTOR, HALF)
    else:
        state = state & ((1 << L) - 1)
        if BOOK == "mul1":
            x = state * 0x83DCD12D
            total = (x & 255) + ((x >> 8) & 255) + ((x >> 16) & 255) + (x >> 24)
            scale, shift = half_of(tl.zeros_like(x) + 0x1EEE), half_of(tl.zeros_like(x) + 0xC931)
            sum_of = half_of(total + 0x6400).to(tl.float32) * scale.to(tl.float32)
            value = (sum_of + shift.to(tl.float32)).to(tl.float16).to(tl.float32)
        elif BOOK == "mcg" or BOOK == "3inst":
            if BOOK == "mcg":
                x = state * 0xCBAC1FED
            else:
                x = state * 89226354 + 64248484
            # with n, which the compiler does not know, the mask and this are one operation, not two
            flip = ((n & -2147483648) ^ 0x3B603B60).to(tl.uint32, bitcast=True)
            x = (x & 0x8FFF8FFF) ^ flip
            value = (half_of(x) + half_of(x >> 16)).to(tl.float32)
        else:
            value = tl.load(table + state).to(tl.float32)
    return value


@triton.jit
def start_of(starts, walk, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the WIDTH <= 15 bits before a walk, uint32: those of all walks are one string."""
    bit = walk * WIDTH
    byte, some = bit // 8, tl.zeros_like(walk).to(tl.uint32)
    for b in tl.static_range(3):
        own = tl.load(starts + byte + b, mask=8 * (byte + b) < bit + WIDTH, other=0)
        some = (some << 8) | own.to(tl.uint32)
    return (some >> (24 - WIDTH - bit % 8).to(tl.uint32)) & ((1 << WIDTH) - 1)


@triton.jit
def word_of(  # type: ignore[no-untyped-def]
    base, starts, walk, tile, at, PAIR: tl.constexpr, L: tl.constexpr
):
    """Return the word `at` of walks, uint32, the first bit the highest.

    base: where the walks of a row of tiles begin; tile: the number of each in that row. Before the
    first word is the last, or where a walk does not bite its tail, its start.
    """
    word = tl.load(base + (tile * (4 * PAIR) + tl.where(at < 0, at + 4 * PAIR, at)))
    word = ((word & 0x00FF00FF) << 8) | ((word >> 8) & 0x00FF00FF)
    word = (word << 16) | (word >> 16)
    if starts is not None:
        word = tl.where(at < 0, start_of(starts, walk, L - PAIR // 2), word)
    return word


@triton.jit
def bits_of(  # type: ignore[no-untyped-def]
    codes, starts, row, tile, wide,
    PAIR: tl.constexpr, L: tl.constexpr, MMA: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Return the 64 bits up to the end of each run, uint64, and the 32 before them, uint32.

    row (BN * 16 / RUN,): each as often as it has runs; tile (BK,). The second is 0 where the states
    of a run need no more than 64 bits.
    """
    EACH: tl.constexpr = 16 // RUN  # runs in a row of a tile
    OWN: tl.constexpr = RUN * PAIR // 2  # bits of a run
    # it ends at a multiple of its bits, up to so many bits before the end of a word
    AFTER: tl.constexpr = (
        0 if OWN % 32 == 0 else 16 if OWN % 16 == 0 else 24 if OWN % 8 == 0 else 30
    )
    part = tl.arange(0, row.shape[0]) % EACH
    if MMA:
        run = 8 * (row % 8) + row // 8 % 2 + 2 * part
    else:
        run = EACH * (row % 16) + part
    end = OWN * (run + 1)
    last = ((end + 31) // 32 - 1)[None, :]
    after = (32 * last + 32 - end[None, :]).to(tl.uint64)
    walk, tile = (row // 16).to(tl.int64)[None, :] * wide, tile[:, None]
    base = codes.to(tl.pointer_type(tl.uint32)) + walk * (4 * PAIR)
    walk += tile
    new = word_of(base, starts, walk, tile, last, PAIR, L).to(tl.uint64)
    past = word_of(base, starts, walk, tile, last - 1, PAIR, L)
    new = ((past.to(tl.uint64) << 32) | new) >> after
    past = tl.zeros_like(past)
    if OWN + L - PAIR // 2 + AFTER > 64:
        past = word_of(base, starts, walk, tile, last - 2, PAIR, L)
        new = new | ((past.to(tl.uint64) << 32) << (32 - after))
        past = past >> after.to(tl.uint32)
    return new, past


@triton.jit
def weight_of(  # type: ignore[no-untyped-def]
    new, past, table, n, J: tl.constexpr, PAIR: tl.constexpr, L: tl.constexpr, BOOK: tl.constexpr,
    FACTOR: tl.constexpr, HALF: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Return the J-th weight of each run, float32."""
    LATER: tl.constexpr = RUN * PAIR // 2 - (J + 1) * PAIR // 2  # bits of the weights after it
    if LATER + L > 64:
        state = (((past.to(tl.uint64) << 32) | (new >> 32)) >> (LATER - 32)).to(tl.uint32)
    else:
        state = (new >> LATER).to(tl.uint32)
    return value_of(state, table, n, L, BOOK, FACTOR, HALF)


@triton.jit
def weights_of(  # type: ignore[no-untyped-def]
    codes, starts, table, row, tile, n, wide,
    PAIR: tl.constexpr, L: tl.constexpr, BOOK: tl.constexpr, FACTOR: tl.constexpr,
    HALF: tl.constexpr, MMA: tl.constexpr, RUN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return the weights (BN, 16 BK) float32 of rows in these tiles; arguments as in `bits_of`."""
    new, past = bits_of(codes, starts, row, tile, wide, PAIR, L, MMA, RUN)
    # tl.join adds the last dimension: the first bit of J is joined first
    w0 = weight_of(new, past, table, n, 0, PAIR, L, BOOK, FACTOR, HALF, RUN)
    w1 = weight_of(new, past, table, n, 1, PAIR, L, BOOK, FACTOR, HALF, RUN)
    w2 = weight_of(new, past, table, n, 2, PAIR, L, BOOK, FACTOR, HALF, RUN)
    w3 = weight_of(new, past, table, n, 3, PAIR, L, BOOK, FACTOR, HALF, RUN)
    if RUN == 8:
        w4 = weight_of(new, past, table, n, 4, PAIR, L, BOOK, FACTOR, HALF, RUN)
        w5 = weight_of(new, past, table, n, 5, PAIR, L, BOOK, FACTOR, HALF, RUN)
        w6 = weight_of(new, past, table, n, 6, PAIR, L, BOOK, FACTOR, HALF, RUN)
        w7 = weight_of(new, past, table, n, 7, PAIR, L, BOOK, FACTOR, HALF, RUN)
        even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
        odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    else:
        even, odd = tl.join(w0, w2), tl.join(w1, w3)
    w = tl.join(even, odd)
    if MMA:  # weights of a run are at columns 2 part + (0, 1, 8, 9)
        w = tl.permute(tl.reshape(w, (BK, BN, 4, 2, 2)), (1, 0, 3, 2, 4))
    else:
        w = tl.permute(tl.reshape(w, (BK, BN, 16)), (1, 0, 2))
    return tl.reshape(w, (BN, 16 * BK))


@triton.jit
def add_up(  # type: ignore[no-untyped-def]
    x, codes, starts, table, first, rows, token, tokens, n, wide,
    PAIR: tl.constexpr, L: tl.constexpr, BOOK: tl.constexpr, FACTOR: tl.constexpr,
    HALF: tl.constexpr, MMA: tl.constexpr, RUN: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return the sums of x Y^T for BN stored rows from `first` on and BM tokens, for `finish`."""
    EACH: tl.constexpr = 16 // RUN
    sums = nothing(ONE, BM, BN, 16 * BK)
    row = tl.minimum(first + tl.arange(0, BN * EACH) // EACH, rows - 1)
    for t0 in range(0, wide, BK):
        tile = tl.minimum(t0 + tl.arange(0, BK), wide - 1)
        w = weights_of(
            codes, starts, table, row, tile, n, wide,
            PAIR, L, BOOK, FACTOR, HALF, MMA, RUN, BN, BK,
        )  # fmt: skip
        column = 16 * t0 + tl.arange(0, 16 * BK)
        sums = multiply(sums, w, x, token, tokens, column, column < n, n, ONE, EXACT)
    return sums


@triton.jit
def product(  # type: ignore[no-untyped-def]
    x, codes, starts, table, start, bias, order, y, tokens, rows, n, width, wide,
    PAIR: tl.constexpr, L: tl.constexpr, BOOK: tl.constexpr, FACTOR: tl.constexpr,
    HALF: tl.constexpr, MMA: tl.constexpr, RUN: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write x Y^T + start + bias to y for BN stored rows and BM tokens."""
    first = tl.program_id(0) * BN
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    sums = add_up(
        x, codes, starts, table, first, rows, token, tokens, n, wide,
        PAIR, L, BOOK, FACTOR, HALF, MMA, RUN, ONE, EXACT, BM, BN, BK,
    )  # fmt: skip
    row = first + tl.arange(0, BN)
    finish(sums, y, start, bias, order, row, rows, token, tokens, width, ONE)


@triton.jit
def unpack(  # type: ignore[no-untyped-def]
    codes, starts, table, ids, y, first, rows, all_rows, n, wide,
    PAIR: tl.constexpr, L: tl.constexpr, BOOK: tl.constexpr, FACTOR: tl.constexpr,
    HALF: tl.constexpr, MMA: tl.constexpr, RUN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write stored rows, those that ids names or from `first` on, to y (rows, n)."""
    EACH: tl.constexpr = 16 // RUN
    out, _, is_row = rows_of(ids, first, rows, all_rows, BN)
    place = tl.program_id(0) * BN + tl.arange(0, BN * EACH) // EACH
    row = place + first
    if ids is not None:
        row = tl.load(ids + place, mask=place < rows, other=0)
    row = tl.minimum(tl.maximum(row, 0), all_rows - 1).to(tl.int32)
    t0 = tl.program_id(1) * BK
    tile = tl.minimum(t0 + tl.arange(0, BK), wide - 1)
    w = weights_of(
        codes, starts, table, row, tile, n, wide, PAIR, L, BOOK, FACTOR, HALF, MMA, RUN, BN, BK
    )
    column = 16 * t0 + tl.arange(0, 16 * BK)
    write(w, y, out, rows, is_row, column, column < n, n)
