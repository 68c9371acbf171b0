"""The index of a level store: what it is made from, and what it will hold.

Two stores are of one make where the model, the data and the settings are the same, and so are the
defaults of the methods that both use: a level string leaves defaults out, so a changed default
makes another level of the same name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.reading import read_object, reading
from ..base.resources import atomic_write, clear_leftovers
from ..methods import compose
from ..models.units import Unit
from ..plans.level import Level

FORMAT_VERSION = 1
INDEX = "index.json"
ANEW = "remove the store to build it anew"


def new_index(
    units: Sequence[Unit],
    menus: Mapping[str, Sequence[Level]],
    fingerprint: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the index of a store that holds `menus` (unit -> levels)."""
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": json.loads(json.dumps(fingerprint)),  # as it is read again
        "defaults": compose.defaults({level for menu in menus.values() for level in menu}),
        "units": [
            {
                "name": unit.name,
                "shape": list(unit.shape),
                "block": unit.block,
                "levels": [str(level) for level in menus[unit.name]],
                **({"role": unit.role} if unit.is_end else {}),
            }
            for unit in units
        ],
    }


def same_make(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether two stores' levels of one name are the same levels."""
    return not differences(found, wanted)


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return what two stores were made from that differs, in words."""
    names = [k for k, v in wanted["fingerprint"].items() if found["fingerprint"].get(k) != v]
    names += [k for k in found["fingerprint"] if k not in wanted["fingerprint"]]
    if "defaults" not in found:
        names.append("what its methods do by default, which it does not say,")
    own = found.get("defaults", {})
    return names + [
        f"the defaults of {method}"
        for method, values in wanted["defaults"].items()
        # a parameter that the store does not know came later, and its default changes nothing
        if method in own and {**values, **own[method]} != values
    ]


def covers(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether a store's index has all that another asks for, made from the same."""

    def frame(index: Mapping[str, Any]) -> Any:
        return [{**unit, "levels": None} for unit in index["units"]]

    return (
        same_make(found, wanted)
        and frame(found) == frame(wanted)
        and all(
            {*there["levels"]} >= {*asked["levels"]}
            for there, asked in zip(found["units"], wanted["units"], strict=True)
        )
    )


def start(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """Write the index of a new store, or return that of the one in `folder` if it serves."""
    clear_leftovers(folder)
    if not (folder / INDEX).is_file():
        atomic_write(folder / INDEX, json.dumps(index, indent=1) + "\n")
        return index
    found = read_index(folder)
    if covers(found, index):
        return found
    differing = differences(found, index) or ["the units or their levels"]
    raise ValueError(
        f"{folder} holds a level store made with other settings ({', '.join(differing)} differ); "
        "give another work folder, or remove this one to build anew"
    )


def read_index(folder: Path) -> dict[str, Any]:
    """Return the index in `folder`; ValueError where it is damaged or of another version."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"no level store at {folder}: {INDEX} is missing")
    index = read_object(path, way_out=ANEW)
    if index.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {index.get('format_version')!r}, this hf-evopress reads "
            f"{FORMAT_VERSION}; build the store again"
        )
    with reading(path, way_out=ANEW):
        _check(index)
    return index


def _check(index: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError where an index is not as `new_index` makes them."""
    for key in ("fingerprint", "defaults"):
        if not isinstance(index.get(key, {}), Mapping) or "fingerprint" not in index:
            raise TypeError(f"{key} is an object, got {index.get(key)!r:.200}")
    units = index.get("units")
    if not isinstance(units, list) or not all(isinstance(u, Mapping) for u in units):
        raise TypeError(f"units is a list of objects, got {units!r:.200}")
    for unit in units:
        name, shape, block, levels = (unit[k] for k in ("name", "shape", "block", "levels"))
        if not isinstance(name, str) or not isinstance(unit.get("role", ""), str):
            raise TypeError(f"name and role of a unit are text, got {unit!r:.200}")
        if not isinstance(shape, list) or len(shape) != 2 or type(block) is not int:
            raise TypeError(f"{name} has no shape or no block: {shape!r:.100}, {block!r:.100}")
        if not all(type(n) is int and 0 < n < 2**31 for n in shape):
            raise ValueError(f"the shape of {name} is not a weight's: {shape!r:.100}")
        if not isinstance(levels, list) or not levels:
            raise TypeError(f"{name} has no list of levels: {levels!r:.100}")
        for level in levels:
            compose.normalize(level)
    if len({unit["name"] for unit in units}) < len(units):
        raise ValueError("a unit is named twice")
