"""Calibration data of speech recognisers: sound, and what is said in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..calibration.transcripts import SoundText, has_sounds, read_sounds
from ..models.classes import ModelClass
from ..recipes.recipe import Recipe


def sound_text(recipe: Recipe, kind: ModelClass, config: Any, work: Path) -> SoundText | None:
    """Return what reads the source of `recipe` with sounds, None for a model that hears none.

    Raises in the first seconds for data without sound, and sound for a model that hears none.
    """
    data = recipe.data
    if kind.hears:
        return read_sounds(
            recipe.model,
            config,
            data.sources,
            work / "sounds",
            seq_len=data.seq_len,
            seed=data.seed,
            revision=recipe.revision,
            trust_remote_code=recipe.trust_remote_code,
        )
    if found := [source for source in data.sources if has_sounds(source)]:
        raise ValueError(
            f"{found[0]} holds sounds, and {recipe.model} is of class {kind.name}, which hears none"
        )
    return None
