"""Levels that neighbouring blocks share, on the menu of a recipe that says `share`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..methods import compose
from ..methods.menu import fits
from ..models.neighbours import any_shared, pairs
from ..plans.level import Level
from ..recipes.recipe import Recipe

Shape = tuple[int, int]

LEVELS = tuple(
    f"gptq:bits={bits},group_size=64 + lowrank:rank={rank},factors=int8,shared=true"
    for bits in (3, 4)
    for rank in (16, 64)
)


def with_shared(
    offered: Mapping[str, list[Level]], shapes: Mapping[str, Shape], recipe: Recipe
) -> tuple[dict[str, list[Level]], list[tuple[str, str]]]:
    """Return the menus with shared levels for layers that pair up, and these pairs.

    Two layers of a pair take one level, shared or not. Those that the user offers are taken, else
    LEVELS.
    """
    menus = {unit: list(levels) for unit, levels in offered.items()}
    said = any_shared(level for levels in menus.values() for level in levels)
    if not recipe.share:
        return menus, []
    found = pairs(shapes)
    if not found:
        raise ValueError("share: no two neighbouring blocks have layers of one shape")
    levels = [] if said is not None else [compose.normalize(level) for level in LEVELS]
    paired = {unit for pair in found for unit in pair}
    for unit, menu in menus.items():
        if unit not in paired:
            menus[unit] = [level for level in menu if not compose.n_shared(level)]
        else:
            menu += [x for x in levels if fits(x, shapes[unit]) and x not in menu]
        if not menus[unit]:
            raise ValueError(f"{unit} has no neighbour to share with: offer another level as well")
    return menus, found


def check_shared(offered: Mapping[str, list[Level]], pairs: Sequence[tuple[str, str]]) -> None:
    """Raise ValueError where a unit that has no other to share with is offered a shared level."""
    paired = {unit for pair in pairs for unit in pair}
    for unit, menu in offered.items():
        if unit not in paired and (level := any_shared(menu)) is not None:
            raise ValueError(
                f"{unit} shares with no other layer here and cannot take '{level}'; such levels "
                "need share (--share), and a neighbour"
            )
