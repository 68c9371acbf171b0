"""Products of packed rows with activations: the second half of what numba compiles.

Threads draw rows from a task. A row is unpacked into the cache of its core, and used for all
tokens before the next.

A bfloat16 activation becomes a 16-bit integer with a scale per chunk of 16 to 128 inputs, so that
products are exact sums of integers. That is 2^-16 of the chunk's largest; where that would be more
than bfloat16's own rounding (one input over OUTLIER times the mean of the others), the chunk
is multiplied in float32, as float32 activations are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .rows import (
    count_kept,
    read_codes,
    read_grids,
    read_weights,
    to_bfloat16,
    to_float,
    weights_of,
)
from .task import (
    BFLOAT16,
    BIAS,
    BIAS_KIND,
    CHUNK,
    COUNT,
    FACTOR,
    FIRST,
    FLOAT32,
    GROUPS,
    HAS_FLOATS,
    IDS,
    LEAST_ROOM,
    MORE,
    NEXT,
    OFFSET,
    PARALLEL,
    ROOM,
    ROOM_SIZE,
    ROOMS,
    ROWS,
    SAME,
    SCALE,
    SCALED,
    SCALES,
    SEAT,
    SIZE,
    SOURCE,
    START,
    STARTS,
    STEP,
    THREADS,
    TOKENS,
    WALKS,
    WORK,
    X_FLOAT,
    X_INT,
    X_KIND,
    X_SCALES,
    X_SUMS,
    Y_KIND,
    ZERO,
    N,
    Q,
    W,
    X,
    Y,
)

OUTLIER = 128
MOST = 32767

# what compiled.py puts here: loads and stores (memory.py), vectors (vectors.py, lanes.py)
get: Any = None
f32: Any = None
set_u16: Any = None
set_f32: Any = None
set_i64: Any = None
take: Any = None
call: Any = None
multiply_strip: Any = None
scale_chunks: Any = None
dot_16: Any = None
dot_32: Any = None
dot_64: Any = None
dot_128: Any = None


def dot_floats(w, x, n):  # type: ignore[no-untyped-def]
    """Return the product of two float32 vectors; sums in any order (fastmath)."""
    total = np.float32(0.0)
    for i in range(n):
        total += f32(w + 4 * i) * f32(x + 4 * i)
    return total


def dot_codes(task, token, chunks, scales, zeros, codes, scaled):  # type: ignore[no-untyped-def]
    """Return a row's codes times one token's integers: chunks without integers give 0."""
    at, chunk = 4 * token * chunks, get(task, CHUNK)
    x_scales, x_sums = get(task, X_SCALES) + at, get(task, X_SUMS) + at
    shift = scale_chunks(scales, zeros, x_scales, x_sums, scaled, chunks >> 3)
    for c in range(8 * (chunks >> 3), chunks):
        scale = f32(scales + 4 * c)
        set_f32(scaled + 4 * c, scale * f32(x_scales + 4 * c))
        shift += scale * f32(zeros + 4 * c) * f32(x_sums + 4 * c)
    x = get(task, X_INT) + 2 * token * get(task, N)
    if chunk == 64:
        return dot_64(codes, x, scaled, chunks) - shift
    if chunk == 128:
        return dot_128(codes, x, scaled, chunks) - shift
    if chunk == 32:
        return dot_32(codes, x, scaled, chunks) - shift
    return dot_16(codes, x, scaled, chunks) - shift


def spread(each, groups, scales, zeros, factors, offsets):  # type: ignore[no-untyped-def]
    """Write per chunk the scale and zero point of its group, which has `each`."""
    c = 0
    for g in range(groups):
        scale, zero = f32(scales + 4 * g), f32(zeros + 4 * g)
        for _ in range(each):
            set_f32(factors + 4 * c, scale)
            set_f32(offsets + 4 * c, zero)
            c += 1


def write(task, row, token, value, scratch):  # type: ignore[no-untyped-def]
    """Write one output, with what comes to it besides."""
    at = token * get(task, ROWS) + row
    start, bias, y = get(task, START), get(task, BIAS), get(task, Y)
    if start:
        value += f32(start + 4 * at)
    if bias:
        if get(task, BIAS_KIND) == FLOAT32:
            value += f32(bias + 4 * row)
        else:
            to_float(bias + 2 * row, get(task, BIAS_KIND), 1, scratch)
            value += f32(scratch)
    if get(task, Y_KIND) == FLOAT32:
        set_f32(y + 4 * at, value)
    else:
        set_f32(scratch, value)
        to_bfloat16(scratch, 1, y + 2 * at)


def multiply_row(task, row, at, s):  # type: ignore[no-untyped-def]
    """Write the products of one row with all tokens, in float32."""
    n, w = get(task, N), s + W * get(task, ROOM)
    read_weights(task, row, at, s)
    for token in range(get(task, TOKENS)):
        x = get(task, X_FLOAT) + 4 * token * n
        write(task, row, token, dot_floats(w, x, n), s + SCALED * get(task, ROOM))


def multiply_codes(task, row, count, s):  # type: ignore[no-untyped-def]
    """Write the products of some rows with all tokens by integers, what those leave in float32.

    A row is unpacked while the one before it is multiplied: what was just stored in pieces of
    another size is slow to load.
    """
    n, room, groups, tokens = get(task, N), get(task, ROOM), get(task, GROUPS), get(task, TOKENS)
    chunks, has_floats = n // get(task, CHUNK), get(task, HAS_FLOATS)
    each = chunks // groups
    free = s + MORE * room
    scales, zeros = s + SCALE * room, s + ZERO * room
    factors, offsets, scaled = s + FACTOR * room, s + OFFSET * room, s + SCALED * room
    codes = read_codes(task, row, 0, s + Q * room, s)
    for at in range(count):
        after = codes
        if at + 1 < count:
            after = read_codes(task, row + at + 1, at + 1, free, s)
        if each > 1:
            spread(each, groups, scales, zeros, factors, offsets)
        else:
            factors, offsets = scales, zeros
        if has_floats:
            weights_of(task, at, codes, s)
        for token in range(tokens):
            value = dot_codes(task, token, chunks, factors, offsets, codes, scaled)
            if has_floats:
                value += dot_rest(task, token, s)
            write(task, row + at, token, value, scaled)
        codes, free = after, codes
        scales, zeros = scales + 4 * groups, zeros + 4 * groups


def dot_rest(task, token, s):  # type: ignore[no-untyped-def]
    """Return a row's weights times one token's inputs where those are not integers."""
    n, chunk, room = get(task, N), get(task, CHUNK), get(task, ROOM)
    scales = get(task, X_SCALES) + 4 * token * (n // chunk)
    w, x, value = s + W * room, get(task, X_FLOAT) + 4 * token * n, np.float32(0.0)
    for c in range(n // chunk):
        if f32(scales + 4 * c) == 0.0:
            value += dot_floats(w + 4 * c * chunk, x + 4 * c * chunk, chunk)
    return value


def expand_row(task, i, row, at, s):  # type: ignore[no-untyped-def]
    """Write the weights of a row, the i-th that is asked for."""
    n, room, y = get(task, N), get(task, ROOM), get(task, Y)
    read_weights(task, row, at, s)
    w = s + W * room
    if get(task, Y_KIND) == BFLOAT16:
        to_bfloat16(w, n, y + 2 * i * n)
    else:
        for j in range(n):
            set_f32(y + 4 * (i * n + j), f32(w + 4 * j))


def prepare(task):  # type: ignore[no-untyped-def]
    """Write the activations as float32, and where a task has chunks as integers."""
    chunk, size, x = get(task, CHUNK), get(task, N) * get(task, TOKENS), get(task, X_FLOAT)
    integers, scales, sums = get(task, X_INT), get(task, X_SCALES), get(task, X_SUMS)
    if get(task, X_KIND) != FLOAT32:
        to_float(get(task, X), get(task, X_KIND), size, x)
    if not chunk:
        return
    for c in range(size // chunk):
        most, total = np.float32(0.0), np.float32(0.0)
        for i in range(c * chunk, c * chunk + chunk):
            value = abs(f32(x + 4 * i))
            most = value if value > most else most
            total += value
        # false for NaN and infinity as well: those are float32's
        if most > 0.0 and most * (chunk - 1) <= OUTLIER * (total - most) and total < 3e38:
            inverse, whole = np.float32(MOST) / most, np.int64(0)
            for i in range(c * chunk, c * chunk + chunk):
                value = f32(x + 4 * i) * inverse
                number = np.int32(value + np.float32(0.5 if value > 0 else -0.5))
                set_u16(integers + 2 * i, number)
                whole += np.int64(number)
            set_f32(scales + 4 * c, most / np.float32(MOST))
            set_f32(sums + 4 * c, np.float32(whole) * (most / np.float32(MOST)))
        else:
            for i in range(c * chunk, c * chunk + chunk):
                set_u16(integers + 2 * i, 0)
            set_f32(scales + 4 * c, np.float32(0.0))
            set_f32(sums + 4 * c, np.float32(0.0))
            if total != 0.0:
                set_i64(task + 8 * HAS_FLOATS, 1)


def place(task, at):  # type: ignore[no-untyped-def]
    """Say where a task's activations become float32 and integers; return where that ends."""
    size, chunk = get(task, TOKENS) * get(task, N), get(task, CHUNK)
    set_i64(task + 8 * X_FLOAT, get(task, X) if get(task, X_KIND) == FLOAT32 else at)
    if get(task, X_KIND) == FLOAT32:
        return at
    at += 4 * size
    if chunk:
        set_i64(task + 8 * X_INT, at)
        at += 2 * size
        for of_chunks in (X_SCALES, X_SUMS):
            set_i64(task + 8 * of_chunks, at)
            at += 4 * (size // chunk)
    return (at + 63) & -64


def share(task, other):  # type: ignore[no-untyped-def]
    """Let a task use what another made of the same activations."""
    for at in (X_FLOAT, X_INT, X_SCALES, X_SUMS, HAS_FLOATS):
        set_i64(task + 8 * at, get(other, at))


def run(tasks, memory, version):  # type: ignore[no-untyped-def]
    """Do some tasks on their threads; those with activations are products.

    memory: of bytes_of() for each and ROOM_SIZE * ROOM for each thread (compiled.py).
    """
    threads, room = get(tasks, THREADS), np.int64(0)
    for i in range(get(tasks, COUNT)):
        task = tasks + 8 * SIZE * i
        own = max(LEAST_ROOM, (get(task, N) + 127) & -64)
        room = max(room, own)
        set_i64(task + 8 * ROOM, own)
        step = max(1, min(64, get(task, ROWS) // (8 * threads)))
        if get(task, SOURCE) >= WALKS and get(task, X):
            step = (step + 15) & -16  # whole strips
        set_i64(task + 8 * STEP, step)
        if get(task, SAME):
            share(task, tasks + 8 * SIZE * (get(task, SAME) - 1))
        elif get(task, X):
            memory = place(task, memory)
            prepare(task)
        if get(task, STARTS):
            count_kept(task)
    set_i64(tasks + 8 * ROOM, room)
    set_i64(tasks + 8 * ROOMS, memory)
    call(get(tasks, PARALLEL), get(tasks, WORK), tasks, threads)


def multiply(template, x, y, tokens, threads, memory, version):  # type: ignore[no-untyped-def]
    """Do a product that `template` describes but for these; memory: of a task's size besides."""
    for at in range(SIZE):
        set_i64(memory + 8 * at, get(template, at))
    set_i64(memory + 8 * X, x)
    set_i64(memory + 8 * Y, y)
    set_i64(memory + 8 * TOKENS, tokens)
    set_i64(memory + 8 * THREADS, threads)
    run(memory, memory + 8 * SIZE, version)


def part(tasks, version):  # type: ignore[no-untyped-def]
    """Take rows of each task until none is left: what each thread does."""
    seat = take(tasks + 8 * SEAT, 1)
    s = get(tasks, ROOMS) + seat * ROOM_SIZE * get(tasks, ROOM)
    for i in range(get(tasks, COUNT)):
        take_rows(tasks + 8 * SIZE * i, s)


def take_rows(task, s):  # type: ignore[no-untyped-def]
    """Take rows of a task until none is left."""
    step, rows, is_product = get(task, STEP), get(task, ROWS), get(task, X)
    ids, start, has_grids = get(task, IDS), get(task, FIRST), get(task, SCALES)
    has_integers = is_product and get(task, CHUNK)
    is_strips = is_product and get(task, SOURCE) >= WALKS
    # as many rows at once as their grids have room for; those of ids lie apart
    block = 1 if ids else max(1, min(step, get(task, ROOM) // get(task, GROUPS)))
    while True:
        first = take(task + 8 * NEXT, step)
        if first >= rows:
            return
        if is_strips:
            for low in range(first, min(first + step, rows), 16):
                multiply_strip(task, low, min(low + 16, rows), s)
            continue
        for low in range(first, min(first + step, rows), block):
            count = min(block, min(first + step, rows) - low)
            row = get(ids, low) if ids else start + low
            if has_grids:
                read_grids(task, row, count, s)
            if has_integers:
                multiply_codes(task, row, count, s)
                continue
            for at in range(count):
                if is_product:
                    multiply_row(task, row + at, at, s)
                else:
                    expand_row(task, low + at, row + at, at, s)
