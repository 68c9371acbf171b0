"""Menus that hold the levels of the plans that a search starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..methods import compose
from ..methods.base import Shape
from ..plans.level import Level
from ..plans.plan import Plan


def with_starts(
    offered: Mapping[str, list[Level]], shapes: Mapping[str, Shape], plans: Sequence[str]
) -> dict[str, list[Level]]:
    """Return a default menu with the levels of plans to start from: they may be of other sizes.

    Levels that make no sense for a unit are left out: `Problem.starts` says what is wrong.
    """
    made = {unit: list(menu) for unit, menu in offered.items()}
    for name in plans:
        for unit, text in Plan.from_pretrained(name).levels.items():
            if unit not in made or text.is_drop:
                continue
            try:
                level = compose.normalize(text)
                compose.check_shape(level, shapes[unit])
            except ValueError:
                continue
            if level not in made[unit]:
                made[unit].append(level)
    return made
