"""Tiles of walks whose values are computed (weyl.py), by their bits: numba compiles it.

Activations in bfloat16 are multiplied as integers with a scale per chunk (inputs.py).
"""

from __future__ import annotations

from typing import Any

from ....methods.maths.codebook import weyl_half
from ..task import (
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
weyl_2: Any = None
weyl_3: Any = None
weyl_4: Any = None
weyl_5: Any = None
weyl_6: Any = None
weyl_7: Any = None
weyl_8: Any = None
weyl_9: Any = None
weyl_10: Any = None
weyl_12: Any = None
weyl_14: Any = None
weyl_16: Any = None
sum_weyl_2: Any = None
sum_weyl_3: Any = None
sum_weyl_4: Any = None
sum_weyl_5: Any = None
sum_weyl_6: Any = None
sum_weyl_7: Any = None
sum_weyl_8: Any = None
sum_weyl_9: Any = None
sum_weyl_10: Any = None
sum_weyl_12: Any = None
sum_weyl_14: Any = None
sum_weyl_16: Any = None


def words_of(pair, tile, past, tiles, multiplier, half, target):  # type: ignore[no-untyped-def]
    """Write the values of neighbouring tiles as 16-bit integers (weyl.py)."""
    if pair == 6:
        weyl_6(tile, past, tiles, multiplier, half, target)
    elif pair == 4:
        weyl_4(tile, past, tiles, multiplier, half, target)
    elif pair == 5:
        weyl_5(tile, past, tiles, multiplier, half, target)
    elif pair == 8:
        weyl_8(tile, past, tiles, multiplier, half, target)
    elif pair == 7:
        weyl_7(tile, past, tiles, multiplier, half, target)
    elif pair == 3:
        weyl_3(tile, past, tiles, multiplier, half, target)
    elif pair == 2:
        weyl_2(tile, past, tiles, multiplier, half, target)
    elif pair == 9:
        weyl_9(tile, past, tiles, multiplier, half, target)
    elif pair == 10:
        weyl_10(tile, past, tiles, multiplier, half, target)
    elif pair == 12:
        weyl_12(tile, past, tiles, multiplier, half, target)
    elif pair == 14:
        weyl_14(tile, past, tiles, multiplier, half, target)
    else:
        weyl_16(tile, past, tiles, multiplier, half, target)


def sum_chunks(pair, tile, past, chunks, tiles, multiplier, half, x, scales, sums):  # type: ignore[no-untyped-def]
    """Add up the products of tiles with one token in integers (weyl.py)."""
    if pair == 6:
        sum_weyl_6(tile, past, chunks, tiles, multiplier, half, x, scales, sums)
    elif pair == 4:
        sum_weyl_4(tile, past, chunks, tiles, multiplier, half, x, scales, sums)
    elif pair == 5:
        sum_weyl_5(tile, past, chunks, tiles, multiplier, half, x, scales, sums)
    elif pair == 8:
        sum_weyl_8(tile, past, chunks, tiles, multiplier, half, x, scales, sums)
    elif pair == 7:
        sum_weyl_7(tile, past, chunks, tiles, multiplier, half, x, scales, sums)
    elif pair == 3:
        sum_weyl_3(tile, past, chunks, tiles, multiplier, half, x, scales, sums)
    elif pair == 2:
        sum_weyl_2(tile, past, chunks, tiles, multiplier, half, x, scales, sums)
    elif pair == 9:
        sum_weyl_9(tile, past, chunks, tiles, multiplier, half, x, scales, sums)
    elif pair == 10:
        sum_weyl_10(tile, past, chunks, tiles, multiplier, half, x, scales, sums)
    elif pair == 12:
        sum_weyl_12(tile, past, chunks, tiles, multiplier, half, x, scales, sums)
    elif pair == 14:
        sum_weyl_14(tile, past, chunks, tiles, multiplier, half, x, scales, sums)
    else:
        sum_weyl_16(tile, past, chunks, tiles, multiplier, half, x, scales, sums)


def sum_computed(task, walk, first, tokens, sums, words):  # type: ignore[no-untyped-def]
    """Add up the products of the tiles of a strip with some tokens that are all integers.

    words: memory for the values of a chunk of tiles.
    """
    pair, multiplier, chunk = get(task, BITS), get(task, MULTIPLIER), get(task, CHUNK)
    chunks, tiles, half = get(task, N) // chunk, chunk // 16, weyl_half(get(task, NUMBER_BITS))
    tile = get(task, CODES) + walk * 16 * pair
    past = tile + 16 * pair - 8
    x, scales = get(task, X_INT) + 2 * first * chunks * chunk, get(task, X_SCALES)
    scales += 4 * first * chunks
    if tokens == 1:
        sum_chunks(pair, tile, past, chunks, tiles, multiplier, half, x, scales, sums)
        return
    for c in range(chunks):
        far = c * tiles * 16 * pair
        words_of(pair, tile + far, past + far, tiles, multiplier, half, words)
        for token in range(tokens):
            here = token * chunks + c
            own, scale = x + 2 * here * chunk, scales + 4 * here
            add_words(words, tiles, own, scale, sums + 512 * token)
