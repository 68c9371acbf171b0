"""Rows of trellis codes, walk by walk: part of what numba compiles.

For prompts and gradients, which unpack rows; products with few tokens read strips (strips.py).
"""

from __future__ import annotations

from typing import Any

from ..task import BITS, CODES, MMA_WALKS, NUMBER_BITS, PLACES, ROOM, SOURCE, TABLE, WIDTH, W

# what compiled.py puts here: loads and stores (memory.py)
get: Any = None
u8: Any = None
f32: Any = None
set_f32: Any = None


def past_of(task, walk, at):  # type: ignore[no-untyped-def]
    """Return the 16 bits before a walk, which lies at `at`: its start, or those at its end."""
    pair, starts = get(task, BITS), get(task, PLACES)
    if not starts:
        return (u8(at + 16 * pair - 2) << 8) | u8(at + 16 * pair - 1)
    width = get(task, NUMBER_BITS) - (pair >> 1)  # of a start, in one string for all walks
    end, some = walk * width + width, 0
    for i in range((walk * width) >> 3, (end + 7) >> 3):
        some = (some << 8) | u8(starts + i)
    return (some >> (-end & 7)) & ((1 << width) - 1)


def read_walks(task, row, s):  # type: ignore[no-untyped-def]
    """Write the values of a row of walks through a trellis, 16 of each tile (methods/trellis.py).

    The state of a weight is the last bits up to its own. A row of a tile is four runs of four
    weights: a quarter of it each, or in the order `mma` (methods/maths/tile_order.py) of inputs
    2 r, 2 r + 1, 2 r + 8 and 2 r + 9. The bits of a run and the 16 before them lie in seven bytes.
    """
    pair, tiles, table = get(task, BITS), get(task, WIDTH), get(task, TABLE)
    mask, is_mma = (1 << get(task, NUMBER_BITS)) - 1, get(task, SOURCE) == MMA_WALKS
    w, strip = s + W * get(task, ROOM), (row // 16) * tiles
    start, step = (row & 15) * 16, 4
    if is_mma:
        start, step = 32 * (row & 7) + 4 * ((row >> 3) & 1), 8
    for tile in range(tiles):
        at = get(task, CODES) + (strip + tile) * 16 * pair
        past = past_of(task, strip + tile, at)
        for run in range(4):
            bit = (((start + step * run) * pair) >> 1) - 16
            byte = bit >> 3
            some = 0
            for i in range(byte, byte + 7):
                own = (past >> (-8 * (i + 1))) & 255 if i < 0 else u8(at + min(i, 16 * pair - 1))
                some = (some << 8) | own
            after = 56 - 16 - (bit - 8 * byte)  # bits from the run's first to the last byte's end
            for j in range(4):
                state = (some >> (after - (((j + 1) * pair) >> 1))) & mask
                place = 16 * tile + 4 * run + j
                if is_mma:
                    place = 16 * tile + 2 * run + 8 * (j >> 1) + (j & 1)
                set_f32(w + 4 * place, f32(table + 4 * state))
