"""Which levels are offered to which unit: the default menu, and one the user writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from . import compose
from .level import Level

Shape = tuple[int, int]

# Whole-bit levels of one group size make an additive allocator return the uniform plan at
# whole-bit budgets; the steps between them (half groups, double groups) let a budget be used up.
DEFAULT_BITS = (2, 3, 4, 5, 6, 8)
FINE_BITS = (2, 3, 4)


def default_levels(method: str = "gptq") -> list[str]:
    """Return the default menu: 2-8 bits at group 64, and 2-4 bits at groups 32 and 128 as well."""
    whole = [f"{method}:bits={b},group_size=64" for b in DEFAULT_BITS]
    fine = [f"{method}:bits={b},group_size={g}" for b in FINE_BITS for g in (32, 128)]
    return whole + fine


def menus(
    shapes: Mapping[str, Shape], levels: Sequence[str | Level] | None = None
) -> dict[str, list[Level]]:
    """Return unit -> the levels it is offered, cheapest first.

    With `levels` given, every unit must take every level, else ValueError names units, shape and
    group sizes that would fit. With the default menu, a level that does not fit a unit's shape is
    left out for that unit, and a unit that takes no group of 64 is offered the largest of
    32, 16 and a whole row that it takes instead.
    """
    if levels is None:
        return {unit: _default_menu(unit, shape) for unit, shape in shapes.items()}
    wanted = [compose.normalize(level) for level in levels]
    if repeated := {str(x) for x in wanted if wanted.count(x) > 1}:
        raise ValueError(f"levels are given twice: {', '.join(sorted(repeated))}")
    for unit, shape in shapes.items():
        for level in wanted:
            try:
                compose.check_shape(level, shape)
            except ValueError as error:
                raise ValueError(f"{unit}: {error}") from error
    return {unit: _by_cost(wanted, shape) for unit, shape in shapes.items()}


def fits(level: Level, shape: Shape) -> bool:
    """Return whether a weight of `shape` can take `level`."""
    try:
        compose.check_shape(level, shape)
    except ValueError:
        return False
    return True


def _default_menu(unit: str, shape: Shape) -> list[Level]:
    offered = [compose.normalize(level) for level in default_levels()]
    fitting = [level for level in offered if fits(level, shape)]
    if not any(fits(level, shape) for level in offered[: len(DEFAULT_BITS)]):
        group = next((g for g in (32, 16) if shape[1] % g == 0), -1)
        fitting = [compose.normalize(f"gptq:bits={b},group_size={group}") for b in DEFAULT_BITS]
    return _by_cost(fitting, shape)


def _by_cost(levels: Sequence[Level], shape: Shape) -> list[Level]:
    return sorted(levels, key=lambda level: (compose.cost_bits(level, shape), str(level)))
