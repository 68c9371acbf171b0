"""In which order the blocks of all units are worth their bytes: one order, of which every prefix
is a model.

A unit's blocks come in their own order, so a poor one in front of a good one is taken together
with it: the steps of each unit are merged until their gain per byte falls, and all merged steps are
sorted by it. That is the greedy solution of the knapsack on the lower convex hulls of the units'
losses, for every budget at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

Step = tuple[float, int]  # gain in nats, blocks


def order_blocks(losses: Mapping[str, Sequence[float]], costs: Mapping[str, int]) -> list[str]:
    """Return the unit of each block, best first; the first blocks of all units come before that.

    losses: unit -> predicted loss with 1, 2, ... blocks; costs: unit -> bytes of a block.
    Of equals, the one that is named first comes first.
    """
    steps = [
        (gain / (blocks * costs[unit]), unit, blocks)
        for unit, values in losses.items()
        for gain, blocks in _falling(values)
    ]
    later = [
        unit for _, unit, blocks in sorted(steps, key=lambda step: -step[0]) for _ in range(blocks)
    ]
    return [*losses, *later]


def _falling(values: Sequence[float]) -> list[Step]:
    """Return steps from the first of `values` to the last, each gaining less per block."""
    steps: list[Step] = []
    for before, after in pairwise(values):
        steps.append((before - after, 1))
        while len(steps) > 1 and steps[-1][0] * steps[-2][1] >= steps[-2][0] * steps[-1][1]:
            gain, blocks = steps.pop()
            steps[-1] = (steps[-1][0] + gain, steps[-1][1] + blocks)
    return steps
