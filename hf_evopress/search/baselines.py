"""Baseline strategies: uniform, knapsack alone, best of random plans, brute force."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import comb, prod

from .drop_counts import allocate
from .evopress import random_plan, select_start
from .rounds import Run, Strategy, mean
from .space import Genome


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


@dataclass(frozen=True)
class BruteForceSettings:
    """plans: more than these are refused; tokens: per plan."""

    plans: int = 4096
    tokens: int = 8192


BATCH = 64  # plans evaluated at once


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


def brute_force(run: Run, settings: BruteForceSettings) -> Strategy:
    """Return the best of all plans within the budget, evaluated on common sequences."""
    n = _n_plans(run)
    if n > settings.plans:
        raise ValueError(
            f"there are up to {n} plans, brute_force evaluates at most {settings.plans}; offer "
            "fewer levels or droppable sub-blocks (pin, tie, forbid), or raise plans"
        )
    allowed = (run.space.canonical(g) for g in _all_plans(run) if run.budget.allows(run.space, g))
    plans = list(dict.fromkeys(allowed))
    common = run.round((), settings.tokens, "all plans")
    score: dict[Genome, float] = {}
    for start in range(0, len(plans), BATCH):
        part = tuple(plans[start : start + BATCH])
        losses = yield replace(common, genomes=part)
        score |= {plan: mean(row) for plan, row in zip(part, losses, strict=True)}
        best = min(score, key=score.__getitem__)
        run.found(best, score[best])
    run.report["plans"] = len(plans)
    run.record(0)


def _n_plans(run: Run) -> int:
    genes = run.space.genes
    counted = {i for count in run.space.counts for i in count.genes}
    drawn = (
        sum(comb(len(c.genes), n) for n in range(c.at_least, c.at_most + 1))
        for c in run.space.counts
    )
    return prod(len(g.options) for i, g in enumerate(genes) if i not in counted) * prod(drawn)


def _all_plans(run: Run) -> Iterator[Genome]:
    """Yield every plan that drops as many as the space counts."""
    genes = run.space.genes
    drawn = [
        [set(c) for n in range(k.at_least, k.at_most + 1) for c in combinations(k.genes, n)]
        for k in run.space.counts
    ]
    counted = {i for count in run.space.counts for i in count.genes}
    for choice in product(*drawn):
        dropped = set().union(*choice)
        able = [
            [n for n, o in enumerate(g.options) if i not in counted or o.is_drop == (i in dropped)]
            for i, g in enumerate(genes)
        ]
        yield from product(*able)
