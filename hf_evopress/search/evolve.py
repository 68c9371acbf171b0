"""The default search: evolution from the knapsack plan, offspring screened by predicted loss.

It starts from the best of the knapsack plan, the uniform plans, given plans and, where embedding
or head are searched, the knapsack plans of each level of theirs: one choice that moves a fifth of
all bytes is worth a measurement of its own. Each generation
draws many mutants, evaluates only those that a surrogate likes best (one is the knapsack plan of
the corrected table), and lets the best of them replace the incumbent only if it is significantly
better on fresh sequences, by a paired test. It stops when nothing is found for a while, so that
little is spent where the knapsack suffices, and returns the best of incumbent, knapsack and
uniform plan on held-out sequences, with the paired differences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from .drop_counts import allocate, meet
from .evopress import n_flips
from .knapsack import fill, total_loss
from .paired import Paired, compare
from .rounds import Losses, Round, Run, Strategy, mean, unique
from .space import Genome, Table
from .surrogate import Surrogate, rate_table

EXPLORED = 0.25  # of the offspring are drawn at random: the surrogate may be wrong
UNIFORM = 6  # uniform plans measured at the start: those of least predicted loss
ENDS_WITHIN = 2.0  # times the least predicted loss: knapsack plans of other ends measured there
SAMPLED = 8  # units looked at before one of them pays for a raise
TRIES = 10  # draws per mutant before a generation makes do with fewer


@dataclass(frozen=True)
class EvolveSettings:
    """tokens: to screen the offspring and to confirm the best of them, per plan.

    drawn: mutants that the surrogate chooses the offspring from. patience: generations without
    success before the search ends. confidence: of the paired test. pivot: mutate only at or
    after a random block, so that evaluations share the blocks before it.
    """

    generations: int = 20
    offspring: int = 6
    tokens: tuple[int, ...] = (2048, 8192)
    drawn: int = 96
    patience: int = 4
    confidence: float = 0.9
    pivot: bool = True

    def __post_init__(self) -> None:
        if len(self.tokens) != 2:
            raise ValueError(f"tokens are two counts, to screen and confirm; got {self.tokens}")
        if min(self.offspring, self.drawn, self.patience, *self.tokens) < 1:
            raise ValueError(f"counts must be at least 1, got {self}")
        if self.generations < 0:
            raise ValueError(f"generations must be at least 0, got {self.generations}")
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence must be in [0.5, 1), got {self.confidence}")


def evolve(run: Run, settings: EvolveSettings) -> Strategy:
    """Return the search as a generator of rounds."""
    surrogate = Surrogate(run.space, run.table or rate_table(run.space))
    allocated = allocate(run.space, surrogate.prior, run.limit).genome
    uniform, incumbent = yield from _start(run, surrogate, allocated, settings)
    run.record(0)
    tried = {incumbent}
    stalled = 0
    for generation in range(1, settings.generations + 1):
        offspring = _offspring(run, surrogate, incumbent, tried, stalled, settings)
        if not offspring:
            break  # every plan the surrogate can think of has been tried
        tried.update(offspring)
        screen = run.round([incumbent, *offspring], settings.tokens[0], "screen")
        losses = yield screen
        _learn(surrogate, screen.genomes, losses)
        best = min(range(1, len(losses)), key=lambda i: mean(losses[i]))
        measured = compare(losses[best], losses[0])
        is_accepted = False
        if measured.mean < 0:
            # The best of many looks better than it is: only sequences it was not chosen on tell.
            challenger = screen.genomes[best]
            confirm = run.round(
                [incumbent, challenger],
                settings.tokens[1],
                "confirm",
                fresh_from=screen.sequences,
            )
            losses = yield confirm
            _learn(surrogate, confirm.genomes, losses)
            measured = compare(losses[1], losses[0])
            is_accepted = measured.is_better(settings.confidence)
            if is_accepted:
                incumbent = challenger
            run.found(incumbent, mean(losses[is_accepted]))
        stalled = 0 if is_accepted else stalled + 1
        run.record(generation, accepted=is_accepted, p_value=measured.p_value, **measured.to_json())
        if stalled >= settings.patience:
            break
    yield from _conclude(run, incumbent, allocated, uniform)


def _start(
    run: Run, surrogate: Surrogate, allocated: Genome, settings: EvolveSettings
) -> Generator[Round, Losses, tuple[Genome | None, Genome]]:
    """Return the best uniform plan, if any fits, and the best plan of all to begin with."""
    uniform = run.uniform()
    if run.table is not None:  # a menu of many families has many that cannot win
        uniform.sort(key=lambda plan: total_loss(run.space, surrogate.prior, plan))
        uniform = uniform[:UNIFORM]
    ends = _with_other_ends(run, surrogate.prior, allocated) if run.table is not None else []
    plans = unique([allocated, *ends, *map(run.space.canonical, run.starts), *uniform])
    if len(plans) == 1:
        run.found(plans[0], None)
        return (plans[0] if uniform else None), plans[0]
    losses = yield run.round(plans, settings.tokens[0], "start")
    _learn(surrogate, plans, losses)
    score = {plan: mean(row) for plan, row in zip(plans, losses, strict=True)}
    best = min(plans, key=score.__getitem__)
    run.found(best, score[best])
    return min(uniform, key=score.__getitem__, default=None), best


def _with_other_ends(run: Run, table: Table, allocated: Genome) -> list[Genome]:
    """Return the knapsack plan of each level of embedding and head that may be as good."""
    most = ENDS_WITHIN * total_loss(run.space, table, allocated)
    never = 1e3 * (1 + max(map(max, table)))
    found = []
    for i, gene in enumerate(run.space.genes):
        if not gene.is_end:
            continue
        for choice in range(len(gene.options)):
            forced = [list(row) for row in table]
            forced[i] = [loss if n == choice else never for n, loss in enumerate(table[i])]
            with contextlib.suppress(ValueError):  # no plan with this level is within the budget
                plan = allocate(run.space, forced, run.limit).genome
                if plan[i] == choice and total_loss(run.space, table, plan) <= most:
                    found.append(plan)
    return found


def _learn(surrogate: Surrogate, plans: Sequence[Genome], losses: Losses) -> None:
    """Teach the surrogate the differences between each plan and the first."""
    for plan, row in zip(plans[1:], losses[1:], strict=True):
        surrogate.learn(plan, plans[0], compare(row, losses[0]))


def _conclude(run: Run, incumbent: Genome, allocated: Genome, uniform: Genome | None) -> Strategy:
    """Choose by held-out sequences; report what the choice gains over knapsack and uniform."""
    rivals = {"knapsack": allocated} | ({"uniform": uniform} if uniform else {})
    finalists = unique([incumbent, *rivals.values()])
    same = Paired(0.0, 0.0, 0)
    against = dict.fromkeys(rivals, same)
    if len(finalists) > 1:
        final = run.held_out_round(finalists, "final")
        losses = dict(zip(finalists, (yield final), strict=True))
        winner = min(finalists, key=lambda plan: mean(losses[plan]))
        run.found(winner, mean(losses[winner]))
        run.report["is_held_out"] = final.is_held_out
        against = {name: compare(losses[winner], losses[plan]) for name, plan in rivals.items()}
    run.report["against"] = {name: paired.to_json() for name, paired in against.items()}


def _offspring(
    run: Run,
    surrogate: Surrogate,
    incumbent: Genome,
    tried: set[Genome],
    stalled: int,
    settings: EvolveSettings,
) -> list[Genome]:
    """Return untried plans within the budget: the surrogate's favourites and a few at random."""
    table = surrogate.table()
    drawn: dict[Genome, None] = {}
    for _ in range(TRIES * settings.drawn):
        if len(drawn) == settings.drawn:
            break
        # Longer without success, larger steps: small ones have been tried.
        flips = n_flips(run.rng) + run.rng.randint(0, stalled)
        child = mutate(run, table, incumbent, flips, pivot=settings.pivot)
        if child is not None and child not in tried:
            drawn[child] = None
    ranked = sorted(drawn, key=lambda plan: total_loss(run.space, table, plan))
    jump = allocate(run.space, table, run.limit).genome
    if jump not in tried:
        ranked = unique([jump, *ranked])
    n_explored = min(int(EXPLORED * settings.offspring), len(ranked) - 1)
    chosen = ranked[: settings.offspring - max(0, n_explored)]
    others = ranked[len(chosen) :]
    return chosen + run.rng.sample(others, min(len(others), settings.offspring - len(chosen)))


def mutate(run: Run, table: Table, parent: Genome, flips: int, *, pivot: bool) -> Genome | None:
    """Return the parent after `flips` changed units, paid for by others, the slack used up.

    Any unit may trade with any other; where drops are counted, sub-blocks of a kind trade
    places. None where the budget cannot be kept.
    """
    space, rng = run.space, run.rng
    genes = [
        i for i, g in enumerate(space.genes) if len(g.options) > 1 and space.is_active(parent, i)
    ]
    if pivot and genes:
        first = rng.choice(sorted({space.genes[i].block for i in genes}))
        behind = [i for i in genes if space.genes[i].block >= first]
        genes = behind if len(behind) > 1 else genes
    if not genes:
        return None
    child, changed = parent, set()
    for i in rng.sample(genes, min(flips, len(genes))):
        n = rng.choice([n for n in range(len(space.genes[i].options)) if n != child[i]])
        child = _with(_restored(run, child, i), i, n)
        changed.add(i)
    child = meet(space, table, child, genes={*genes} - changed, rng=rng)
    slack = run.limit - space.cost(child)
    while slack < 0:
        payers = [i for i in genes if child[i] and i not in changed and space.is_active(child, i)]
        sample = rng.sample(payers, min(SAMPLED, len(payers)))
        offers = [(i, rng.randrange(child[i])) for i in sample]
        freed = {(i, n): -int(space.change(space.costs, child, i, n)) for i, n in offers}
        offers = [offer for offer in offers if freed[offer] > 0]
        if not offers:
            return None
        i, n = min(offers, key=lambda o: space.change(table, child, *o) / freed[o])
        slack += freed[i, n]
        child = _with(child, i, n)
    # Blocks before the mutated ones stay as they were: evaluations share them.
    start = min(space.genes[i].block for i in genes)
    free = [i for i, g in enumerate(space.genes) if i not in changed and g.block >= start]
    child = space.canonical(fill(space, table, child, run.limit, genes=free))
    return child if space.keeps_counts(child) else None


def _restored(run: Run, genome: Genome, i: int) -> Genome:
    """Return the genome where units inside a dropped sub-block, gene i, have average bits."""
    space = run.space
    if i not in space.inner or not space.genes[i].options[genome[i]].is_drop:
        return genome
    rate = Fraction(run.limit, space.n_weights)
    for k in space.inner[i]:
        genome = _with(genome, k, space.genes[k].nearest(rate))
    return genome


def _with(genome: Genome, i: int, n: int) -> Genome:
    return (*genome[:i], n, *genome[i + 1 :])
