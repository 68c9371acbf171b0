"""Calibration data with images: which sources have some, and what a job can do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..calibration.conversations import ImageText, has_images
from ..models.classes import ModelClass, takes_images
from ..models.source import read_processor
from ..recipes.mixture import parse
from ..recipes.recipe import Recipe


def image_text(recipe: Recipe, kind: ModelClass, config: Any, work: Path) -> ImageText | None:
    """Return what reads the source of `recipe` with images, None where there is none.

    Raises in the first second for a model that takes no images, an image that is not there, and
    what cannot be done with images.
    """
    found = [source for source in recipe.data.sources if has_images(source)]
    sees = takes_images(config)
    if recipe.vision and not (sees and found):
        raise ValueError(
            f"--vision compresses the vision tower of a vision-language model, and {recipe.model} "
            f"is of class {kind.name}"
            if not sees
            else "--vision needs images to calibrate on: give conversations with --data FILE.jsonl"
        )
    if not found:
        return None
    if not sees:
        raise ValueError(
            f"{found[0]} holds images, and {recipe.model} is of class {kind.name}, which takes "
            "text only"
        )
    if len(found) > 1:
        raise ValueError(f"{' and '.join(found)} hold images: put them into one file")
    names = [term.name for term in parse(recipe.search.fitness)]
    if wrong := [name for name in names if name != "kl"]:
        raise ValueError(
            f"fitness {wrong[0]} is of text; with images what counts is kl where text is"
        )
    if recipe.refine != "none" or recipe.refine_levels:
        raise ValueError(f"refinement learns from text: leave out refine, or {found[0]}")
    processor: Any = read_processor(
        recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code
    )
    data = recipe.data
    # Gemma 3's processor calls another token so, which stands for an image as a whole
    token = getattr(config, "image_token_id", None)
    return ImageText(
        found[0],
        processor,
        work / "images",
        token=int(processor.image_token_id if token is None else token),
        seq_len=data.seq_len,
        seed=data.seed,
    )
