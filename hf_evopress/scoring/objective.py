"""Build the fitness of a recipe: plug-ins, user functions and weighted sums of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..base.plugins import load
from ..recipes.mixture import Term, parse
from .fitness.base import Fitness, Loss, Targets
from .fitness.task import Task


class Mixture(Fitness):
    """A weighted sum of fitnesses; each sees the same logits."""

    name = "mixture"

    def __init__(self, terms: Sequence[tuple[float, Fitness]]) -> None:
        if not terms:
            raise ValueError("a mixture needs at least one fitness")
        self.terms = tuple(terms)
        for _, fitness in terms:
            if fitness.columns or fitness.judges_models:
                how = "samples columns" if fitness.columns else "judges whole models"
                raise ValueError(f"{fitness!r} {how}, which a sum of fitnesses cannot")
        self.needs_whole = any(fitness.needs_whole for _, fitness in terms)
        self.keeps_targets = all(fitness.keeps_targets for _, fitness in terms)

    def targets(self, logits: Tensor, tokens: Tensor) -> Targets:
        """Return the targets of all terms, each key behind its term's number."""
        return {
            f"{i}.{key}": value
            for i, (_, fitness) in enumerate(self.terms)
            for key, value in fitness.targets(logits, tokens).items()
        }

    def share(self, logits: Tensor, tokens: Tensor, targets: Targets, part: slice) -> Loss:
        total: Loss = 0.0
        for i, (weight, fitness) in enumerate(self.terms):
            prefix = f"{i}."
            own = {k.removeprefix(prefix): v for k, v in targets.items() if k.startswith(prefix)}
            total += weight * fitness.share(logits, tokens, own, part)
        return total


def fitness_of(words: str) -> Fitness:
    """Return the fitness that `words` name, such as "kl" or "kl*0.7 + perplexity*0.3".

    A plug-in that is a plain function becomes a `Task`. ValueError names an unknown option.
    """
    terms = parse(words)
    made = [(term.weight, _build(term)) for term in terms]
    return made[0][1] if len(made) == 1 and made[0][0] == 1 else Mixture(made)


def _build(term: Term) -> Fitness:
    found: Any = load("fitness", term.name)
    if not isinstance(found, type):
        return Task(partial(found, **term.options) if term.options else found)
    try:
        return found(**term.options)
    except TypeError as error:
        raise ValueError(f"fitness {term.name} cannot be made: {error}") from error
