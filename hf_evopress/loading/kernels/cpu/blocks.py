"""Coded rows times integers, a few rows and two tokens at a time: numba compiles it.

Chunks of inputs that are no integers (native.py) are multiplied in float32 besides.
"""

from __future__ import annotations

from typing import Any

from ..task import (
    BFLOAT16,
    BIAS,
    BITS,
    CHUNK,
    CODED,
    CODES,
    FACTOR,
    FLOAT_CHUNKS,
    GROUPS,
    N_FLOAT_CHUNKS,
    OFFSET,
    ROOM,
    ROWS,
    SCALE,
    SCALED,
    SOURCE,
    START,
    SUMS,
    TOKENS,
    WIDTH,
    X_FLOAT,
    X_INT,
    X_SCALES,
    X_SUMS,
    Y_KIND,
    ZERO,
    N,
    Q,
    Y,
)
from .dots import TOGETHER

# what compiled.py puts here: loads and stores (memory.py), vectors (lanes.py, dots.py), rows.py,
# native.write, dots.AT_ONCE
AT_ONCE = 1
get: Any = None
i32: Any = None
f32: Any = None
set_f32: Any = None
read_codes: Any = None
round_bfloat16: Any = None
write: Any = None
dot_rest: Any = None
dot_row_16: Any = None
dot_row_32: Any = None
dot_row_64: Any = None
dot_row_128: Any = None
dot_16: Any = None
dot_32: Any = None
dot_64: Any = None
dot_128: Any = None
dots_16: Any = None
dots_32: Any = None
dots_64: Any = None
dots_128: Any = None


def multiply_codes(task, row, count, s):  # type: ignore[no-untyped-def]
    """Write the products of some rows with all tokens, those whose grids have been read."""
    room, groups, tokens = get(task, ROOM), get(task, GROUPS), get(task, TOKENS)
    chunks = get(task, N) // get(task, CHUNK)
    each, width = chunks // groups, get(task, WIDTH)
    # where nothing is unpacked, one row after the other: the processor foresees what is read next
    is_stored = get(task, SOURCE) == CODED and get(task, BITS) == 8 and tokens == 1
    at_once = 1 if is_stored else AT_ONCE
    for low in range(0, count, at_once):
        rows = min(at_once, count - low)
        codes, step = s + Q * room, room
        if is_stored:
            codes = get(task, CODES) + (row + low) * width
        else:
            for i in range(rows):
                read_codes(task, row + low + i, low + i, codes + i * step, s)
        scales, zeros = s + SCALE * room + 4 * groups * low, s + ZERO * room + 4 * groups * low
        if each > 1:
            spread(each, rows * groups, scales, zeros, s + FACTOR * room, s + OFFSET * room)
            scales, zeros = s + FACTOR * room, s + OFFSET * room
        token, seen = 0, 0
        while token < tokens:
            some = TOGETHER if token + TOGETHER <= tokens else 1
            seen = multiply_block(
                task, row + low, rows, token, some, codes, step, scales, zeros, seen, s
            )
            token += some


def multiply_block(task, row, rows, token, some, codes, step, scales, zeros, seen, s):  # type: ignore[no-untyped-def]
    """Write the products of a few rows with a few tokens; return how many float chunks are seen."""
    room, n, chunk = get(task, ROOM), get(task, N), get(task, CHUNK)
    chunks, sums = n // chunk, s + SUMS * room
    at = 4 * token * chunks
    x, x_scales = get(task, X_INT) + 2 * token * n, get(task, X_SCALES) + at
    given = codes, step, x, scales, zeros, x_scales, get(task, X_SUMS) + at
    if rows == 1 and some == 1:
        dot_row(chunk, *given, s + SCALED * room, chunks, sums)
    elif some == 1:
        dot(chunk, *given, s + SCALED * room, chunks, sums)
    else:
        dots(chunk, *given, s + SCALED * room, chunks, sums)
    while seen < get(task, N_FLOAT_CHUNKS):
        number = i32(get(task, FLOAT_CHUNKS) + 4 * seen)
        if number >= (token + some) * chunks:
            break
        at = sums + 4 * (number // chunks - token)
        add_rest(task, number, rows, codes, step, scales, zeros, at, 4 * some)
        seen += 1
    write_sums(task, row, rows, token, some, sums)
    return seen


def add_rest(task, number, rows, codes, step, scales, zeros, sums, sum_step):  # type: ignore[no-untyped-def]
    """Add to sums the products of a few rows with a chunk of inputs that are no integers."""
    chunk = get(task, CHUNK)
    chunks = get(task, N) // chunk
    c, x = number % chunks, get(task, X_FLOAT) + 4 * number * chunk
    for i in range(rows):
        at, grid = sums + i * sum_step, 4 * (chunks * i + c)
        here = codes + i * step + c * chunk
        more = f32(scales + grid) * dot_rest(here, zeros + grid, x, chunk >> 4)
        set_f32(at, f32(at) + more)


def write_sums(task, row, rows, token, some, sums):  # type: ignore[no-untyped-def]
    """Write the sums (rows, some) of a few rows and tokens to the outputs."""
    is_plain = get(task, Y_KIND) == BFLOAT16 and not (get(task, START) or get(task, BIAS))
    y = get(task, Y) + 2 * (token * get(task, ROWS) + row)
    for t in range(some):
        for i in range(rows):
            at = sums + 4 * (i * some + t)
            if is_plain:
                round_bfloat16(at, y + 2 * i)
            else:
                write(task, row + i, token + t, f32(at), at)
        y += 2 * get(task, ROWS)


def dot(chunk, codes, step, x, scales, zeros, x_scales, x_sums, room, n, sums):  # type: ignore[no-untyped-def]
    """Write the sums of AT_ONCE rows with one token (dots.py)."""
    if chunk == 64:
        dot_64(codes, step, x, scales, zeros, x_scales, x_sums, room, n, sums)
    elif chunk == 128:
        dot_128(codes, step, x, scales, zeros, x_scales, x_sums, room, n, sums)
    elif chunk == 32:
        dot_32(codes, step, x, scales, zeros, x_scales, x_sums, room, n, sums)
    else:
        dot_16(codes, step, x, scales, zeros, x_scales, x_sums, room, n, sums)


def dot_row(chunk, codes, step, x, scales, zeros, x_scales, x_sums, room, n, sums):  # type: ignore[no-untyped-def]
    """Write the sums of one row with one token (dots.py)."""
    if chunk == 64:
        dot_row_64(codes, step, x, scales, zeros, x_scales, x_sums, room, n, sums)
    elif chunk == 128:
        dot_row_128(codes, step, x, scales, zeros, x_scales, x_sums, room, n, sums)
    elif chunk == 32:
        dot_row_32(codes, step, x, scales, zeros, x_scales, x_sums, room, n, sums)
    else:
        dot_row_16(codes, step, x, scales, zeros, x_scales, x_sums, room, n, sums)


def dots(chunk, codes, step, x, scales, zeros, x_scales, x_sums, room, n, sums):  # type: ignore[no-untyped-def]
    """Write the sums of AT_ONCE rows with TOGETHER tokens (dots.py)."""
    if chunk == 64:
        dots_64(codes, step, x, scales, zeros, x_scales, x_sums, room, n, sums)
    elif chunk == 128:
        dots_128(codes, step, x, scales, zeros, x_scales, x_sums, room, n, sums)
    elif chunk == 32:
        dots_32(codes, step, x, scales, zeros, x_scales, x_sums, room, n, sums)
    else:
        dots_16(codes, step, x, scales, zeros, x_scales, x_sums, room, n, sums)


def spread(each, groups, scales, zeros, factors, offsets):  # type: ignore[no-untyped-def]
    """Write per chunk the scale and zero point of its group, which has `each`."""
    c = 0
    for g in range(groups):
        scale, zero = f32(scales + 4 * g), f32(zeros + 4 * g)
        for _ in range(each):
            set_f32(factors + 4 * c, scale)
            set_f32(offsets + 4 * c, zero)
            c += 1
