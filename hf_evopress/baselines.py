"""The simple strategies: uniform, the knapsack alone, the best of random plans."""

from __future__ import annotations

from dataclasses import dataclass

from .drop_counts import allocate
from .evopress_search import random_plan, select_start
from .rounds import Run, Strategy


@dataclass(frozen=True)
class UniformSettings:
    """tokens: to choose on where several uniform plans fit."""

    tokens: int = 8192


@dataclass(frozen=True)
class KnapsackSettings:
    """The knapsack has nothing to set."""


@dataclass(frozen=True)
class RandomSettings:
    """plans: how many to draw; the best on `tokens` tokens is kept."""

    plans: int = 32
    tokens: int = 8192


def uniform(run: Run, settings: UniformSettings) -> Strategy:
    """Return the best uniform plan within the budget."""
    plans = run.uniform()
    if not plans:
        raise ValueError(
            f"no uniform plan fits the budget of {run.budget.text}; only mixtures of levels do"
        )
    yield from select_start(run, plans, settings.tokens)
    run.record(0)


def knapsack(run: Run, settings: KnapsackSettings) -> Strategy:
    """Return the plan of least predicted loss; nothing is evaluated."""
    if run.table is None:
        raise ValueError("strategy knapsack needs predicted losses: compute sensitivities first")
    solution = allocate(run.space, run.table, run.limit)
    run.found(solution.genome, None)
    run.report["predicted_loss"] = solution.loss
    run.report["predicted_loss_lower_bound"] = solution.lower_bound
    run.record(0)
    yield from ()


def best_of_random(run: Run, settings: RandomSettings) -> Strategy:
    """Return the best of random plans."""
    plans = [random_plan(run) for _ in range(settings.plans)]
    yield from select_start(run, [*run.starts, *plans], settings.tokens)
    run.record(0)
