"""What a recipe does with the model that it has made: an adapter to repair it, a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters.repair import adapt
from ..base.plugins import did_you_mean
from ..base.progress import Progress
from ..base.resources import parse_size
from ..recipes.recipe import Recipe
from ..training.tune import Tuned, Tuning, tune


def check_follow_up(recipe: Recipe) -> None:
    """Raise ValueError for settings of `adapter` and `tune` that cannot work, before anything."""
    if recipe.adapter is not None and recipe.adapter.size is not None:
        parse_size(recipe.adapter.size)
    if recipe.tune is not None:
        _tuning(recipe)


def follow_up(
    recipe: Recipe, folder: str | Path, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Return what followed: "adapter" -> folder OUT-eora, "tune" -> Tuned, in OUT-tuned.

    A training run keeps the adapter beside it, frozen, if the recipe makes one.
    """
    made: dict[str, Any] = {}
    if (wanted := recipe.adapter) is not None:
        made["adapter"] = adapt(
            str(folder),
            f"{folder}-eora",
            data=wanted.sources or recipe.data.sources,
            dense=recipe.model,
            rank=wanted.rank,
            size=wanted.size,
            error=wanted.error,
            prefix=wanted.prefix,
            n_sequences=wanted.calibration,
            seq_len=recipe.data.seq_len,
            seed=recipe.data.seed,
            progress=progress,
        )
    if recipe.tune is not None:
        settings = _tuning(recipe, beside=made.get("adapter"))
        made["tune"] = _tune(recipe, folder, settings, progress)
    return made


def _tune(recipe: Recipe, folder: str | Path, settings: Tuning, progress: Progress | None) -> Tuned:
    assert recipe.tune is not None  # the caller asked
    data = recipe.tune.sources or recipe.data.sources
    return tune(str(folder), f"{folder}-tuned", settings, data=data, progress=progress)


def _tuning(recipe: Recipe, beside: Path | None = None) -> Tuning:
    assert recipe.tune is not None  # the caller asked
    settings = dict(recipe.tune.settings)
    known = [f for f in Tuning.__dataclass_fields__ if f not in ("beside", "start")]
    for key in settings:
        if key not in known:
            raise ValueError(f"unknown key 'tune.settings.{key}'{did_you_mean(key, known)}")
    tuning = Tuning(**settings)
    if beside is not None and tuning.kinds is None:
        settings["beside"] = str(beside)
    return Tuning(**settings)
