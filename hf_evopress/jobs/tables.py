"""Tables of predicted losses per gene and option, by which knapsack strategies choose.

    sensitivity   KL per token that a level is expected to add; of drops and caches, measured alone
    error         relative layer errors, as SPDY-style dynamic programming takes them
    influence     1 - cosine of the stream before and after a dropped sub-block (ShortGPT)
    window        membership of the most similar window of blocks (Gromov et al.)
    perplexity    cross-entropy when a sub-block alone is dropped (Shortened Llama)
    owl           distance from the sparsity that OWL gives to the block
    pq_index      distance from the sparsity that the PQ-index of its weights gives to the unit

What is measured on the model is kept in work/scores/, one JSON file per problem.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..base.fingerprint import model_fingerprint, tensor_fingerprint, text_fingerprint
from ..base.reading import read_object, reading
from ..base.resources import atomic_write
from ..calibration.input_moments import load_stats
from ..models.kv_cache import known_from
from ..plans.level import Level
from ..recipes.recipe import Recipe
from ..scoring.baseline_scores import (
    influences,
    outlier_ratios,
    owl_kept,
    pq_kept,
    pq_shares,
    single_drops,
    single_levels,
    window_distances,
)
from ..scoring.evaluator import Evaluator
from ..scoring.fitness.base import Fitness
from ..scoring.objective import fitness_of
from ..search.ask_tell import TABLES
from ..search.space import Gene, Table
from ..store.level_store import LevelStore
from .problem import Problem


class Tables:
    """The tables of one problem; model and tokens are looked at only where nothing is kept yet.

    fitness: in words, and what it is. tokens: the search sequences (n, seq_len), of which the
    first are used.
    """

    def __init__(
        self,
        problem: Problem,
        recipe: Recipe,
        work: Path,
        *,
        fitness: tuple[str, Fitness],
        model: Callable[[], Any],
        tokens: Callable[[], Any],
    ) -> None:
        self.problem, self.recipe, self.work = problem, recipe, work
        self._fitness, self._model, self._tokens = fitness, model, tokens

    def of(self, strategy: str, store: LevelStore) -> Table | None:
        """Return the table that a strategy chooses by, None where there is none to be had."""
        name = TABLES.get(strategy, "sensitivity")
        if name is None:
            return None
        if name in ("influence", "window", "perplexity"):
            self._check_depth(strategy)
        return getattr(self, f"_{name}")(store)

    # -- one method per table --------------------------------------------------------------

    def _sensitivity(self, store: LevelStore) -> Table | None:
        if self.problem.units and not self.recipe.search.sensitivity_tokens:
            return None
        drops = self._drops(store, *self._fitness)
        caches = self._caches(store)

        def loss(unit: str, level: str) -> float:
            if unit in self.problem.caches:
                return caches[f"{unit} {level}"]
            return store.scores(unit, level)["sensitivity_nats"]

        return self._rows(loss, drops)

    def _error(self, store: LevelStore) -> Table:
        if not self.problem.units:
            raise ValueError("strategy layer_error chooses levels; a budget of drops has none")
        # A dropped layer's relative error is 1.
        inside = dict.fromkeys(self.problem.added.options, 0.0)
        for sub in self.problem.added.inside.values():
            inside[sub] += 1.0
        return self._rows(lambda unit, level: store.scores(unit, level)["error"], inside)

    def _influence(self, store: LevelStore) -> Table:
        found = self._kept("influence", lambda: influences(self._model(), self._sample()))
        return self._rows(_no_levels, found)

    def _perplexity(self, store: LevelStore) -> Table:
        return self._rows(_no_levels, self._drops(store, "perplexity", fitness_of("perplexity")))

    def _window(self, store: LevelStore) -> Table:
        size = max(count.at_least for count in self.problem.space.counts)
        distances = self._kept(
            f"window-{size}",
            lambda: dict(enumerate(window_distances(self._model(), self._sample(), size))),
        )
        blocks = self.problem.added.blocks
        able = set(blocks.values())
        starts = [int(k) for k in distances if able >= {*range(int(k), int(k) + size)}]
        if not starts:
            raise ValueError(f"no window of {size} neighbouring blocks can be dropped whole")
        first = min(starts, key=lambda start: distances[str(start)])
        away = {sub: float(not first <= b < first + size) for sub, b in blocks.items()}
        return self._rows(_no_levels, away)

    def _owl(self, store: LevelStore) -> Table:
        sparsity = self._sparsity("owl gives each block")
        units = self.problem.units
        ratios = self._kept(
            "outliers",
            lambda: outlier_ratios(self._model(), units, lambda b: load_stats(self.work, b)),
        )
        kept = owl_kept({int(block): ratio for block, ratio in ratios.items()}, sparsity)
        return self._distances(lambda gene: kept[gene.block])

    def _pq_index(self, store: LevelStore) -> Table:
        sparsity = self._sparsity("pq_index gives each layer")
        units = self.problem.units
        shares = self._kept(
            "pq-index",
            lambda: pq_shares(self._model(), units, lambda b: load_stats(self.work, b)),
        )
        sizes = {unit.name: unit.n_weights for unit in units}
        kept = pq_kept(shares, sizes, sparsity)
        return self._distances(
            lambda gene: sum(kept[u] * sizes[u] for u in gene.units) / gene.n_weights
        )

    def _sparsity(self, what: str) -> float:
        sparsity = self.recipe.budget.sparsity
        if sparsity is None:
            raise ValueError(f"strategy {what} a sparsity: it needs --sparsity")
        return sparsity

    def _distances(self, kept: Callable[[Gene], float]) -> Table:
        """Return the squared distances of the values that options keep from those to keep."""
        space = self.problem.space

        def entry(gene: Gene, values: int) -> float:
            if not gene.n_weights:
                return 0.0
            return gene.n_weights * (values / gene.n_weights - kept(gene)) ** 2

        return [[entry(g, o.cost) / space.n_weights for o in g.options] for g in space.genes]

    # -- parts -----------------------------------------------------------------------------

    def _rows(self, loss: Callable[[str, str], float], drops: Mapping[str, float]) -> Table:
        """Return the table of a loss per unit and level, and one per dropped sub-block."""
        options = self.problem.added.options
        return [
            [
                sum(
                    (drops[unit] if option.is_drop else 0.0)
                    if unit in options
                    else loss(unit, option.level)
                    for unit in gene.units
                )
                for option in gene.options
            ]
            for gene in self.problem.space.genes
        ]

    def _drops(self, store: LevelStore, words: str, fitness: Fitness) -> Mapping[str, float]:
        """Return sub-block -> loss, which `words` describe, when it alone is dropped."""
        names = list(self.problem.added.options)
        if not names:
            return {}

        def measure() -> dict[str, float]:
            tokens = self._sample()
            evaluator = Evaluator(self._model(), store, tokens, fitness)
            return single_drops(evaluator, names, range(len(tokens)))

        return self._kept(f"drops-{text_fingerprint(words)}", measure)

    def _caches(self, store: LevelStore) -> Mapping[str, float]:
        """Return "cache setting" -> loss when the cache of one layer alone is stored so.

        What follows from another setting is not measured.
        """
        caches, words = self.problem.caches, self._fitness[0]
        found: dict[str, tuple[str, float]] = {}
        choices: dict[str, tuple[str, Level]] = {}
        for gene in (g for g in self.problem.space.genes if g.units[0] in caches):
            unit, levels = gene.units[0], [Level.parse(option.level) for option in gene.options]
            for level, (source, factor) in known_from(levels).items():
                found[f"{unit} {level}"] = f"{unit} {source}", factor
                if factor:
                    choices[f"{unit} {source}"] = unit, source
        names = list(choices)

        def measure() -> dict[str, float]:
            tokens = self._sample()
            evaluator = Evaluator(self._model(), store, tokens, self._fitness[1])
            losses = single_levels(evaluator, list(choices.values()), range(len(tokens)))
            return dict(zip(names, losses, strict=True))

        kept = self._kept(f"caches-{text_fingerprint(words, *names)}", measure) if names else {}
        return {name: kept[k] * factor if factor else 0.0 for name, (k, factor) in found.items()}

    def _sample(self) -> Any:
        tokens = self._tokens()
        n = -(-self.recipe.drop.tokens // tokens.shape[1])
        return tokens[: max(1, n)]

    def _kept(self, name: str, measure: Callable[[], Mapping[Any, float]]) -> dict[str, float]:
        """Return what was measured before on the same model and tokens, or measure it."""
        made_from = [
            name,
            model_fingerprint(self._model()),
            tensor_fingerprint(self._sample()),
            *self.problem.added.options,
            *(unit.name for unit in self.problem.units),
        ]
        path = self.work / "scores" / f"{name}-{text_fingerprint(*made_from)}.json"
        if path.is_file():
            return read_table(path)
        found = {str(key): value for key, value in measure().items()}
        atomic_write(path, json.dumps(found, indent=1) + "\n")
        return found

    def _check_depth(self, strategy: str) -> None:
        if self.problem.units or not self.problem.space.counts:
            raise ValueError(
                f"strategy {strategy} ranks sub-blocks to drop and nothing else: it needs a "
                "budget of drops, such as --drop-ratio 0.25"
            )


def _no_levels(unit: str, level: str) -> float:
    return 0.0


def read_table(path: Path) -> dict[str, float]:
    """Return what was measured before; ValueError or TypeError names a file that is damaged."""
    way_out = "it is damaged; delete it to measure anew"
    found = read_object(path, way_out=way_out)
    with reading(path, way_out=way_out):
        if not all(type(value) in (int, float) for value in found.values()):
            raise TypeError(f"a table holds numbers, got {found!r:.200}")
    return found
