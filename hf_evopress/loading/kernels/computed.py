"""Tiles of walks whose values are computed (weyl.py), by their bits: numba compiles it.

Activations in bfloat16 are multiplied as integers with a scale per chunk (inputs.py).
"""

from __future__ import annotations

from typing import Any

from ...methods.maths.codebook import weyl_half
from .task import (
    BITS,
    CHUNK,
    CODES,
    MULTIPLIER,
    NUMBER_BITS,
    X_INT,
    X_SCALES,
    N,
)

# what compiled.py puts here: loads (memory.py), vectors (weyl.py)
get: Any = None
add_words: Any = None
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


def words_of(bits, tile, past, tiles, multiplier, half, target):  # type: ignore[no-untyped-def]
    """Write the values of neighbouring tiles as 16-bit integers (weyl.py)."""
    if bits == 3:
        weyl_3(tile, past, tiles, multiplier, half, target)
    elif bits == 2:
        weyl_2(tile, past, tiles, multiplier, half, target)
    elif bits == 4:
        weyl_4(tile, past, tiles, multiplier, half, target)
    elif bits == 1:
        weyl_1(tile, past, tiles, multiplier, half, target)
    elif bits == 5:
        weyl_5(tile, past, tiles, multiplier, half, target)
    elif bits == 6:
        weyl_6(tile, past, tiles, multiplier, half, target)
    elif bits == 7:
        weyl_7(tile, past, tiles, multiplier, half, target)
    else:
        weyl_8(tile, past, tiles, multiplier, half, target)


def sum_chunks(bits, tile, past, chunks, tiles, multiplier, half, x, scales, sums):  # type: ignore[no-untyped-def]
    """Add up the products of tiles with one token in integers (weyl.py)."""
    if bits == 3:
        sum_weyl_3(tile, past, chunks, tiles, multiplier, half, x, scales, sums)
    elif bits == 2:
        sum_weyl_2(tile, past, chunks, tiles, multiplier, half, x, scales, sums)
    elif bits == 4:
        sum_weyl_4(tile, past, chunks, tiles, multiplier, half, x, scales, sums)
    elif bits == 1:
        sum_weyl_1(tile, past, chunks, tiles, multiplier, half, x, scales, sums)
    elif bits == 5:
        sum_weyl_5(tile, past, chunks, tiles, multiplier, half, x, scales, sums)
    elif bits == 6:
        sum_weyl_6(tile, past, chunks, tiles, multiplier, half, x, scales, sums)
    elif bits == 7:
        sum_weyl_7(tile, past, chunks, tiles, multiplier, half, x, scales, sums)
    else:
        sum_weyl_8(tile, past, chunks, tiles, multiplier, half, x, scales, sums)


def sum_computed(task, walk, first, tokens, sums, words):  # type: ignore[no-untyped-def]
    """Add up the products of the tiles of a strip with some tokens that are all integers.

    words: memory for the values of a chunk of tiles.
    """
    bits, multiplier, chunk = get(task, BITS), get(task, MULTIPLIER), get(task, CHUNK)
    chunks, tiles, half = get(task, N) // chunk, chunk // 16, weyl_half(get(task, NUMBER_BITS))
    tile = get(task, CODES) + walk * 32 * bits
    past = tile + 32 * bits - 8
    x, scales = get(task, X_INT) + 2 * first * chunks * chunk, get(task, X_SCALES)
    scales += 4 * first * chunks
    if tokens == 1:
        sum_chunks(bits, tile, past, chunks, tiles, multiplier, half, x, scales, sums)
        return
    for c in range(chunks):
        far = c * tiles * 32 * bits
        words_of(bits, tile + far, past + far, tiles, multiplier, half, words)
        for token in range(tokens):
            here = token * chunks + c
            own, scale = x + 2 * here * chunk, scales + 4 * here
            add_words(words, tiles, own, scale, sums + 512 * token)
