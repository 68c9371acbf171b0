"""Units of neighbouring blocks that share tensors: which two, and which tensors.

At a level whose last term says `shared=true`, as

    gptq:bits=4,group_size=64 + lowrank:rank=32,factors=int8,shared=true

the terms before it are those of the same layer in the neighbouring block as well, stored once, and
the last term is each layer's own difference. Blocks pair up as 0 and 1, 2 and 3, and so on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..methods import compose
from ..methods.base import Shape
from ..plans.level import Level

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def neighbour(unit: str) -> str | None:
    """Return the unit that `unit` may share tensors with; None for those in no block."""
    match = _NUMBER.search(unit)
    if match is None:
        return None
    return f"{unit[: match.start()]}{int(match[0]) ^ 1}{unit[match.end() :]}"


def pairs(units: Mapping[str, Shape]) -> list[tuple[str, str]]:
    """Return the pairs of neighbours of one shape, the lower block first."""
    found = []
    for unit, shape in units.items():
        other = neighbour(unit)
        if other is not None and units.get(other) == shape and _block(unit) < _block(other):
            found.append((unit, other))
    return found


def shared_tensors(levels: Mapping[str, Level], shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Return tensor -> the tensor that is stored in its place, by their full names."""
    sharing = {unit: shapes[unit] for unit, level in levels.items() if compose.n_shared(level)}
    return {
        f"{other}.{name}": f"{unit}.{name}"
        for unit, other in pairs(sharing)
        if levels[unit] == levels[other]
        for name in compose.shared_names(levels[unit], shapes[unit])
    }


def saved_bits(levels: Mapping[str, Level], shapes: Mapping[str, Shape]) -> int:
    """Return the bits that are not stored because units share them."""
    sharing = {unit: shapes[unit] for unit, level in levels.items() if compose.n_shared(level)}
    return sum(
        compose.shared_bits(levels[unit], shapes[unit])
        for unit, other in pairs(sharing)
        if levels[unit] == levels[other]
    )


def any_shared(levels: Iterable[Level]) -> Level | None:
    """Return the first level that shares tensors."""
    return next((level for level in levels if compose.n_shared(level)), None)


def _block(unit: str) -> int:
    match = _NUMBER.search(unit)
    return int(match[0]) if match else -1
