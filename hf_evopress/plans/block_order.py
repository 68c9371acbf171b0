"""Plans of many sizes: units whose levels are stacks of blocks, and one order of all blocks.

The first blocks of the order, as many as a size has room for, are a plan as well. The order is
kept in the plan itself, under `search`: the numbers of the units, as they stand in the plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .level import Level, Term
from .plan import Plan

METHOD, BLOCKS, KEY = "bitstack", "blocks", "block_order"


def with_order(plan: Plan, order: Sequence[str]) -> Plan:
    """Return `plan` with the units of its blocks in order."""
    numbers = {unit: number for number, unit in enumerate(plan)}
    text = " ".join(str(numbers[unit]) for unit in order)
    made = plan.replace(search={**plan.search, KEY: text})
    order_of(made)  # raises where order and levels disagree
    return made


def has_order(plan: Plan) -> bool:
    """Return whether `plan` is one of many sizes."""
    return KEY in plan.search


def order_of(plan: Plan) -> tuple[str, ...]:
    """Return the units of the blocks in order; ValueError without an order, or a wrong one."""
    if not has_order(plan):
        raise ValueError(
            "the model has one size: its plan has no order of blocks; `hf-evopress stack` makes "
            "a model of many sizes"
        )
    units = list(plan)
    try:
        numbers = [int(word) for word in str(plan.search[KEY]).split()]
        order = tuple(units[number] for number in numbers if number >= 0)
    except (ValueError, IndexError):
        raise ValueError(f"the plan's {KEY} has other words than numbers of units") from None
    counts, wanted = Counter(order), {u: n for u, level in plan.items() if (n := blocks_of(level))}
    wrong = [u for u in {*counts, *wanted} if counts[u] != wanted.get(u, 0)]
    if wrong or len(order) != len(numbers) or len(set(order[: len(wanted)])) != len(wanted):
        raise ValueError(
            f"the plan's {KEY} does not have the blocks of its levels, each unit's first one "
            f"before all others: {', '.join(sorted(wrong)[:4]) or 'their order'}"
        )
    return order


def blocks_of(level: Level) -> int:
    """Return how many blocks `level` stacks; 0 for levels that are no stack."""
    if len(level.terms) != 1 or level.terms[0].method != METHOD:
        return 0
    return int(level.terms[0].kwargs[BLOCKS])


def with_blocks(level: Level, blocks: int) -> Level:
    """Return the level of another number of blocks."""
    return Level((Term.of(METHOD, **{**level.terms[0].kwargs, BLOCKS: blocks}),))


def prefix(plan: Plan, n: int) -> Plan:
    """Return the plan of the first n blocks of the order of `plan`."""
    order = order_of(plan)[:n]
    levels = dict(plan.levels)
    for unit, blocks in Counter(order).items():
        levels[unit] = with_blocks(plan[unit], blocks)
    return with_order(plan.replace(levels=levels, budget={}, results={}), order)
