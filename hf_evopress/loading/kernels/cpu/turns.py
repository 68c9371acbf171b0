"""Rotations of activations, token by token: numba compiles it (methods/maths/rotation.py).

Threads draw tokens from a job. Activations are read and written as they are, in float32 or
bfloat16, and rotated in the cache of a core, with what scales of channels stand beside.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..task import FLOAT32

# what a job holds: addresses and sizes, one int64 each, at these places of an array
NEXT = 0  # the next token to be taken
SEAT = 1  # the next thread's number
STEP = 2  # tokens that a thread takes at once
TOKENS = 3
X = 4  # (tokens, q p)
X_KIND = 5
Y = 6
Y_KIND = 7
SIGNS = 8  # q p float32
MATRIX = 9  # of the DCT that mixes q parts, 0 for none
IS_BACK = 10
Q = 11
P = 12
SCALES = 13  # float32, before a rotation or after one back; 0 for none
N_SCALES = 14  # 1, or one per number
ROOM = 15  # memory that threads work in
OF_THREAD = 16  # bytes of it
THREADS = 17
PARALLEL = 18
WORK = 19
SIZE = 20
FACTOR_BYTES = 64  # of that memory, before two vectors of float32

# what compiled.py puts here: loads and stores (memory.py), vectors (butterflies.py, walks.py),
# rows.to_float, rows.to_bfloat16
get: Any = None
set_i64: Any = None
take: Any = None
call: Any = None
f32: Any = None
set_f32: Any = None
to_float: Any = None
to_bfloat16: Any = None
hadamard_64: Any = None
butterflies_2: Any = None
butterflies_4: Any = None
butterflies_8: Any = None
multiply_by: Any = None
multiply_all: Any = None
mix_columns: Any = None


def bytes_of_thread(n: int) -> int:
    """Return the bytes that a thread works in."""
    return FACTOR_BYTES + 2 * (4 * n + 63 & -64)


def transform(x, q, p, room, target):  # type: ignore[no-untyped-def]
    """target = q vectors of p float32 times the Walsh-Hadamard matrix / sqrt(p)."""
    n, size = q * p, 1
    if p >= 64:
        hadamard_64(x, target, n >> 6)
        size = 64
    elif x != target:
        for i in range(n):
            set_f32(target + 4 * i, f32(x + 4 * i))
    while size < p:
        left = p // size
        radix = 2 if size < 8 or left < 4 else 4 if left < 8 else 8
        for first in range(0, n, radix * size):
            low, far = target + 4 * first, 4 * size
            if radix == 8:
                butterflies_8(low, far, size >> 3)
            elif radix == 4:
                butterflies_4(low, far, size >> 3)
            elif size >= 8:
                butterflies_2(low, far, size >> 3)
            else:
                for i in range(size):
                    one, other = f32(low + 4 * i), f32(low + far + 4 * i)
                    set_f32(low + 4 * i, one + other)
                    set_f32(low + far + 4 * i, one - other)
        size *= radix
    set_f32(room, np.float32(1.0 / np.sqrt(p)))
    scale_row(target, room, 1, n, target)


def scale_row(x, factors, count, n, target):  # type: ignore[no-untyped-def]
    """target = n numbers of x times one factor, or as many."""
    if count == 1:
        multiply_all(x, factors, target, n >> 3)
    else:
        multiply_by(x, factors, target, n >> 3)
    for i in range(n & -8, n):
        factor = f32(factors) if count == 1 else f32(factors + 4 * i)
        set_f32(target + 4 * i, f32(x + 4 * i) * factor)


def mix(x, y, matrix, is_back, q, p):  # type: ignore[no-untyped-def]
    """Write D X to y, or D^T X, for D (q, q) and X (q, p)."""
    over_rows = 4 if is_back else 4 * q
    over_columns = 4 * q if is_back else 4
    for first in range(0, p & -32, 32):
        mix_columns(x + 4 * first, matrix, over_rows, over_columns, q, 4 * p, y + 4 * first)
    for j in range(q):
        for i in range(p & -32, p):
            total = np.float32(0.0)
            for k in range(q):
                factor = f32(matrix + j * over_rows + k * over_columns)
                total += f32(x + 4 * (k * p + i)) * factor
            set_f32(y + 4 * (j * p + i), total)


def turn_token(job, token, room):  # type: ignore[no-untyped-def]
    """Rotate one token, or rotate it back."""
    q, p, scales, count = get(job, Q), get(job, P), get(job, SCALES), get(job, N_SCALES)
    n, kind, signs, matrix = q * p, get(job, X_KIND), get(job, SIGNS), get(job, MATRIX)
    a = room + FACTOR_BYTES
    b = a + ((4 * n + 63) & -64)
    is_short = get(job, Y_KIND) != FLOAT32
    x, y = get(job, X) + (4 if kind == FLOAT32 else 2) * token * n, get(job, Y)
    y += (2 if is_short else 4) * token * n
    target = b if is_short else y
    if kind != FLOAT32:
        to_float(x, kind, n, a)
        x = a
    if get(job, IS_BACK):
        if matrix:
            mix(x, b, matrix, 1, q, p)
            x = b
        transform(x, q, p, room, b)
        scale_row(b, signs, n, n, b if scales else target)
        if scales:
            scale_row(b, scales, count, n, target)
    else:
        if scales:
            scale_row(x, scales, count, n, a)
            x = a
        scale_row(x, signs, n, n, a)
        transform(a, q, p, room, a if matrix else target)
        if matrix:
            mix(a, target, matrix, 0, q, p)
    if is_short:
        to_bfloat16(target, n, y)


def turn_part(job, version):  # type: ignore[no-untyped-def]
    """Take tokens until none is left: what each thread does."""
    room = get(job, ROOM) + take(job + 8 * SEAT, 1) * get(job, OF_THREAD)
    step, tokens = get(job, STEP), get(job, TOKENS)
    while True:
        first = take(job + 8 * NEXT, step)
        if first >= tokens:
            return
        for token in range(first, min(first + step, tokens)):
            turn_token(job, token, room)


def turn_all(job, version):  # type: ignore[no-untyped-def]
    """Rotate all tokens of a job on its threads."""
    set_i64(job + 8 * STEP, max(1, get(job, TOKENS) // (8 * get(job, THREADS))))
    call(get(job, PARALLEL), get(job, WORK), job, get(job, THREADS))
