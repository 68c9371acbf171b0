"""Levels of a plan that their weights cannot take, told from the level strings alone.

Without torch, so not as `compose.check_shape` tells it: what every method means by `bits`, `rank`,
`sparsity` and `group_size` is checked, not what one of them asks for besides.
"""

from __future__ import annotations

from collections import Counter

from ..base.plugins import did_you_mean, names
from ..plans.level import Level, Term
from ..plans.plan import Plan, Shape

MOST_BITS = 32
MOST_LINES = 8


def impossible_levels(plan: Plan) -> str:
    """Return a line per level that some weights cannot take, and why; "" where there is none.

    Figures that are averaged over such levels mean nothing.
    """
    found = Counter(
        (str(level), why)
        for unit, level in plan.items()
        if (why := _why_not(level, plan.shapes.get(unit)))
    )
    if not found:
        return ""
    lines = [f"  {level} ({n} units): {why}" for (level, why), n in sorted(found.items())]
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"  and {len(lines) - MOST_LINES} more"]
    told = "levels that cannot be applied; the bits shown count them as if they could:"
    return "\n".join([told, *lines])


def _why_not(level: Level, shape: Shape | None) -> str:
    return next((why for term in level.terms if (why := _term_why_not(term, shape))), "")


def _term_why_not(term: Term, shape: Shape | None) -> str:
    """Return why a weight of `shape` cannot take `term`, "" where nothing speaks against it."""
    known = names("methods")
    if term.method not in known:
        return f"no method {term.method!r} is installed{did_you_mean(term.method, known)}"
    said = {k: v for k, v in term.kwargs.items() if isinstance(v, int | float)}
    bits, sparsity, group = said.get("bits"), said.get("sparsity"), said.get("group_size")
    if bits is not None and not 0 < bits <= MOST_BITS:
        return f"a weight has above 0 and up to {MOST_BITS} bits"
    if sparsity is not None and not 0 <= sparsity <= 1:
        return "a sparsity is from 0 to 1"
    if shape is None:
        return ""
    words = f"a weight of shape {shape[0]}x{shape[1]}"
    if said.get("rank", 0) > min(shape):
        return f"{words} has at most rank {min(shape)}"
    if group is not None and group > 0 and shape[1] % group:
        return f"the {shape[1]} inputs of {words} are no multiple of the group"
    return ""
