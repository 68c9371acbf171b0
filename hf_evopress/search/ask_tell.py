"""Ask/tell search over plans: deterministic by seed, resumable at every step.

A strategy is a generator of rounds. What it was told is all there is to know about its state:
restoring tells a new search the same losses again, which takes it to exactly where it was.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

from ..base.plugins import did_you_mean
from .baselines import (
    BruteForceSettings,
    KnapsackSettings,
    RandomSettings,
    UniformSettings,
    best_of_random,
    brute_force,
    knapsack,
    uniform,
)
from .budget import Budget
from .evolve import EvolveSettings, evolve
from .evopress import EvoPressSettings, evopress
from .pareto import ParetoSettings, pareto
from .rounds import Losses, Round, Run, Strategy
from .space import Genome, SearchSpace, Table
from .swap import SwapSettings, swap

__all__ = ["STRATEGIES", "Losses", "Round", "Search"]

STRATEGIES: dict[str, tuple[Callable[[Run, Any], Strategy], type]] = {
    "evolve": (evolve, EvolveSettings),
    "evopress": (evopress, EvoPressSettings),
    "knapsack": (knapsack, KnapsackSettings),
    "uniform": (uniform, UniformSettings),
    "random": (best_of_random, RandomSettings),
    "pareto": (pareto, ParetoSettings),
    "brute_force": (brute_force, BruteForceSettings),
    "swap": (swap, SwapSettings),
    # Published baselines: the knapsack, over the losses that TABLES names.
    "layer_error": (knapsack, KnapsackSettings),
    "owl": (knapsack, KnapsackSettings),
    "pq_index": (knapsack, KnapsackSettings),
    "block_influence": (knapsack, KnapsackSettings),
    "window": (knapsack, KnapsackSettings),
    "drop_perplexity": (knapsack, KnapsackSettings),
}
# Strategies that take plans to begin with; the others know all that they look at.
STARTING = ("evolve", "evopress", "random", "pareto", "swap")
# Strategies that choose by losses other than the predicted KL; see `hf_evopress.jobs.tables`.
TABLES: dict[str, str | None] = {
    "layer_error": "error",
    "owl": "owl",
    "pq_index": "pq_index",
    "block_influence": "influence",
    "window": "window",
    "drop_perplexity": "perplexity",
    **dict.fromkeys(("evopress", "uniform", "random", "brute_force")),  # they look at none
}
# What each published baseline goes by; the others' functions say it.
ABOUT = {
    "layer_error": "Knapsack over each layer's output error (SPDY, L-GreCo: arXiv:2210.17357).",
    "owl": "Knapsack over errors weighed by a layer's outliers (OWL, arXiv:2310.05175).",
    "pq_index": "Knapsack over what the PQ-index says a layer can spare (SAP, arXiv:2302.05601).",
    "block_influence": "Drops the blocks that turn hidden states least (arXiv:2403.03853).",
    "window": "Drops a window of blocks whose ends are most alike (arXiv:2403.17887).",
    "drop_perplexity": "Drops the blocks whose loss alone is least (arXiv:2402.02834).",
}
WORST_LOSS = 1e6  # nats; stands for inf and nan, which a collapsed model gives
STATE_VERSION = 2  # of what the strategies ask for, too


class Search:
    """A search for the plan of least loss within a budget.

    >>> search = Search(space, budget, strategy="evolve", table=sensitivities, n_sequences=32)
    >>> while (round := search.ask()) is not None:
    ...     search.tell([losses_per_sequence(g, round.sequences) for g in round.genomes])
    >>> space.levels(search.best)

    table: predicted loss per gene and option. starts: genomes to begin with. n_sequences and
    seq_len: the pool of token sequences; rounds name those they want. settings: fields of the
    strategy's settings class.
    """

    def __init__(
        self,
        space: SearchSpace,
        budget: Budget,
        *,
        strategy: str = "evolve",
        table: Table | None = None,
        starts: Sequence[Genome] = (),
        n_sequences: int = 1,
        seq_len: int = 1,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        if budget.limit < space.min_cost:
            raise ValueError(
                f"no plan fits a limit of {budget.limit}; the smallest has {space.min_cost}"
            )
        self.strategy = strategy
        self.settings = check_settings(strategy, settings)
        run_strategy, _ = STRATEGIES[strategy]
        self.run = Run(space, budget, table, tuple(starts), n_sequences, seq_len, seed)
        self._told: list[Losses] = []
        self._steps = run_strategy(self.run, self.settings)
        self._asked: Round | None = next(self._steps, None)

    def ask(self) -> Round | None:
        """Return the round to evaluate next, the same until told; None: the search is finished."""
        return self._asked

    def tell(self, losses: Sequence[float] | Sequence[Sequence[float]]) -> None:
        """Take the losses of the round asked for.

        One list per genome, with one loss per sequence; a single number per genome is taken for
        its exact loss.
        """
        if self._asked is None:
            raise ValueError("the search is finished; it asked for no losses")
        rows = _checked(losses, self._asked)
        self._told.append(rows)
        self.run.evaluated_tokens += len(rows) * self._asked.n_tokens
        try:
            self._asked = self._steps.send(rows)
        except StopIteration:
            self._asked = None

    @property
    def is_finished(self) -> bool:
        return self._asked is None

    @property
    def best(self) -> Genome:
        """The best plan so far; once the search is finished, its result."""
        if self.run.best is None:
            raise ValueError("nothing has been evaluated yet: ask() and tell() first")
        return self.run.best

    @property
    def history(self) -> list[dict[str, Any]]:
        """One record per generation: loss, bits per weight, tokens evaluated so far, ..."""
        return self.run.history

    @property
    def report(self) -> dict[str, Any]:
        """What to keep with the plan: strategy, settings, seed, tokens spent, paired results."""
        return {
            "strategy": self.strategy,
            "seed": self.run.seed,
            "settings": dataclasses.asdict(self.settings),
            "evaluated_tokens": self.run.evaluated_tokens,
            "generations": max(0, len(self.history) - 1),
            "loss": self.run.best_loss,
            **self.run.report,
        }

    def state(self) -> dict[str, Any]:
        """Return all that `restore` needs, as JSON data."""
        return {"version": STATE_VERSION, "problem": self._problem(), "told": self._told}

    def restore(self, state: Mapping[str, Any]) -> Search:
        """Return self, at the point where `state` was taken; self must be new and set up alike."""
        if self._told:
            raise ValueError("only a new search can be restored")
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"the search state has version {state.get('version')}, not {STATE_VERSION}; "
                "delete it to start anew"
            )
        problem = self._problem()
        changed = [key for key, value in problem.items() if state["problem"].get(key) != value]
        if changed:
            raise ValueError(
                f"the search state is of another search: {', '.join(changed)} changed; "
                "delete it to start anew"
            )
        for losses in state["told"]:
            self.tell(losses)
        return self

    def _problem(self) -> dict[str, Any]:
        """Return what a search must share with a state to go on from it, as JSON data."""
        run = self.run
        settings = dataclasses.asdict(self.settings)
        return {
            "strategy": self.strategy,
            "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()},
            "space": run.space.fingerprint,
            "budget": run.limit,
            "seed": run.seed,
            "n_sequences": run.n_sequences,
            "seq_len": run.seq_len,
            "starts": [list(start) for start in run.starts],
            "table": None if run.table is None else [list(row) for row in run.table],
        }


def describe(strategy: str) -> str:
    """Return what a strategy does, one paragraph or more."""
    run, _ = STRATEGIES[strategy]
    has_file = run.__module__.endswith(f".{strategy}")
    about = inspect.getdoc(sys.modules[run.__module__] if has_file else run)
    return ABOUT.get(strategy) or about or ""


def check_settings(strategy: str, given: Mapping[str, Any]) -> Any:
    """Return the settings object of a strategy; ValueError names what is unknown or wrong."""
    if strategy not in STRATEGIES:
        hint = did_you_mean(strategy, list(STRATEGIES))
        raise ValueError(f"unknown strategy {strategy!r}{hint}")
    _, settings_class = STRATEGIES[strategy]
    defaults = {field.name: field.default for field in dataclasses.fields(settings_class)}
    made = {}
    for name, value in given.items():
        if name not in defaults:
            hint = did_you_mean(name, list(defaults)) if defaults else ""
            raise ValueError(f"strategy {strategy} has no setting {name!r}{hint}")
        made[name] = tuple(value) if isinstance(value, list) else value
        if not _is_like(made[name], defaults[name]):
            raise ValueError(
                f"strategy {strategy}: {name} is of the kind of {defaults[name]!r}, got {value!r}"
            )
    return settings_class(**made)


def _is_like(value: Any, default: Any) -> bool:
    """Return whether a value has the type of the default: an int will do for a float."""
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(_is_like(v, default[0]) for v in value)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)


def _checked(losses: Sequence[Any], asked: Round) -> Losses:
    """Return the losses as lists of finite numbers, one list per genome of the round."""
    if len(losses) != len(asked.genomes):
        raise ValueError(f"{len(losses)} losses were told for {len(asked.genomes)} genomes")
    rows = [list(row) if isinstance(row, Sequence) else [row] for row in losses]
    if any(len(row) not in (1, asked.n_sequences) for row in rows) or len({*map(len, rows)}) != 1:
        raise ValueError(
            f"each genome needs one loss, or one for each of {asked.n_sequences} sequences; "
            f"got {[len(row) for row in rows]}"
        )
    return [[float(v) if isfinite(v) else WORST_LOSS for v in row] for row in rows]
