"""Rows of a packed weight, unpacked into the cache: the first half of what numba compiles.

A task (`../task.py`) says where the packed tensors are; `s` is the memory of the thread. The
numbers are those of decompress(), to the bit: (code - zero) * scale in float32. Addresses, loads
instead of arrays: numba compiles those four times as fast, and checks no index.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..task import (
    ALL_ROWS,
    BFLOAT16,
    BITS,
    CODED,
    CODES,
    FLOAT_CODES,
    FLOATS,
    GROUPS,
    KEPT,
    KEPT_CODES,
    MASK,
    MMA_WALKS,
    NUMBER_BITS,
    PLACES,
    PLACES_WIDTH,
    ROOM,
    SCALE,
    SCALE_KIND,
    SCALES,
    SOURCE,
    SPARSE_FLOATS,
    STARTS,
    TABLE,
    WALKS,
    WIDTH,
    ZERO,
    ZEROS,
    M,
    N,
    Q,
    W,
)

# what compiled.py puts here: loads and stores (memory.py), vectors (vectors.py, lanes.py)
get: Any = None
u8: Any = None
u16: Any = None
i32: Any = None
i64: Any = None
f32: Any = None
set_u8: Any = None
set_u16: Any = None
set_i32: Any = None
set_i64: Any = None
set_f32: Any = None
widen_bfloat16: Any = None
widen_float16: Any = None
widen_bytes: Any = None
narrow_bfloat16: Any = None
weigh: Any = None
weigh_bfloat16: Any = None
merge_bits: Any = None
clear: Any = None
fetch: Any = None
spread_masks: Any = None
read_walks: Any = None
ones: Any = None
place_floats: Any = None
place_codes: Any = None
place_64_codes: Any = None
PLACES_AT_ONCE = 0
CODES_AT_ONCE = 16
unpack_1: Any = None
unpack_2: Any = None
unpack_3: Any = None
unpack_4: Any = None
unpack_5: Any = None
unpack_6: Any = None
unpack_7: Any = None
unpack_8: Any = None


def to_float(source, kind, n, target):  # type: ignore[no-untyped-def]
    """Write n numbers of 16 bits as float32."""
    whole = 8 * (n // 8)
    if kind == BFLOAT16:
        widen_bfloat16(source, target, n // 8)
        for i in range(whole, n):
            set_i32(target + 4 * i, u16(source + 2 * i) << 16)
        return
    widen_float16(source, target, n // 8)
    for i in range(whole, n):
        h = u16(source + 2 * i)
        set_i32(target + 4 * i, ((h & 0x8000) << 16) | ((h & 0x7FFF) << 13))
    for i in range(whole, n):  # 2^112 is the difference of the exponents' offsets
        set_f32(target + 4 * i, f32(target + 4 * i) * np.float32(2.0**112))


def to_bfloat16(source, n, target):  # type: ignore[no-untyped-def]
    """Write n float32 numbers as bfloat16, rounded to nearest, ties to even."""
    narrow_bfloat16(source, target, n >> 4)
    for i in range(n & -16, n):
        round_bfloat16(source + 4 * i, target + 2 * i)


def round_bfloat16(source, target):  # type: ignore[no-untyped-def]
    """Write a float32 number as bfloat16."""
    bits, value = i32(source), f32(source)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    set_u16(target, rounded if value == value else 0x7FC0)


def unpack_range(bits, source, total, start, count, target):  # type: ignore[no-untyped-def]
    """Write codes start .. start + count of one packed row of `total`, uint8."""
    octets = (total + 7) // 8
    clear(target, count // 32)
    for i in range(count & -32, count):
        set_u8(target + i, 0)
    below = bits
    p = 8
    while p > 0:
        if bits & p:
            below -= p
            width, mask, place, done = p * octets, (1 << p) - 1, start, 0
            while done < count:
                shift, offset = p * (place // width), place % width
                n = min(count - done, width - offset)
                fetch(source + offset, n // 64)
                merge_bits(source + offset, shift, mask, below, target + done, n // 32)
                for i in range(32 * (n // 32), n):
                    code = (u8(source + offset + i) >> shift) & mask
                    set_u8(target + done + i, u8(target + done + i) | (code << below))
                done += n
                place += n
            source += width
        p >>= 1


def unpack_row(bits, source, n, target):  # type: ignore[no-untyped-def]
    """Write the n codes of one packed row, uint8; `target` has room for whole bytes of planes."""
    octets = (n + 7) // 8
    if octets < 32:
        unpack_range(bits, source, n, 0, n, target)
        return
    i = 0
    while i < octets:
        i = min(i, octets - 32)  # the last step may do some again
        a, b = source + i, target + i
        if bits == 3:
            unpack_3(a, b, octets)
        elif bits == 4:
            unpack_4(a, b, octets)
        elif bits == 2:
            unpack_2(a, b, octets)
        elif bits == 5:
            unpack_5(a, b, octets)
        elif bits == 6:
            unpack_6(a, b, octets)
        elif bits == 8:
            unpack_8(a, b, octets)
        elif bits == 7:
            unpack_7(a, b, octets)
        else:
            unpack_1(a, b, octets)
        i += 32


def read_mask(task, row, mask, numbers):  # type: ignore[no-untyped-def]
    """Write which weights of a row are kept, a byte each."""
    n, table, m = get(task, N), get(task, TABLE), get(task, M)
    source = get(task, PLACES) + row * get(task, PLACES_WIDTH)
    if not table:
        unpack_row(1, source, n, mask)
        return
    unpack_row(get(task, NUMBER_BITS), source, n // m, numbers)
    if m == 4:
        done = np.int64(0)
        if PLACES_AT_ONCE:
            spread_masks(numbers, table, mask, n // 32)
            done = n // 32 * 8
        for i in range(done, n // 4):
            set_i32(mask + 4 * i, i32(table + 4 * u8(numbers + i)))
    elif m == 8:
        for i in range(n // 8):
            set_i64(mask + 8 * i, i64(table + 8 * u8(numbers + i)))
    else:
        for i in range(n // 2):
            set_u16(mask + 2 * i, u16(table + 2 * u8(numbers + i)))


def put_codes(mask, kept, q, n, none):  # type: ignore[no-untyped-def]
    """Write the codes of n weights, `none` where nothing is kept; return where kept ones end."""
    done = np.int64(0)
    if PLACES_AT_ONCE:
        if CODES_AT_ONCE == 64:
            done = n & -64
            kept = place_64_codes(mask, kept, q, done >> 6, none)
        kept = place_codes(mask + done, kept, q + done, (n - done) >> 4, none)
        done = n & -16
    for j in range(done, n):
        is_kept = u8(mask + j)
        set_u8(q + j, none + is_kept * (u8(kept) - none))  # no branch
        kept += is_kept
    return kept


def put_floats(mask, kept, w, n):  # type: ignore[no-untyped-def]
    """Write n weights, zero where nothing is kept."""
    done = np.int64(0)
    if PLACES_AT_ONCE:
        kept, done = place_floats(mask, kept, w, n >> 4, 0), n & -16
    for j in range(done, n):
        is_kept = u8(mask + j)
        set_i32(w + 4 * j, is_kept * i32(kept))  # no branch
        kept += 4 * is_kept


def read_grids(task, row, count, s):  # type: ignore[no-untyped-def]
    """Write scale and zero point of each group of some rows, float32.

    For many rows at once: where groups are few, a row alone costs more than its codes do.
    """
    bits, room, zeros = get(task, BITS), get(task, ROOM), get(task, ZEROS)
    groups = get(task, GROUPS)
    n = count * groups
    zero, codes = s + ZERO * room, s + KEPT_CODES * room
    to_float(get(task, SCALES) + 2 * row * groups, get(task, SCALE_KIND), n, s + SCALE * room)
    if zeros:
        unpack_range(bits, zeros, get(task, ALL_ROWS) * groups, row * groups, n, codes)
        widen_bytes(codes, zero, n // 8)
        for g in range(8 * (n // 8), n):
            set_f32(zero + 4 * g, np.float32(u8(codes + g)))
    else:
        for g in range(n):
            set_f32(zero + 4 * g, np.float32(1 << (bits - 1)))


def read_codes(task, row, at, q, s):  # type: ignore[no-untyped-def]
    """Write the codes of a row to q, a byte each; its grid is the at-th of those that were read."""
    n, bits, room, codes = get(task, N), get(task, BITS), get(task, ROOM), get(task, CODES)
    mask, kept = s + MASK * room, s + KEPT_CODES * room
    if get(task, SOURCE) == CODED:
        unpack_row(bits, codes + row * get(task, WIDTH), n, q)
        return
    starts, groups = get(task, STARTS), get(task, GROUPS)
    first, end = get(starts, row), get(starts, row + 1)
    read_mask(task, row, mask, kept)
    unpack_range(bits, codes, get(task, KEPT), first, end - first, kept)
    size = n // groups
    for g in range(groups):
        none = np.int64(f32(s + ZERO * room + 4 * (at * groups + g)))
        kept = put_codes(mask + g * size, kept, q + g * size, size, none)


def weights_of(task, at, q, s):  # type: ignore[no-untyped-def]
    """Write the weights of a row whose codes (at q) and grid are there."""
    groups, room, size = get(task, GROUPS), get(task, ROOM), get(task, N) // get(task, GROUPS)
    for g in range(groups):
        grid, first, w = s + 4 * (at * groups + g), q + g * size, s + W * room + 4 * g * size
        weigh(first, grid + SCALE * room, grid + ZERO * room, w, size >> 4)
        scale, zero = f32(grid + SCALE * room), f32(grid + ZERO * room)
        for j in range(size & -16, size):
            set_f32(w + 4 * j, (np.float32(u8(first + j)) - zero) * scale)


def expand_codes(task, row, at, s, target):  # type: ignore[no-untyped-def]
    """Write the weights of a row of codes as bfloat16."""
    groups, room, size = get(task, GROUPS), get(task, ROOM), get(task, N) // get(task, GROUPS)
    q, last = s + Q * room, s + W * room
    read_codes(task, row, at, q, s)
    for g in range(groups):
        grid, first, w = s + 4 * (at * groups + g), q + g * size, target + 2 * g * size
        weigh_bfloat16(first, grid + SCALE * room, grid + ZERO * room, w, size >> 4)
        scale, zero = f32(grid + SCALE * room), f32(grid + ZERO * room)
        for j in range(size & -16, size):
            set_f32(last, (np.float32(u8(first + j)) - zero) * scale)
            round_bfloat16(last, w + 2 * j)


def read_weights(task, row, at, s):  # type: ignore[no-untyped-def]
    """Write the weights of a row, float32: the numbers that decompress() gives."""
    n, room, codes = get(task, N), get(task, ROOM), get(task, CODES)
    source, kind = get(task, SOURCE), get(task, SCALE_KIND)
    w = s + W * room
    if source == FLOATS:
        to_float(codes + 2 * row * n, kind, n, w)
    elif source == SPARSE_FLOATS:
        starts, mask, kept = get(task, STARTS), s + MASK * room, s + FLOAT_CODES * room
        first, end = get(starts, row), get(starts, row + 1)
        read_mask(task, row, mask, s + KEPT_CODES * room)
        for low in range(first, end, 128):  # values that lie on four lines
            fetch(codes + 2 * low, 4)
            to_float(codes + 2 * low, kind, min(128, end - low), kept + 4 * (low - first))
        put_floats(mask, kept, w, n)
    elif source in (WALKS, MMA_WALKS):
        read_walks(task, row, s)
    else:
        read_codes(task, row, at, s + Q * room, s)
        weights_of(task, at, s + Q * room, s)


def count_kept(task):  # type: ignore[no-untyped-def]
    """Write before which kept weight each row begins, and where the last one ends."""
    rows, width, starts = get(task, ALL_ROWS), get(task, PLACES_WIDTH), get(task, STARTS)
    set_i64(starts, 0)
    for row in range(rows):
        total, mask = get(task, KEPT) // rows, get(task, PLACES) + row * width
        if not get(task, TABLE):  # n:m masks keep as many in every row
            total = 0
            for i in range(width >> 3):
                total += ones(mask + 8 * i)
            for i in range(width & -8, width):
                b = u8(mask + i)
                b -= (b >> 1) & 0x55
                b = (b & 0x33) + ((b >> 2) & 0x33)
                total += (b + (b >> 4)) & 0x0F
        set_i64(starts + 8 * row + 8, get(starts, row) + total)
