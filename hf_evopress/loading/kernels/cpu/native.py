"""Products of packed rows with activations: the second half of what numba compiles.

Threads draw rows from a task. Rows are unpacked into the cache of a core, and used for all tokens
before the next: codes times integers where activations are bfloat16 (inputs.py, blocks.py), else
weights times float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..task import (
    BFLOAT16,
    BIAS,
    BIAS_KIND,
    CHUNK,
    CODED,
    COUNT,
    FIRST,
    FLOAT32,
    GROUPS,
    IDS,
    LEAST_ROOM,
    MMA_WALKS,
    NEXT,
    PARALLEL,
    ROOM,
    ROOM_SIZE,
    ROOMS,
    ROWS,
    SAME,
    SCALED,
    SCALES,
    SEAT,
    SIZE,
    SOURCE,
    SPARSE_CODES,
    START,
    STARTS,
    STEP,
    THREADS,
    TOKENS,
    WALKS,
    WORK,
    X_FLOAT,
    Y_KIND,
    N,
    W,
    X,
    Y,
)
from .blocks import multiply_codes
from .inputs import place, prepare, share
from .rows import (
    count_kept,
    expand_codes,
    read_grids,
    read_weights,
    round_bfloat16,
    to_bfloat16,
    to_float,
)

# what compiled.py puts here: loads and stores (memory.py), vectors (lanes.py, floats.py),
# dots.AT_ONCE
AT_ONCE = 1
get: Any = None
f32: Any = None
set_f32: Any = None
set_i64: Any = None
take: Any = None
call: Any = None
dot_by_64: Any = None
multiply_strip: Any = None
expand_strip: Any = None


def dot_floats(w, x, n):  # type: ignore[no-untyped-def]
    """Return the product of two float32 vectors."""
    total = dot_by_64(w, x, n >> 6)
    for i in range(n & -64, n):
        total += f32(w + 4 * i) * f32(x + 4 * i)
    return total


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
        round_bfloat16(scratch, y + 2 * at)


def multiply_row(task, row, at, s):  # type: ignore[no-untyped-def]
    """Write the products of one row with all tokens, in float32."""
    n, w = get(task, N), s + W * get(task, ROOM)
    read_weights(task, row, at, s)
    for token in range(get(task, TOKENS)):
        x = get(task, X_FLOAT) + 4 * token * n
        write(task, row, token, dot_floats(w, x, n), s + SCALED * get(task, ROOM))


def expand_row(task, i, row, at, s):  # type: ignore[no-untyped-def]
    """Write the weights of a row, the i-th that is asked for."""
    n, room, y, source = get(task, N), get(task, ROOM), get(task, Y), get(task, SOURCE)
    is_coded = source in (CODED, SPARSE_CODES)
    if is_coded and get(task, Y_KIND) == BFLOAT16:
        expand_codes(task, row, at, s, y + 2 * i * n)
        return
    read_weights(task, row, at, s)
    w = s + W * room
    if get(task, Y_KIND) == BFLOAT16:
        to_bfloat16(w, n, y + 2 * i * n)
    else:
        for j in range(n):
            set_f32(y + 4 * (i * n + j), f32(w + 4 * j))


def is_in_strips(task):  # type: ignore[no-untyped-def]
    """Return whether a task's rows are read in whole strips of 16."""
    has_whole = not get(task, IDS) and get(task, FIRST) % 16 == 0
    is_read = get(task, SOURCE) == WALKS or (get(task, SOURCE) == MMA_WALKS and get(task, X) != 0)
    return has_whole and is_read


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
        step = (max(1, min(64, get(task, ROWS) // (8 * threads))) + 3) & -4
        if is_in_strips(task):
            step = (step + 15) & -16
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
    is_strips = is_in_strips(task)
    # as many rows at once as their grids have room for; those of ids lie apart
    block = 1 if ids else max(1, min(step, get(task, ROOM) // get(task, GROUPS)))
    if block > AT_ONCE:
        block -= block % AT_ONCE
    while True:
        first = take(task + 8 * NEXT, step)
        if first >= rows:
            return
        if is_strips:
            for low in range(first, min(first + step, rows), 16):
                end = min(low + 16, rows)
                if is_product:
                    multiply_strip(task, low, end, s)
                else:
                    expand_strip(task, low, start + low, start + end, s)
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
