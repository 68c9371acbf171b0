"""Activations as float32, and as 16-bit integers with a scale per chunk: numba compiles it.

A bfloat16 activation becomes a 16-bit integer with a scale per chunk of 16 to 128 inputs, so that
products are exact sums of integers. That is 2^-16 of the chunk's largest; where that would be more
than bfloat16's own rounding (one input over OUTLIER times the mean of the others), the chunk
is multiplied in float32, as float32 activations are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..task import (
    CHUNK,
    FLOAT32,
    FLOAT_CHUNKS,
    N_FLOAT_CHUNKS,
    TOKENS,
    X_FLOAT,
    X_INT,
    X_KIND,
    X_SCALES,
    X_SUMS,
    N,
    X,
)

OUTLIER = 128
MOST = 32767

# what compiled.py puts here: loads and stores (memory.py), vectors (lanes.py), rows.to_float
get: Any = None
set_u16: Any = None
set_i32: Any = None
set_f32: Any = None
set_i64: Any = None
largest: Any = None
sum_sizes: Any = None
round_inputs: Any = None
to_float: Any = None


def prepare(task):  # type: ignore[no-untyped-def]
    """Write the activations as float32, and where a task has chunks as integers."""
    chunk, size, x = get(task, CHUNK), get(task, N) * get(task, TOKENS), get(task, X_FLOAT)
    integers, scales, sums = get(task, X_INT), get(task, X_SCALES), get(task, X_SUMS)
    if get(task, X_KIND) != FLOAT32:
        to_float(get(task, X), get(task, X_KIND), size, x)
    if not chunk:
        return
    n_floats = 0
    for c in range(size // chunk):
        here, target, scale = x + 4 * c * chunk, integers + 2 * c * chunk, scales + 4 * c
        most, total = largest(here, chunk >> 3), sum_sizes(here, chunk >> 3)
        # false for NaN and infinity as well: those are float32's
        if most > 0.0 and most * (chunk - 1) <= OUTLIER * (total - most) and total < 3e38:
            set_f32(scale, np.float32(MOST) / most)
            whole = round_inputs(here, scale, target, chunk >> 3)
            set_f32(scale, most / np.float32(MOST))
            set_f32(sums + 4 * c, whole * (most / np.float32(MOST)))
        else:
            for i in range(chunk):
                set_u16(target + 2 * i, 0)
            set_f32(scale, np.float32(0.0))
            set_f32(sums + 4 * c, np.float32(0.0))
            if total != 0.0:
                set_i32(get(task, FLOAT_CHUNKS) + 4 * n_floats, c)
                n_floats += 1
    set_i64(task + 8 * N_FLOAT_CHUNKS, n_floats)


def place(task, at):  # type: ignore[no-untyped-def]
    """Say where a task's activations become float32 and integers; return where that ends."""
    size, chunk = get(task, TOKENS) * get(task, N), get(task, CHUNK)
    at = (at + 63) & -64  # a vector that lies on two lines of the cache takes twice as long
    set_i64(task + 8 * X_FLOAT, get(task, X) if get(task, X_KIND) == FLOAT32 else at)
    if get(task, X_KIND) != FLOAT32:
        at += 4 * size
    if chunk:
        set_i64(task + 8 * X_INT, at)
        at += 2 * size
        for of_chunks in (X_SCALES, X_SUMS, FLOAT_CHUNKS):
            set_i64(task + 8 * of_chunks, at)
            at += 4 * (size // chunk)
    return (at + 63) & -64


def share(task, other):  # type: ignore[no-untyped-def]
    """Let a task use what another made of the same activations."""
    for at in (X_FLOAT, X_INT, X_SCALES, X_SUMS, FLOAT_CHUNKS, N_FLOAT_CHUNKS):
        set_i64(task + 8 * at, get(other, at))
