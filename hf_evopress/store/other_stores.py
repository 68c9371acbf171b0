"""Levels that other stores of a work folder hold already: copied from there, not made again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..methods import compose
from ..methods.base import State
from ..plans.level import Level
from .index import read_index, same_make
from .unit_file import read_scores, read_state, unit_file

Made = tuple[State, Mapping[str, float]]  # packed tensors, and what was measured of them


class OtherStores:
    """What stores, finished or not, hold that were made from the same as the one of `index`.

    What cannot be read holds nothing.
    """

    def __init__(self, folders: Iterable[Path], index: Mapping[str, Any]) -> None:
        self._stores: list[tuple[Path, dict[str, tuple[int, Mapping[str, Any]]]]] = []
        for folder in folders:
            try:
                found = read_index(folder)
                if same_make(found, index):
                    units = {unit["name"]: (n, unit) for n, unit in enumerate(found["units"])}
                    self._stores.append((folder, units))
            except (OSError, ValueError, TypeError, LookupError):
                continue

    def of(
        self, unit: Mapping[str, Any], levels: Sequence[Level], measures: Collection[str]
    ) -> dict[Level, Made]:
        """Return those of `levels` that are there for a unit, as an index describes it.

        measures: what must have been measured of them. An end that was not searched was made
        without statistics, and has none.
        """
        found: dict[Level, Made] = {}
        for folder, units in self._stores:
            number, other = units.get(unit["name"], (0, {}))
            if {**other, "levels": None} != {**unit, "levels": None}:
                continue
            path = unit_file(folder, number)
            try:
                there = [compose.normalize(level) for level in other["levels"]]
                scores = read_scores(path, unit["name"]) if path.is_file() else []
                for at, (level, measured) in enumerate(zip(there, scores, strict=False)):
                    if level in levels and level not in found and {*measures} <= measured.keys():
                        found[level] = read_state(path, unit["name"], at), measured
            except (OSError, ValueError, LookupError):
                continue
        return found
