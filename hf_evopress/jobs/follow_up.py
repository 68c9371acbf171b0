"""Steps after compression that a recipe asks for: an EoRA adapter, a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters.repair import adapt
from ..base.plugins import did_you_mean
from ..base.progress import Progress
from ..base.resources import parse_size
from ..base.target import check_target
from ..calibration.text import is_own
from ..recipes.recipe import Recipe
from ..training.settings import Tuning


def check_follow_up(recipe: Recipe, *, overwrite: bool = False) -> None:
    """Raise ValueError for settings of `adapter` and `tune` that cannot work, before anything."""
    own = [source for source in recipe.data.sources if is_own(source)]
    for name, wanted in (("adapter", recipe.adapter), ("tune", recipe.tune)):
        if own and wanted is not None and not wanted.sources:
            raise ValueError(
                f"{name} learns from a text, and data.sources is {own[0]}, which the model writes "
                f"for the search: give {name}.sources"
            )
    if recipe.adapter is not None and recipe.adapter.size is not None:
        parse_size(recipe.adapter.size)
    if recipe.tune is not None:
        _tuning(recipe)
    for ending in ("eora",) * bool(recipe.adapter) + ("tuned",) * bool(recipe.tune):
        check_target(f"{recipe.out}-{ending}", overwrite=overwrite)


def follow_up(
    recipe: Recipe,
    folder: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
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
            trust_remote_code=recipe.trust_remote_code,
            overwrite=overwrite,
            progress=progress,
        )
    if recipe.tune is not None:
        settings = _tuning(recipe, beside=made.get("adapter"))
        from ..training.tune import tune  # imports Trainer, and with it datasets and peft

        made["tune"] = tune(
            str(folder),
            f"{folder}-tuned",
            settings,
            data=recipe.tune.sources or recipe.data.sources,
            trust_remote_code=recipe.trust_remote_code,
            overwrite=overwrite,
            progress=progress,
        )
    return made


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
