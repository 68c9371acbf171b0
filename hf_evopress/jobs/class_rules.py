"""What a job does differently for models that continue no text: fitness, refusals."""

from __future__ import annotations

import dataclasses

from ..calibration.text import is_own
from ..models.classes import CAUSAL, ModelClass
from ..recipes.mixture import parse
from ..recipes.recipe import Recipe


def fitted(recipe: Recipe, kind: ModelClass) -> Recipe:
    """Return `recipe` with what suits the class of its model; ValueError for what does not."""
    after = "adapter" if recipe.adapter else "tune" if recipe.tune else None
    if after and kind is not CAUSAL:
        raise ValueError(
            f"{after} is of causal language models, and {recipe.model} is of class {kind.name}: "
            f"leave out {after}"
        )
    if kind.continues_text:
        return recipe
    terms = parse(recipe.search.fitness)
    names = [term.name for term in terms]
    fitting = ("cosine",) if kind.is_vector else ("kl",)
    if kind.is_vector and names == ["kl"]:
        recipe = dataclasses.replace(
            recipe, search=dataclasses.replace(recipe.search, fitness="cosine")
        )
    elif wrong := [name for name in names if name not in fitting]:
        raise ValueError(
            f"fitness {wrong[0]} is of models that continue text; {recipe.model} is of class "
            f"{kind.name}, which is compared by {fitting[0]}"
        )
    if kind.is_pooled and any(term.options.get("columns") for term in terms):
        raise ValueError(f"{recipe.model} is of class {kind.name}: leave out kl's columns")
    own = [source for source in recipe.data.sources if is_own(source)]
    if own or recipe.data.written:
        raise ValueError(
            f"{recipe.model} is of class {kind.name} and continues no text: give text with --data "
            f"FILE instead of {own[0] if own else '--written'}"
        )
    if recipe.refine != "none" or recipe.refine_levels:
        raise ValueError(
            f"refinement is of one stack of blocks and of what comes next; {recipe.model} is of "
            f"class {kind.name}: leave out refine"
        )
    return recipe
