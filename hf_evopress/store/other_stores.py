"""Levels that other stores of a work folder hold already: copied from there, not made again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..methods import compose
from ..methods.base import State
from ..plans.level import Level
from .index import INDEX, read_index, same_make
from .unit_file import read_scores, read_state, unit_file

Made = tuple[State, Mapping[str, float]]  # packed tensors, and what was measured of them


class OtherStores:
    """What stores, finished or not, hold that were made from the same as the one of `index`."""

    def __init__(self, folders: Iterable[Path], index: Mapping[str, Any]) -> None:
        known = [(f, read_index(f)) for f in folders if (f / INDEX).is_file()]
        self._stores = [(f, i) for f, i in known if same_make(i, index)]

    def of(self, unit: Mapping[str, Any], levels: Sequence[Level]) -> dict[Level, Made]:
        """Return those of `levels` that are there for a unit, as an index describes it.

        A damaged file has none.
        """
        found: dict[Level, Made] = {}
        for folder, index in self._stores:
            for number, other in enumerate(index["units"]):
                path = unit_file(folder, number)
                if {**other, "levels": None} != {**unit, "levels": None} or not path.is_file():
                    continue
                there = [compose.normalize(level) for level in other["levels"]]
                try:
                    scores = read_scores(path, unit["name"])
                    for level in set(there).intersection(levels).difference(found):
                        at = there.index(level)
                        found[level] = read_state(path, unit["name"], at), scores[at]
                except ValueError:
                    continue
        return found
