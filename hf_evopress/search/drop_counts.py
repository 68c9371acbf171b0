"""Plans with a fixed number of dropped sub-blocks: allocation, repair and random draws.

Published depth pruning (Sieberling et al. 2024, arXiv:2410.14649) counts attention and MLP
separately, which no single sum of costs can say. Where a space has such counts, these functions
take the place of the plain knapsack; where it has none, they are the plain knapsack.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import fsum
from random import Random

from .genes import DropCount
from .knapsack import Solution, fill, solve, total_loss
from .space import Genome, SearchSpace, Table

PASSES = 2  # over the kinds: a penalty on one raises the drops of another
STEPS = 16  # halvings of the penalty that keeps too many sub-blocks from being dropped
SAMPLED = 8  # sub-blocks looked at before a random repair changes one of them


def drop_counts(
    space: SearchSpace, kinds: Mapping[str, str], limits: Mapping[str, tuple[int, int]]
) -> tuple[DropCount, ...]:
    """Return one count per kind of droppable gene.

    kinds: sub-block -> attention or mlp; tied sub-blocks of several kinds count once, as a kind
    of their own. limits: kind -> how many at least and at most; a tie has those of its first.
    """
    genes: dict[tuple[str, ...], list[int]] = {}
    for i, gene in enumerate(space.genes):
        if gene.units[0] in kinds:
            genes.setdefault(tuple(sorted({kinds[u] for u in gene.units})), []).append(i)
    return tuple(
        DropCount(" with ".join(kind), tuple(numbers), *limits[kind[0]])
        for kind, numbers in genes.items()
    )


def allocate(space: SearchSpace, losses: Table, limit: int) -> Solution:
    """Return the plan of least total loss within the limit that drops as many as it should.

    Exact where counts do not bind, or where nothing but drops is to be chosen; else the best for
    a common penalty on each drop. Raises ValueError where no plan is within both.
    """
    solution = solve(space, losses, limit)
    if space.keeps_counts(solution.genome):
        return solution
    genome, rows = solution.genome, [list(row) for row in losses]
    for count in space.counts * PASSES:
        if _n_dropped(space, genome, count) > count.at_most:
            genome = _with_fewer(space, rows, limit, count)
    if any(_n_dropped(space, genome, count) > count.at_most for count in space.counts):
        # Kinds can push each other over the edge: settle which sub-blocks may be dropped at all.
        genome = solve(space, _settled(space, rows, genome), limit).genome
    genome = fill(space, losses, meet(space, losses, genome), limit)
    if space.cost(genome) > limit or not space.keeps_counts(genome):
        raise ValueError(
            "no plan was found that is within the budget and drops no more sub-blocks than allowed"
        )
    genome = space.canonical(genome)
    loss = total_loss(space, losses, genome)
    return Solution(genome, loss, space.cost(genome), min(loss, solution.lower_bound))


def meet(
    space: SearchSpace,
    losses: Table,
    genome: Genome,
    *,
    genes: Collection[int] | None = None,
    rng: Random | None = None,
) -> Genome:
    """Return the genome after the drops and restorations, best by `losses`, that counts ask for.

    Only `genes` are changed, by default all. With `rng`, each change is the best of a few drawn.
    """
    for count in space.counts:
        mine = [i for i in count.genes if genes is None or i in genes]
        for _ in mine:
            n = _n_dropped(space, genome, count)
            if count.at_least <= n <= count.at_most:
                break
            wants_drop = n < count.at_least
            offers = [
                (i, option)
                for i in mine
                for option, o in enumerate(space.genes[i].options)
                if o.is_drop == wants_drop != space.is_dropped(genome, i)
            ]
            if rng is not None:
                offers = rng.sample(offers, min(SAMPLED, len(offers)))
            if not offers:
                break
            here = genome
            i, option = min(offers, key=lambda o: space.change(losses, here, *o))
            genome = (*genome[:i], option, *genome[i + 1 :])
    return genome


def random_drops(space: SearchSpace, genome: Genome, rng: Random) -> Genome:
    """Return the genome with the least number of sub-blocks dropped, drawn at random."""
    choices = list(genome)
    for count in space.counts:
        able = {
            i: next(n for n, o in enumerate(space.genes[i].options) if o.is_drop)
            for i in count.genes
            if any(o.is_drop for o in space.genes[i].options)
        }
        for i in rng.sample(sorted(able), count.at_least):
            choices[i] = able[i]
    return tuple(choices)


def _with_fewer(
    space: SearchSpace, rows: list[list[float]], limit: int, count: DropCount
) -> Genome:
    """Return the best plan for the least penalty on drops of `count` that keeps it to its most.

    The penalty stays in `rows`.
    """
    drops = [(i, n) for i in count.genes for n, o in enumerate(space.genes[i].options) if o.is_drop]
    plain = {(i, n): rows[i][n] for i, n in drops}

    def at(penalty: float) -> Genome:
        for (i, n), loss in plain.items():
            rows[i][n] = loss + penalty
        return solve(space, rows, limit).genome

    low, high = 0.0, _enough(rows)
    best = at(high)
    for _ in range(STEPS):
        middle = (low + high) / 2 if low else high / 16
        genome = at(middle)
        if _n_dropped(space, genome, count) > count.at_most:
            low = middle
        else:
            best, high = genome, middle
    at(high)
    return best


def _settled(space: SearchSpace, rows: Table, genome: Genome) -> list[list[float]]:
    """Return `rows` where all drops but the most allowed, the best so far, cost too much."""
    made, banned = [list(row) for row in rows], _enough(rows)
    for count in space.counts:
        drops = [
            (not space.is_dropped(genome, i), rows[i][n], i, n)
            for i in count.genes
            for n, o in enumerate(space.genes[i].options)
            if o.is_drop
        ]
        for _, _, i, n in sorted(drops)[count.at_most :]:
            made[i][n] += banned
    return made


def _enough(rows: Table) -> float:
    """Return a loss that outweighs all others."""
    return fsum(abs(v) for row in rows for v in row) + 1.0


def _n_dropped(space: SearchSpace, genome: Genome, count: DropCount) -> int:
    return sum(space.is_dropped(genome, i) for i in count.genes)
