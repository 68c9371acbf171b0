"""Compress for GGUF files: what fits into one, how large it gets, where it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..export.gguf import entries_of, fits_file
from ..export.gguf_format.file import overhead_bytes
from ..methods import compose
from ..methods.menu import fits, menus
from ..models.source import read_tokenizer
from ..models.units import Unit
from ..plans.level import Level
from ..recipes.recipe import Recipe

NAME = "gguf"


def is_for_gguf(recipe: Recipe) -> bool:
    return recipe.export == NAME


def folder_of(out: str | Path) -> Path:
    """Return OUT-gguf, where the file goes."""
    path = Path(out)
    return path.with_name(f"{path.resolve().name}-{NAME}")


def fitting_menus(
    shapes: Mapping[str, tuple[int, int]], levels: Sequence[str]
) -> dict[str, list[Level]]:
    """Return unit -> those of `levels` that it takes, as the rows of few take all types.

    Raises ValueError that names a unit which takes none of them.
    """
    wanted = [compose.normalize(level) for level in levels]
    offered: dict[str, list[Level]] = {}
    for unit, shape in shapes.items():
        able = [level for level in wanted if fits(level, shape)]
        offered |= menus({unit: shape}, able or wanted)
    return offered


def check_menus(menus: Mapping[str, Sequence[Level]]) -> None:
    """Raise ValueError that names a level which no GGUF file can hold."""
    for unit, menu in menus.items():
        for level in menu:
            if not fits_file(level):
                raise ValueError(
                    f"{unit} is offered '{level}', which a GGUF file cannot hold: offer levels "
                    "gguf:type=... and dense, or leave levels and families out"
                )


def fixed_bits(skeleton: nn.Module, units: Sequence[Unit], recipe: Recipe) -> int:
    """Return the most bits of the file besides the units: header, tokenizer, norms, padding."""
    tokenizer = read_tokenizer(recipe.model, revision=recipe.revision)
    dense, name = entries_of(skeleton, {}), Path(recipe.model).name
    config: Any = skeleton.config
    overhead = overhead_bytes(config, tokenizer, dense, name=name, source=recipe.model)
    inside = {f"{unit.name}.weight" for unit in units}
    rest = sum(entry.size_bytes for entry in entries_of(skeleton, {}, leave_out=inside))
    return 8 * (overhead + rest)
