from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from hf_evopress.search.ask_tell import Search
from hf_evopress.search.budget import Budget
from hf_evopress.search.knapsack import total_loss
from hf_evopress.search.space import Genome, SearchSpace

from ..spaces import all_genomes

PATIENT: dict[str, Any] = {"offspring": 8, "patience": 20, "generations": 150, "drawn": 48}


def linears(n: int, bits: tuple[int, ...] = (2, 3, 4)) -> SearchSpace:
    units = {f"model.layers.{i}.w": 10 for i in range(n)}
    return SearchSpace.build(units, {u: [(f"b{b}", 10 * b) for b in bits] for u in units})


def optimum(space: SearchSpace, budget: Budget, loss: Callable[[Genome], float]) -> float:
    return min(loss(g) for g in all_genomes(space) if budget.allows(space, g))


def drive(search: Search, loss: Callable[[Genome], float]) -> Search:
    while (asked := search.ask()) is not None:
        search.tell([loss(genome) for genome in asked.genomes])
    return search


def sensitivities(n: int, seed: int) -> list[list[float]]:
    rng = Random(seed)
    return [[s, s / 4, s / 16] for s in (rng.lognormvariate(0, 1) for _ in range(n))]


@pytest.mark.parametrize("seed", range(4))
def test_it_reaches_the_optimum_of_a_separable_problem_without_any_table(seed: int) -> None:
    space, truth = linears(8), sensitivities(8, seed)
    budget = Budget.parse(space, bits=3)

    def loss(genome: Genome) -> float:
        return total_loss(space, truth, genome)

    search = drive(Search(space, budget, seed=seed, **PATIENT), loss)
    assert loss(search.best) == pytest.approx(optimum(space, budget, loss))


@pytest.mark.parametrize("seed", range(4))
def test_it_reaches_the_optimum_with_pairwise_interactions(seed: int) -> None:
    space, table = linears(8), sensitivities(8, seed)
    budget = Budget.parse(space, bits=3)
    rng = Random(seed)
    pairs = {(i, j): rng.uniform(-0.5, 0.5) for i in range(8) for j in range(i)}

    def loss(genome: Genome) -> float:
        low = [c == 0 for c in genome]
        return total_loss(space, table, genome) + sum(
            w for (i, j), w in pairs.items() if low[i] and low[j]
        )

    search = Search(space, budget, table=table, seed=seed, **PATIENT)
    assert loss(drive(search, loss).best) == pytest.approx(optimum(space, budget, loss))


def test_it_reaches_the_optimum_of_a_deceptive_problem() -> None:
    """The table and every single switch lead away from the optimum."""
    space = linears(6)
    budget = Budget.parse(space, bits=3)
    table = [[9.0, 3.0, 1.0] if i < 3 else [3.0, 1.0, 0.5] for i in range(6)]
    trap = (0, 0, 0, 2, 2, 2)

    def loss(genome: Genome) -> float:
        return (
            0.0 if genome == trap else 10 - sum(a != b for a, b in zip(genome, trap, strict=True))
        )

    search = Search(space, budget, table=table, **PATIENT | {"offspring": 16})
    assert drive(search, loss).best == trap


def test_sub_blocks_are_dropped_and_restored() -> None:
    subs = {f"l.{i}.mlp": 0 for i in range(4)}
    linear = {f"{sub}.up": 10 for sub in subs}
    menu = {s: [("dense", 0), ("drop", 0)] for s in subs}
    menu |= {u: [("b2", 20), ("b4", 40)] for u in linear}
    space = SearchSpace.build(subs | linear, menu, inside={u: u[:-3] for u in linear})
    budget = Budget(120, "three of four at 4 bits")

    def loss(genome: Genome) -> float:
        levels = space.levels(genome)
        kept = sum(levels.get(f"l.{i}.mlp.up") == "b4" for i in (0, 1, 3))
        return 3.0 - kept + (levels["l.2.mlp"] != "drop")

    best = drive(Search(space, budget, patience=8, generations=40), loss).best
    assert loss(best) == 0


def test_the_incumbent_only_falls_to_a_significant_gain_on_fresh_sequences() -> None:
    """All plans are equal: with noise, false winners are as rare as the confidence says."""
    space = linears(6)
    accepted = tests = 0
    for seed in range(40):
        rng = Random(seed)
        settings: dict[str, Any] = {
            "tokens": (4, 12),
            "generations": 6,
            "patience": 6,
            "drawn": 8,
            "offspring": 4,
            "confidence": 0.95,
        }
        search = Search(space, Budget.parse(space, bits=3), n_sequences=32, seed=seed, **settings)
        while (asked := search.ask()) is not None:
            search.tell([[rng.gauss(0, 1) for _ in asked.sequences] for _ in asked.genomes])
            tests += asked.stage == "confirm"
        accepted += sum(bool(record.get("accepted")) for record in search.history)
    assert tests > 150
    assert accepted / tests < 0.09


def test_confirming_uses_none_of_the_screening_or_held_out_sequences() -> None:
    space = linears(10)
    search = Search(space, Budget.parse(space, bits=3), n_sequences=32, tokens=(4, 12))
    screened: set[int] = set()
    stages = set()
    while (asked := search.ask()) is not None:
        stages.add(asked.stage)
        if asked.stage == "screen":
            screened = set(asked.sequences)
        if asked.stage == "confirm":
            assert not screened & set(asked.sequences)
        assert asked.is_held_out == (asked.stage == "final")
        assert all((s >= 24) == asked.is_held_out for s in asked.sequences)
        search.tell([[sum(c * c for c in g) + 0.0] * asked.n_sequences for g in asked.genomes])
    assert {"screen", "start"} <= stages


@pytest.mark.parametrize("seed", range(6))
def test_the_result_is_never_worse_than_uniform_or_knapsack_on_held_out_sequences(
    seed: int,
) -> None:
    """Even where search sequences mislead: there, other plans are good."""
    space = linears(8)
    misled, truth = sensitivities(8, seed), sensitivities(8, seed + 100)
    search = Search(space, Budget.parse(space, bits=3), table=misled, n_sequences=32, seed=seed)
    final = None
    while (asked := search.ask()) is not None:
        table = truth if asked.is_held_out else misled
        losses = [total_loss(space, table, genome) for genome in asked.genomes]
        if asked.stage == "final":
            final = dict(zip(asked.genomes, losses, strict=True))
        search.tell(losses)
    assert final is not None
    assert final[search.best] == min(final.values())
    for rival in ("uniform", "knapsack"):
        assert search.report["against"][rival]["difference"] <= 0
        assert "stderr" in search.report["against"][rival]


def test_little_is_spent_where_the_knapsack_suffices() -> None:
    space, table = linears(20), sensitivities(20, 0)
    search = Search(space, Budget.parse(space, bits=3), table=table, n_sequences=32, patience=3)
    drive(search, lambda genome: total_loss(space, table, genome))
    assert len(search.history) == 1 + 3


def test_a_pivot_leaves_the_blocks_before_it_alone() -> None:
    space, table = linears(16), sensitivities(16, 0)
    shared = {}
    for pivot in (True, False):
        search = Search(space, Budget.parse(space, bits=3), table=table, pivot=pivot, offspring=24)
        start = search.ask()
        assert start is not None
        search.tell([total_loss(space, table, g) for g in start.genomes])
        screen = search.ask()
        assert screen is not None
        parent, *children = screen.genomes
        shared[pivot] = sum(
            next(i for i, (a, b) in enumerate(zip(parent, g, strict=True)) if a != b)
            for g in children
        )
    assert shared[True] > 1.5 * shared[False]


def test_each_level_of_the_ends_is_measured_at_the_start() -> None:
    """One large choice that is predicted wrong is put right without a single mutation."""
    layers = {f"model.layers.{i}.w": 10 for i in range(4)}
    units = {"embed": 20} | layers
    bits = {u: (2, 3, 4) if u == "embed" else (2, 4) for u in units}  # no uniform plan has 3
    space = SearchSpace.build(
        units, {u: [(f"b{b}", n * b) for b in bits[u]] for u, n in units.items()}, ends=["embed"]
    )
    table = [[1.2, 0.8, 0.1], *([[0.5, 0.2]] * 4)]  # says 4 bits for the embedding
    budget = Budget.parse(space, ratio=space.bits_per_weight(space.cheapest) * 1.5 / 16)

    def loss(genome: Genome) -> float:
        return total_loss(space, [[1.0, 0.0, 0.1], *table[1:]], genome)

    search = Search(space, budget, table=table, **PATIENT | {"generations": 0})
    asked = search.ask()
    assert asked is not None
    assert {genome[0] for genome in asked.genomes} == {0, 1, 2}
    assert asked.genomes[0][0] == 2
    search.tell([[loss(genome)] * len(asked.sequences) for genome in asked.genomes])
    assert drive(search, loss).best[0] == 1
