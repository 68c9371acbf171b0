"""Tiles of walks whose values are computed (weyl.py), by their bits: numba compiles it."""

from __future__ import annotations

from typing import Any

from .task import (
    BITS,
    CHUNK,
    CODES,
    MMA_WALKS,
    MULTIPLIER,
    N_FLOAT_CHUNKS,
    NUMBER_BITS,
    PLACES,
    SOURCE,
    X_INT,
    X_SCALES,
    N,
)

# what compiled.py puts here: loads (memory.py), vectors (weyl.py)
get: Any = None
weyl_1: Any = None
weyl_2: Any = None
weyl_3: Any = None
weyl_4: Any = None
weyl_5: Any = None
weyl_6: Any = None
weyl_7: Any = None
weyl_8: Any = None
sum_weyl_1: Any = None
sum_weyl_2: Any = None
sum_weyl_3: Any = None
sum_weyl_4: Any = None
sum_weyl_5: Any = None
sum_weyl_6: Any = None
sum_weyl_7: Any = None
sum_weyl_8: Any = None
sum_weyl_chunks_1: Any = None
sum_weyl_chunks_2: Any = None
sum_weyl_chunks_3: Any = None
sum_weyl_chunks_4: Any = None
sum_weyl_chunks_5: Any = None
sum_weyl_chunks_6: Any = None
sum_weyl_chunks_7: Any = None
sum_weyl_chunks_8: Any = None


def half_of(size):  # type: ignore[no-untyped-def]
    """Return half of the step between computed states of `size` bits, at least 1."""
    return 1 << max(0, 15 - size)


def compute(bits, tile, past, multiplier, half, target):  # type: ignore[no-untyped-def]
    """Write the values of a tile, computed (weyl.py)."""
    if bits == 3:
        weyl_3(tile, past, multiplier, half, target)
    elif bits == 2:
        weyl_2(tile, past, multiplier, half, target)
    elif bits == 4:
        weyl_4(tile, past, multiplier, half, target)
    elif bits == 1:
        weyl_1(tile, past, multiplier, half, target)
    elif bits == 5:
        weyl_5(tile, past, multiplier, half, target)
    elif bits == 6:
        weyl_6(tile, past, multiplier, half, target)
    elif bits == 7:
        weyl_7(tile, past, multiplier, half, target)
    else:
        weyl_8(tile, past, multiplier, half, target)


def sum_tiles(bits, tile, past, tiles, multiplier, half, x, sums):  # type: ignore[no-untyped-def]
    """Add up the products of whole tiles, computed, with one token (weyl.py)."""
    if bits == 3:
        sum_weyl_3(tile, past, tiles, multiplier, half, x, sums)
    elif bits == 2:
        sum_weyl_2(tile, past, tiles, multiplier, half, x, sums)
    elif bits == 4:
        sum_weyl_4(tile, past, tiles, multiplier, half, x, sums)
    elif bits == 1:
        sum_weyl_1(tile, past, tiles, multiplier, half, x, sums)
    elif bits == 5:
        sum_weyl_5(tile, past, tiles, multiplier, half, x, sums)
    elif bits == 6:
        sum_weyl_6(tile, past, tiles, multiplier, half, x, sums)
    elif bits == 7:
        sum_weyl_7(tile, past, tiles, multiplier, half, x, sums)
    else:
        sum_weyl_8(tile, past, tiles, multiplier, half, x, sums)


def sum_chunks(bits, tile, past, chunks, multiplier, half, x, scales, sums):  # type: ignore[no-untyped-def]
    """Add up the products of tiles, computed, with one token in integers (weyl.py)."""
    if bits == 3:
        sum_weyl_chunks_3(tile, past, chunks, multiplier, half, x, scales, sums)
    elif bits == 2:
        sum_weyl_chunks_2(tile, past, chunks, multiplier, half, x, scales, sums)
    elif bits == 4:
        sum_weyl_chunks_4(tile, past, chunks, multiplier, half, x, scales, sums)
    elif bits == 1:
        sum_weyl_chunks_1(tile, past, chunks, multiplier, half, x, scales, sums)
    elif bits == 5:
        sum_weyl_chunks_5(tile, past, chunks, multiplier, half, x, scales, sums)
    elif bits == 6:
        sum_weyl_chunks_6(tile, past, chunks, multiplier, half, x, scales, sums)
    elif bits == 7:
        sum_weyl_chunks_7(tile, past, chunks, multiplier, half, x, scales, sums)
    else:
        sum_weyl_chunks_8(tile, past, chunks, multiplier, half, x, scales, sums)


def sum_computed(task, walk, tokens, x, sums):  # type: ignore[no-untyped-def]
    """Add up the products of those tiles of a strip that need no other memory; return how many."""
    bits, multiplier = get(task, BITS), get(task, MULTIPLIER)
    has_other = get(task, SOURCE) == MMA_WALKS or get(task, PLACES) != 0
    if tokens > 1 or not multiplier or has_other:
        return 0
    tile, whole = get(task, CODES) + walk * 32 * bits, get(task, N) // 16
    past, half, chunk = tile + 32 * bits - 8, half_of(get(task, NUMBER_BITS)), get(task, CHUNK)
    done = 0
    if chunk and not get(task, N_FLOAT_CHUNKS):
        chunks, scales = get(task, N) // chunk, get(task, X_SCALES)
        sum_chunks(bits, tile, past, chunks, multiplier, half, get(task, X_INT), scales, sums)
        done = chunks * (chunk // 16)
    far = 32 * bits * done
    left, x = whole - done, x + 64 * done
    sum_tiles(bits, tile + far, past + far, left, multiplier, half, x, sums)
    return whole
