"""Triton: the nearest walk through a trellis, one program for each walk.

A program holds what all 2^L states cost. Seen as (ways, pasts), a state's number is
way * pasts + past of the step before; as (pasts, ways), it is past * ways + way of this one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward(  # type: ignore[no-untyped-def]
    x, values, past, came_from, ends, length,
    WAYS: tl.constexpr, PASTS: tl.constexpr, NEVER: tl.constexpr,
):  # fmt: skip
    """Write the way into the cheapest state of every past (walks, length, PASTS) uint8, and where
    the cheapest walk ends (walks,) int32. past: where it starts and ends, or None."""
    walk = tl.program_id(0).to(tl.int64)
    rest, way = tl.arange(0, PASTS), tl.arange(0, WAYS)
    value = tl.load(values + rest[:, None] * WAYS + way[None, :])
    step = tl.load(x + walk * length) - value
    cost = step * step
    if past is not None:
        own = tl.load(past + walk)
        cost = tl.where((rest == own)[:, None], cost, NEVER)
    for i in range(1, length):
        image = tl.reshape(cost, (WAYS, PASTS)).to(tl.int32, bitcast=True)
        least = tl.min((image & -WAYS) | way[:, None], axis=0)
        tl.store(came_from + (walk * length + i) * PASTS + rest, (least & (WAYS - 1)).to(tl.uint8))
        so_far = (least & -WAYS).to(tl.float32, bitcast=True)
        step = tl.load(x + walk * length + i) - value
        cost = so_far[:, None] + step * step
    if past is not None:  # the last L - k bits of the end are the past
        at_end = tl.where((rest == own)[None, :], tl.reshape(cost, (WAYS, PASTS)), 2 * NEVER)
    else:
        at_end = tl.reshape(cost, (WAYS, PASTS))
    # the first of equals, as a loop over states takes it
    number = way[:, None] * PASTS + rest[None, :]
    best = tl.min(tl.min(at_end, axis=0), axis=0)
    first = tl.min(tl.min(tl.where(at_end == best, number, WAYS * PASTS), axis=0), axis=0)
    tl.store(ends + walk, first)


@triton.jit
def backward(  # type: ignore[no-untyped-def]
    came_from, ends, states, length, n,
    BITS: tl.constexpr, PASTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the states (walks, length) int32 of the walks that end in `ends`, BLOCK at a time."""
    walk = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = walk < n
    state = tl.load(ends + walk, mask=is_there, other=0)
    for j in range(0, length):
        i = length - 1 - j
        tl.store(states + walk * length + i, state, mask=is_there)
        before = state >> BITS
        place = came_from + (walk * length + i) * PASTS + before
        way = tl.load(place, mask=is_there & (i > 0), other=0).to(tl.int32)
        state = way * PASTS + before
