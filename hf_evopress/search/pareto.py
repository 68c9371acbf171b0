"""Search for a Pareto front of plans between two budgets in one run.

The knapsack gives the plans of least predicted loss for budgets spread evenly. They and the
uniform plans between are measured on common sequences, the predictions are corrected by what was
measured, and the plans of the corrected front join in; what stays non-dominated in bits and loss
on held-out sequences is the result. Any of it can be applied later without a new search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor

from .knapsack import front
from .paired import compare
from .rounds import Run, Strategy, mean
from .space import Genome, SearchSpace
from .surrogate import Surrogate, rate_table


@dataclass(frozen=True)
class ParetoSettings:
    """low: the smallest budget in bits per weight (0: the smallest plan); the search's budget is
    the largest. points: budgets between; corrections: rounds after the first; tokens: per plan.
    """

    low: float = 0.0
    points: int = 9
    corrections: int = 2
    tokens: int = 16384

    def __post_init__(self) -> None:
        if self.points < 2 or self.tokens < 1 or min(self.low, self.corrections) < 0:
            raise ValueError(f"a front needs points >= 2, tokens >= 1 and low >= 0, got {self}")


def pareto(run: Run, settings: ParetoSettings) -> Strategy:
    """Return the search for a front as a generator of rounds; `report["front"]` holds it."""
    space = run.space
    if space.counts:
        raise ValueError("a front has plans of many sizes; it cannot count drops as well")
    low = max(space.min_cost, floor(settings.low * space.n_weights))
    if low > run.limit:
        raise ValueError(f"low={settings.low} bits per weight is above {run.budget.text}")
    surrogate = Surrogate(space, run.table or rate_table(space))
    measured: dict[Genome, list[float]] = {}
    plans = [*run.starts, *(plan for plan in run.uniform() if space.cost(plan) >= low)]
    common = run.round((), settings.tokens, "front")
    for step in range(1 + settings.corrections):
        table = surrogate.table()
        found = front(space, table, low_bits=low, high_bits=run.limit, points=settings.points)
        plans += [solution.genome for solution in found]
        new = [plan for plan in dict.fromkeys(map(space.canonical, plans)) if plan not in measured]
        if not new:
            break
        losses = yield replace(common, genomes=tuple(new))
        measured |= zip(new, losses, strict=True)
        anchor = next(iter(measured))
        for plan in new:
            if plan != anchor:
                surrogate.learn(plan, anchor, compare(measured[plan], measured[anchor]))
        best = min(measured, key=lambda plan: mean(measured[plan]))
        run.found(best, mean(measured[best]))
        run.record(step, plans=len(measured))
    final = run.held_out_round(non_dominated(space, measured), "final")
    held_out = dict(zip(final.genomes, (yield final), strict=True))
    kept = non_dominated(space, held_out)
    run.found(kept[-1], mean(held_out[kept[-1]]))
    run.report["is_held_out"] = final.is_held_out
    run.report["front"] = [
        {
            "genome": list(plan),
            "bits_per_weight": space.bits_per_weight(plan),
            "loss": mean(held_out[plan]),
        }
        for plan in kept
    ]


def non_dominated(
    space: SearchSpace, losses: Mapping[Genome, Sequence[float]]
) -> tuple[Genome, ...]:
    """Return the plans that no other beats in both bits and mean loss, the cheapest first."""
    kept: list[Genome] = []
    for plan in sorted(losses, key=lambda plan: (space.cost(plan), mean(losses[plan]))):
        if not kept or mean(losses[plan]) < mean(losses[kept[-1]]):
            kept.append(plan)
    return tuple(kept)
