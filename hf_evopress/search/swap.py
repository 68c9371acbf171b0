"""Depth search by exchanging one dropped sub-block for another, each exchange measured.

What a drop costs alone says little about what it costs beside others: of a run of similar blocks
the first drop is dear and the next are cheap. So each generation measures every plan that differs
from the incumbent in one sub-block, one more dropped or one restored. Sums of a restoration and a
drop rank all swaps within a kind; the best of them, alone and together, are evaluated, and the
best of these replaces the incumbent if it is significantly better on fresh sequences.

A generation costs a plan per sub-block, and ranks a number of swaps that is its square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .drop_counts import allocate, random_drops
from .evopress import select_start
from .paired import compare
from .rounds import Run, Strategy, mean, unique
from .space import Genome

Swap = tuple[float, int, int]  # predicted change of the loss, gene restored, gene dropped


@dataclass(frozen=True)
class SwapSettings:
    """tokens: per neighbour, per candidate, and to confirm the best of them. candidates: plans
    evaluated of all swaps. confidence: of the paired test.
    """

    generations: int = 4
    candidates: int = 8
    tokens: tuple[int, ...] = (2048, 4096, 16384)
    confidence: float = 0.9

    def __post_init__(self) -> None:
        if len(self.tokens) != 3 or min(self.tokens) < 1:
            raise ValueError(f"tokens are three counts of at least 1, got {self.tokens}")
        if self.candidates < 1 or self.generations < 0:
            raise ValueError(f"candidates must be at least 1 and generations 0, got {self}")
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence must be in [0.5, 1), got {self.confidence}")


def swap(run: Run, settings: SwapSettings) -> Strategy:
    """Return the search as a generator of rounds."""
    space = run.space
    if not space.counts:
        raise ValueError("strategy swap is for budgets of drops, such as --drop-ratio 0.25")
    first = [random_drops(space, space.dearest, run.rng)]
    if run.table is not None:
        first = [allocate(space, run.table, run.limit).genome]
    incumbent = yield from select_start(run, [*run.starts, *first], settings.tokens[1])
    starts = unique([*run.starts, *first])
    run.record(0)
    tried = {*starts}
    for generation in range(1, settings.generations + 1):
        neighbours = _neighbours(run, incumbent)
        losses = yield run.round([incumbent, *neighbours.values()], settings.tokens[0], "measure")
        cost = {
            i: compare(row, losses[0]).mean for i, row in zip(neighbours, losses[1:], strict=True)
        }
        plans = [p for p in _candidates(run, incumbent, cost) if p not in tried]
        plans = plans[: settings.candidates]
        if not plans:
            break
        tried.update(plans)
        screen = run.round([incumbent, *plans], settings.tokens[1], "swaps")
        losses = yield screen
        best = min(range(1, len(losses)), key=lambda i: mean(losses[i]))
        measured = compare(losses[best], losses[0])
        is_accepted = False
        if measured.mean < 0:
            pair = (incumbent, plans[best - 1])
            losses = yield run.round(
                pair, settings.tokens[2], "confirm", fresh_from=screen.sequences
            )
            measured = compare(losses[1], losses[0])
            is_accepted = measured.is_better(settings.confidence)
            incumbent = pair[is_accepted]
            run.found(incumbent, mean(losses[is_accepted]))
        run.record(generation, accepted=is_accepted, p_value=measured.p_value, **measured.to_json())
    yield from _conclude(run, incumbent, starts)


def _conclude(run: Run, incumbent: Genome, starts: Sequence[Genome]) -> Strategy:
    """Choose by held-out sequences; report what the choice gains over the best start."""
    finalists = unique([incumbent, *starts])
    if len(finalists) == 1:
        return
    final = run.held_out_round(finalists, "final")
    losses = dict(zip(finalists, (yield final), strict=True))
    winner = min(finalists, key=lambda plan: mean(losses[plan]))
    run.found(winner, mean(losses[winner]))
    start = min(starts, key=lambda plan: mean(losses[plan]))
    run.report["is_held_out"] = final.is_held_out
    run.report["against"] = {"start": compare(losses[winner], losses[start]).to_json()}


def _neighbours(run: Run, genome: Genome) -> dict[int, Genome]:
    """Return gene -> the plan with this sub-block dropped or restored and all else as it is."""
    found = {}
    for count in run.space.counts:
        for i in count.genes:
            other = _other(run, genome, i)
            if other is not None:
                found[i] = (*genome[:i], other, *genome[i + 1 :])
    return found


def _other(run: Run, genome: Genome, i: int) -> int | None:
    """Return the option of gene i that restores a dropped sub-block or drops a kept one."""
    dropped = run.space.is_dropped(genome, i)
    options = enumerate(run.space.genes[i].options)
    return next((n for n, option in options if option.is_drop != dropped), None)


def _candidates(run: Run, genome: Genome, cost: dict[int, float]) -> list[Genome]:
    """Return plans a few swaps away, the promising first: single swaps and their combinations."""
    swaps: list[Swap] = []
    for count in run.space.counts:
        mine = [i for i in count.genes if i in cost]
        out = [i for i in mine if run.space.is_dropped(genome, i)]
        swaps += [(cost[j] + cost[i], j, i) for j in out for i in mine if i not in out]
    swaps.sort()
    together: list[Genome] = []
    used: set[int] = set()
    plan = genome
    for gain, j, i in swaps:
        if gain >= 0:
            break
        if not {i, j} & used:
            used |= {i, j}
            plan = _swapped(run, plan, j, i)
            together.append(plan)
    single = [_swapped(run, genome, j, i) for _, j, i in swaps]
    # In turns: combinations of 1, 2, 3, ... swaps, and the single swaps by rank.
    mixed = [plan for pair in zip(together, single, strict=False) for plan in pair]
    return unique([*mixed, *together, *single])


def _swapped(run: Run, genome: Genome, j: int, i: int) -> Genome:
    choices = list(genome)
    for k in (j, i):
        other = _other(run, genome, k)
        if other is not None:
            choices[k] = other
    return tuple(choices)
