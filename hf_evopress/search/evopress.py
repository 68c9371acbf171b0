"""The published EvoPress search (Sieberling et al. 2024, arXiv:2410.14649), budget exact in bytes.

A (1 + lambda) evolution: each generation mutates the parent by level switches, and a few stages
of selection on growing numbers of tokens, common to all candidates of a stage, leave one
survivor; the parent competes in the last stage only.

What differs from the published code: a level is an option of a unit's menu with its exact cost
(a switch goes to the next cheaper or dearer one) instead of a whole number of bits without
scales; offspring equal to each other or to the parent are drawn again, a bounded number of
times; the parent enters the last stage whatever the survivor counts are; and the winner of the
last selection is what is returned. Where drops are counted, attention trades with attention and
MLP with MLP, as the published depth pruning does.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from random import Random

from .drop_counts import random_drops
from .rounds import Losses, Round, Run, Strategy, mean, unique
from .space import Genome, SearchSpace

GROUPS = ("size", "name", "none")
MAX_SWITCHES = 10  # with group none: level changes per offspring
MIN_REFILL = 0.8  # with group none: bits added / bits removed
NEARLY_WHOLE = 0.995  # a uniform plan that uses this share of the budget is what was asked for
TRIES = 50  # draws per offspring before a generation makes do with fewer


@dataclass(frozen=True)
class EvoPressSettings:
    """Published: 150 generations of 128 offspring, survivors (16, 4, 1), tokens (2048, 16384,
    131072) for 3 bits; "super-fast": 400 of 16, (1, 1), (512, 8192). These suit small runs.

    group: units trade bits only with those of the same `size` or `name`, or with all (`none`).
    uniform: every uniform plan within the budget competes in the first selection.
    """

    generations: int = 20
    offspring: int = 16
    survivors: tuple[int, ...] = (4, 1)
    tokens: tuple[int, ...] = (2048, 8192)
    initially_generated: int = 16
    initial_tokens: int = 4096
    group: str = "size"
    uniform: bool = True

    def __post_init__(self) -> None:
        if len(self.survivors) != len(self.tokens) or not self.tokens:
            raise ValueError(
                f"one survivor count per stage: survivors={self.survivors}, tokens={self.tokens}"
            )
        falling = sorted(self.survivors, reverse=True) == list(self.survivors)
        if self.survivors[-1] != 1 or not falling:
            raise ValueError(f"survivors must fall to 1, got {self.survivors}")
        if min(self.generations, self.offspring, self.initially_generated, *self.tokens) < 1:
            raise ValueError(f"counts must be at least 1, got {self}")
        if self.group not in GROUPS:
            raise ValueError(f"group must be one of {', '.join(GROUPS)}; got {self.group!r}")


def evopress(run: Run, settings: EvoPressSettings) -> Strategy:
    """Return the published search as a generator of rounds."""
    parent = yield from _initial(run, settings)
    run.record(0)
    for generation in range(1, settings.generations + 1):
        alive = _offspring(run, parent, settings)
        if not alive:
            break  # the parent has no neighbour within the budget
        for stage, (survivors, tokens) in enumerate(
            zip(settings.survivors, settings.tokens, strict=True), start=1
        ):
            if stage == len(settings.tokens):
                alive = [*alive, parent]
            scored = yield from select(run, alive, survivors, tokens, f"selection {stage}")
            alive = [genome for genome, _ in scored]
        is_new = alive[0] != parent
        parent, loss = scored[0]
        run.found(parent, loss)
        run.record(generation, accepted=is_new)


def select(
    run: Run, genomes: Sequence[Genome], survivors: int, tokens: int, stage: str
) -> Generator[Round, Losses, list[tuple[Genome, float]]]:
    """Return the `survivors` genomes of least loss on one new minibatch, the best first."""
    losses = yield run.round(genomes, tokens, stage)
    scored = [(genome, mean(row)) for genome, row in zip(genomes, losses, strict=True)]
    return sorted(scored, key=lambda pair: pair[1])[:survivors]


def select_start(
    run: Run, genomes: Iterable[Genome], tokens: int
) -> Generator[Round, Losses, Genome]:
    """Return the best of the distinct genomes, which is also noted as the best found."""
    candidates = unique(genomes)
    best: Genome = candidates[0]
    loss: float | None = None
    if len(candidates) > 1:
        ((best, loss),) = yield from select(run, candidates, 1, tokens, "start")
    run.found(best, loss)
    return best


def random_plan(run: Run) -> Genome:
    """Return the published start for a fractional target: lower random units from above it.

    Above: the cheapest uniform plan over the budget, or the dearest plan there is. Where drops
    are counted, as many as needed are drawn first, and no more are added.
    """
    space, rng = run.space, run.rng
    over = [plan for plan in space.uniform().values() if space.cost(plan) > run.limit]
    genome = min(over, key=space.cost) if over else space.dearest
    genome = random_drops(space, genome, rng)
    counted = {i for count in space.counts for i in count.genes}
    while space.cost(genome) > run.limit:
        able = [i for i in _steppable(space, genome, -1) if i not in counted]
        if not able:
            raise ValueError(f"no plan drawn at random fits {run.budget.text}; use evolve")
        genome = _switch(genome, rng.choice(able), -1)
    return space.canonical(genome)


def _initial(run: Run, settings: EvoPressSettings) -> Generator[Round, Losses, Genome]:
    """Return the first parent: the uniform plan, or the best of some random ones."""
    uniform = run.uniform()
    is_whole = bool(uniform) and run.space.cost(uniform[0]) >= NEARLY_WHOLE * run.limit
    competing = uniform if settings.uniform else uniform[:is_whole]
    drawn = [] if is_whole else [random_plan(run) for _ in range(settings.initially_generated)]
    candidates = [*run.starts, *competing, *drawn]
    return (yield from select_start(run, candidates, settings.initial_tokens))


def _offspring(run: Run, parent: Genome, settings: EvoPressSettings) -> list[Genome]:
    """Return distinct mutants of the parent within the budget."""
    made: dict[Genome, None] = {}
    group = "name" if run.space.counts else settings.group
    for _ in range(TRIES * settings.offspring):
        if len(made) == settings.offspring:
            break
        if group == "none":
            child = _mutate_freely(run.space, parent, run.limit, run.rng)
        else:
            child = _mutate_in_groups(run.space, parent, group, run.rng)
        if child is None or not run.budget.allows(run.space, child):
            continue
        child = run.space.canonical(child)
        if child != parent:
            made[child] = None
    return list(made)


def n_flips(rng: Random) -> int:
    """Return min(U{1, 2, 3}, U{1, 2, 3}): mostly one switch, at most three."""
    return min(rng.randint(1, 3), rng.randint(1, 3))


def _mutate_in_groups(space: SearchSpace, parent: Genome, group: str, rng: Random) -> Genome | None:
    """Return the parent after some pairs of one lowered and one raised unit of the same group."""
    child = parent
    for _ in range(n_flips(rng)):
        # A group is drawn with its number of units as weight: that of a uniform unit.
        key = _group(space, rng.randrange(len(space.genes)), group)
        lower = [i for i in _steppable(space, child, -1) if _group(space, i, group) == key]
        upper = [i for i in _steppable(space, child, +1) if _group(space, i, group) == key]
        if not lower or not upper:
            continue
        # Both lists are made before the lowering, as published: the pair may be one unit.
        child = _switch(child, rng.choice(lower), -1)
        child = _switch(child, rng.choice(upper), +1)
    return child


def _mutate_freely(space: SearchSpace, parent: Genome, limit: int, rng: Random) -> Genome | None:
    """Return the parent after some raises, then random lowers until within the limit."""
    child = parent
    for _ in range(n_flips(rng)):
        upper = _steppable(space, child, +1)
        if upper:
            child = _switch(child, rng.choice(upper), +1)
    added = space.cost(child) - space.cost(parent)
    raised = space.cost(child)
    while space.cost(child) > limit:
        child = _switch(child, rng.choice(_steppable(space, child, -1)), -1)
    switches = sum(abs(a - b) for a, b in zip(child, parent, strict=True))
    removed = raised - space.cost(child)
    if switches > MAX_SWITCHES or added / max(1, removed) < MIN_REFILL:
        return None
    return child


def _group(space: SearchSpace, i: int, group: str) -> object:
    return space.genes[i].n_weights if group == "size" else space.genes[i].kind


def _steppable(space: SearchSpace, genome: Genome, step: int) -> list[int]:
    """Return the genes that matter and have a next option in this direction."""
    return [
        i
        for i, gene in enumerate(space.genes)
        if 0 <= genome[i] + step < len(gene.options) and space.is_active(genome, i)
    ]


def _switch(genome: Genome, i: int, step: int) -> Genome:
    return (*genome[:i], genome[i] + step, *genome[i + 1 :])
