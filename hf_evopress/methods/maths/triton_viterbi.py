"""Triton: the nearest walk through a trellis, one program for each walk.

A program holds what all 2^L states cost. Seen as (ways, pasts), a state's number is
way * pasts + past of the step before; as (pasts, ways), it is past * ways + way of this one.
Even weights bring EVEN bits and odd ones ODD, so the two have ways and pasts of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def next_step(  # type: ignore[no-untyped-def]
    cost, value, x, came_from, walk, length, i, MOST: tl.constexpr,
    PASTS: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """Return what states cost after weight i, (PASTS, WAYS) float32, and write the ways into the
    cheapest of each past; cost: that after the weight before it, in any shape; value (PASTS, WAYS):
    what states stand for."""
    rest, way = tl.arange(0, PASTS), tl.arange(0, WAYS)
    image = tl.reshape(cost, (WAYS, PASTS)).to(tl.int32, bitcast=True)
    least = tl.min((image & -WAYS) | way[:, None], axis=0)
    tl.store(came_from + (walk * length + i) * MOST + rest, (least & (WAYS - 1)).to(tl.uint8))
    so_far = (least & -WAYS).to(tl.float32, bitcast=True)
    step = tl.load(x + walk * length + i) - value
    return so_far[:, None] + step * step


@triton.jit
def forward(  # type: ignore[no-untyped-def]
    x, values, past, came_from, ends, length,
    EVEN: tl.constexpr, ODD: tl.constexpr, PASTS: tl.constexpr, NEVER: tl.constexpr,
):  # fmt: skip
    """Write the way into the cheapest state of every past (walks, length, PASTS) uint8, and where
    the cheapest walk ends (walks,) int32. past: where it starts and ends, or None; length: even.
    """
    walk = tl.program_id(0).to(tl.int64)
    WAYS: tl.constexpr = 1 << EVEN
    WAYS_ODD: tl.constexpr = 1 << ODD
    PASTS_ODD: tl.constexpr = (PASTS << EVEN) >> ODD
    rest, way = tl.arange(0, PASTS), tl.arange(0, WAYS)
    value = tl.load(values + rest[:, None] * WAYS + way[None, :])  # once: it stays in registers
    of_odd = tl.reshape(value, (PASTS_ODD, WAYS_ODD))
    step = tl.load(x + walk * length) - value
    cost = step * step
    if past is not None:
        own = tl.load(past + walk)
        cost = tl.where((rest == own)[:, None], cost, NEVER)
    for i in range(1, length - 1, 2):
        between = next_step(cost, of_odd, x, came_from, walk, length, i, PASTS, PASTS_ODD, WAYS_ODD)
        cost = next_step(between, value, x, came_from, walk, length, i + 1, PASTS, PASTS, WAYS)
    last = next_step(
        cost, of_odd, x, came_from, walk, length, length - 1, PASTS, PASTS_ODD, WAYS_ODD
    )
    at_end = tl.reshape(last, (WAYS, PASTS))
    if past is not None:  # the last L - k bits of the end are the past
        at_end = tl.where((rest == own)[None, :], at_end, 2 * NEVER)
    # the first of equals, as a loop over states takes it
    number = way[:, None] * PASTS + rest[None, :]
    best = tl.min(tl.min(at_end, axis=0), axis=0)
    first = tl.min(tl.min(tl.where(at_end == best, number, WAYS * PASTS), axis=0), axis=0)
    tl.store(ends + walk, first)


@triton.jit
def backward(  # type: ignore[no-untyped-def]
    came_from, ends, states, length, n,
    EVEN: tl.constexpr, ODD: tl.constexpr, PASTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the states (walks, length) int32 of the walks that end in `ends`, BLOCK at a time."""
    walk = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = walk < n
    state = tl.load(ends + walk, mask=is_there, other=0)
    for j in range(0, length):
        i = length - 1 - j
        tl.store(states + walk * length + i, state, mask=is_there)
        bits = EVEN + (i % 2) * (ODD - EVEN)
        before = state >> bits
        place = came_from + (walk * length + i) * PASTS + before
        way = tl.load(place, mask=is_there & (i > 0), other=0).to(tl.int32)
        state = way * ((PASTS << EVEN) >> bits) + before
