"""Trellis-coded rows times activations, 16 rows at a time: part of what numba compiles.

A strip of 16 rows is read tile by tile: 256 values go to the cache of the core, and to the sums of
all tokens. Beside the table of values there is little in the first-level cache. Values that are
computed (computed.py) stay 16-bit integers where activations become those, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ....methods.maths.codebook import weyl_half
from ..task import (
    BFLOAT16,
    BITS,
    CHUNK,
    CODES,
    MMA_WALKS,
    MULTIPLIER,
    N_FLOAT_CHUNKS,
    NUMBER_BITS,
    PLACES,
    SOURCE,
    TABLE,
    TOKENS,
    WIDTH,
    X_FLOAT,
    Y_KIND,
    N,
    Y,
)
from .computed import sum_computed, words_of

MOST = 16  # tokens whose sums a thread has room for
# bytes in a thread's memory, 17600 in all
TILE, LAST, SCRATCH, PAST, SUMS, WORDS = 0, 1024, 1088, 1152, 1216, 9408
OF_TOKEN = 512  # bytes of sums
OTHER = 2048  # where a second tile is decoded, in the room for sums

# what compiled.py puts here: loads and stores (memory.py), vectors (walks.py), native.write,
# rows.to_bfloat16
get: Any = None
write: Any = None
to_bfloat16: Any = None
f32: Any = None
set_f32: Any = None
set_u8: Any = None
past_of: Any = None
float_words: Any = None
add_tile: Any = None
add_mma_tile: Any = None
put_tiles: Any = None
decode_2: Any = None
decode_3: Any = None
decode_4: Any = None
decode_5: Any = None
decode_6: Any = None
decode_7: Any = None
decode_8: Any = None
decode_9: Any = None
decode_10: Any = None
decode_12: Any = None
decode_14: Any = None
decode_16: Any = None


def decode(task, walk, past, s):  # type: ignore[no-untyped-def]
    """Write the values of a tile, float32, in the order of its walk.

    past: where to put what comes before a walk that has a start.
    """
    pair, table, size = get(task, BITS), get(task, TABLE), get(task, NUMBER_BITS)
    tile, target = get(task, CODES) + walk * 16 * pair, s + TILE
    before = tile + 16 * pair - 8
    if get(task, PLACES):
        start, before = past_of(task, walk, tile), past
        set_u8(past + 6, start >> 8)
        set_u8(past + 7, start)
    if get(task, MULTIPLIER):
        words_of(pair, tile, before, 1, get(task, MULTIPLIER), weyl_half(size), s + WORDS)
        float_words(s + WORDS, target, 32)
    elif pair == 6:
        decode_6(tile, before, table, size, target)
    elif pair == 4:
        decode_4(tile, before, table, size, target)
    elif pair == 5:
        decode_5(tile, before, table, size, target)
    elif pair == 8:
        decode_8(tile, before, table, size, target)
    elif pair == 7:
        decode_7(tile, before, table, size, target)
    elif pair == 3:
        decode_3(tile, before, table, size, target)
    elif pair == 2:
        decode_2(tile, before, table, size, target)
    elif pair == 9:
        decode_9(tile, before, table, size, target)
    elif pair == 10:
        decode_10(tile, before, table, size, target)
    elif pair == 12:
        decode_12(tile, before, table, size, target)
    elif pair == 14:
        decode_14(tile, before, table, size, target)
    else:
        decode_16(tile, before, table, size, target)


def multiply_strip(task, row, end, s):  # type: ignore[no-untyped-def]
    """Write the products of rows row .. end, of one strip, with all tokens."""
    tokens, is_mma = get(task, TOKENS), get(task, SOURCE) == MMA_WALKS
    parts = 4 if is_mma else 8
    for first in range(0, tokens, MOST):
        sum_strip(task, row, first, min(MOST, tokens - first), s)
        for token in range(min(MOST, tokens - first)):
            for i in range(end - row):
                total, at = np.float32(0.0), s + SUMS + OF_TOKEN * token
                at += 32 * (i & 7) + 16 * (i >> 3) if is_mma else 32 * i
                for j in range(parts):
                    total += f32(at + 4 * j)
                write(task, row + i, first + token, total, s + SCRATCH)


def sum_strip(task, row, first, tokens, s):  # type: ignore[no-untyped-def]
    """Add up the products of a strip with some tokens, in parts."""
    tiles, n, is_mma = get(task, WIDTH), get(task, N), get(task, SOURCE) == MMA_WALKS
    x, walk = get(task, X_FLOAT) + 4 * first * n, (row // 16) * tiles
    for i in range(128 * tokens):
        set_f32(s + SUMS + 4 * i, np.float32(0.0))
    if get(task, CHUNK) and not get(task, N_FLOAT_CHUNKS):
        sum_computed(task, walk, first, tokens, s + SUMS, s + WORDS)
        return
    for tile in range(tiles):
        decode(task, walk + tile, s + PAST, s)
        rest = n - 16 * tile
        for token in range(tokens):
            own, sums = x + 4 * (token * n + 16 * tile), s + SUMS + OF_TOKEN * token
            if rest < 16:
                for i in range(16):
                    value = f32(own + 4 * i) if i < rest else np.float32(0.0)
                    set_f32(s + LAST + 4 * i, value)
                own = s + LAST
            if is_mma:
                add_mma_tile(s + TILE, own, sums, 1)
            else:
                add_tile(s + TILE, own, sums, 1)


def expand_strip(task, at, row, end, s):  # type: ignore[no-untyped-def]
    """Write the weights of rows row .. end, of one strip, the at-th that is asked for and on."""
    tiles, n, y, in_pairs = get(task, WIDTH), get(task, N), get(task, Y), 0
    is_short, walk = get(task, Y_KIND) == BFLOAT16, (row // 16) * get(task, WIDTH)
    if is_short and end - row == 16:
        in_pairs = n // 32 * 2
        for tile in range(0, in_pairs, 2):
            decode(task, walk + tile, s + PAST, s)
            decode(task, walk + tile + 1, s + PAST, s + OTHER)
            put_tiles(s + TILE, s + OTHER + TILE, y + 2 * (at * n + 16 * tile), 2 * n, 16)
    for tile in range(in_pairs, tiles):
        decode(task, walk + tile, s + PAST, s)
        some = min(16, n - 16 * tile)
        for i in range(end - row):
            source, place = s + TILE + 64 * i, (at + i) * n + 16 * tile
            if is_short:
                to_bfloat16(source, some, y + 2 * place)
            else:
                for j in range(some):
                    set_f32(y + 4 * (place + j), f32(source + 4 * j))
