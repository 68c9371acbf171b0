"""Packed tensors of a refined plan, one file per block, read like a level store.

One safetensors file per decoder block, whole or absent; what is not there is the store's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from ..base.resources import atomic_path
from ..methods import compose
from ..methods.base import State
from ..plans.level import Level
from ..store.level_store import LevelStore
from ..store.unit_file import checksums, damage, one_entry, read_about


class RefinedStates(LevelStore):
    """A level store in which the levels of one plan have been made anew.

    Other levels, and units of blocks without a file in `refined`, are those of `store`.
    """

    def __init__(self, store: LevelStore, folder: str | Path, levels: Mapping[str, Level]) -> None:
        self.__dict__.update(store.__dict__)
        self.store, self.refined = store, Path(folder)
        self.plan_levels = {unit: compose.normalize(level) for unit, level in levels.items()}

    def state(self, unit: str, level: Level | str) -> State:
        """Return the packed tensors of `unit` at `level`; a damaged file raises ValueError."""
        if unit in self.units and self.plan_levels.get(unit) == compose.normalize(level):
            path = self.file(self.units[unit].block)
            if path.is_file() and (found := read_block(path, [unit])):
                return found[unit]
        return self.store.state(unit, level)

    def file(self, block: int) -> Path:
        """Return where the states of a block are kept."""
        return self.refined / f"block_{block:05d}.safetensors"


def write_block(path: Path, states: Mapping[str, State], notes: Mapping[str, Any]) -> None:
    """Write the states of a block's units, and what was measured."""
    tensors = {
        f"{i}/{name}": tensor.contiguous()
        for i, state in enumerate(states.values())
        for name, tensor in state.items()
    }
    about = {
        "units": list(states),
        "crc32": [checksums(state) for state in states.values()],
        "notes": dict(notes),
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=one_entry(about))


def read_block(path: Path, units: list[str] | None = None) -> dict[str, State]:
    """Return unit -> state of a block's file, of all its units or of some."""
    with damage(path, "refined levels", "refinement"):
        with safe_open(path, framework="pt") as file:
            names, sums = map(read_about(file).__getitem__, ("units", "crc32"))
            states: dict[str, State] = {
                name: {} for name in names if units is None or name in units
            }
            for key in sorted(file.keys()):
                number, _, tensor = key.partition("/")
                if names[int(number)] in states:
                    states[names[int(number)]][tensor] = file.get_tensor(key)
            known = dict(zip(names, sums, strict=True))
        if any(checksums(state) != known[name] for name, state in states.items()):
            raise ValueError("a checksum differs")
    return states


def read_notes(path: Path) -> dict[str, Any]:
    """Return what was measured when a block's file was written."""
    with damage(path, "refined levels", "refinement"), safe_open(path, framework="pt") as file:
        return read_about(file)["notes"]
