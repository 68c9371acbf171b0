"""Counts of dropped sub-blocks: in allocation, in mutation, in the published search."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from random import Random

import pytest

from hf_evopress.search.ask_tell import Search
from hf_evopress.search.budget import Budget
from hf_evopress.search.drop_counts import allocate, drop_counts, meet, random_drops
from hf_evopress.search.evolve import mutate
from hf_evopress.search.genes import DropCount
from hf_evopress.search.knapsack import total_loss
from hf_evopress.search.rounds import Run
from hf_evopress.search.space import Genome, SearchSpace

N = 6
KINDS = {f"layers.{i}.{k}": kind for i in range(N) for k, kind in (("attn", "a"), ("mlp", "m"))}


def depth_space(n_attention: int = 2, n_mlp: int = 1) -> SearchSpace:
    """Return a space where sub-blocks are kept or dropped, so many of each kind."""
    menu = {name: [("drop", 0), ("dense", 100)] for name in KINDS}
    space = SearchSpace.build(dict.fromkeys(KINDS, 10), menu)
    limits = {"a": (n_attention, n_attention), "m": (n_mlp, n_mlp)}
    return replace(space, counts=drop_counts(space, KINDS, limits))


def joint_space(at_most: int) -> SearchSpace:
    """Return a space of droppable sub-blocks with a linear of 2, 3 or 4 bits in each."""
    units = {**dict.fromkeys([f"{name}.w" for name in KINDS], 10), **dict.fromkeys(KINDS, 0)}
    menu = {name: [("drop", 0), ("dense", 5)] for name in KINDS}
    menu |= {f"{name}.w": [(f"rtn:bits={b}", 10 * b) for b in (2, 3, 4)] for name in KINDS}
    space = SearchSpace.build(units, menu, inside={f"{name}.w": name for name in KINDS})
    return replace(space, counts=drop_counts(space, KINDS, {"a": (0, at_most), "m": (0, at_most)}))


def n_dropped(space: SearchSpace, genome: Genome) -> list[int]:
    return [sum(space.is_dropped(genome, i) for i in c.genes) for c in space.counts]


def drop_losses(space: SearchSpace, seed: int = 0) -> list[list[float]]:
    rng = Random(seed)
    return [[rng.uniform(0, 1), 0.0] for _ in space.genes]


def table_of(space: SearchSpace, seed: int) -> list[list[float]]:
    rng = Random(seed)
    return [
        [
            rng.uniform(0, 1) if o.is_drop else rng.uniform(0, 4.0**-n)
            for n, o in enumerate(g.options)
        ]
        for g in space.genes
    ]


def test_allocation_drops_the_cheapest_of_each_kind() -> None:
    space = depth_space()
    table = drop_losses(space)
    found = allocate(space, table, space.max_cost)
    losses = [
        total_loss(space, table, genome)
        for genome in product(range(2), repeat=len(space.genes))
        if space.keeps_counts(genome)
    ]
    assert found.loss == pytest.approx(min(losses)) and n_dropped(space, found.genome) == [2, 1]


def test_allocation_drops_no_more_than_allowed_and_keeps_the_budget() -> None:
    space = joint_space(1)
    for seed in range(5):
        table = table_of(space, seed)
        found = allocate(space, table, 260)
        assert space.keeps_counts(found.genome) and space.cost(found.genome) <= 260
        assert found.lower_bound <= found.loss


def test_a_budget_that_needs_more_drops_than_allowed_is_refused() -> None:
    space = joint_space(1)
    assert space.min_cost == 10 * 25  # two of twelve sub-blocks can go
    with pytest.raises(ValueError, match="the smallest|no plan"):
        allocate(space, table_of(space, 0), space.min_cost - 1)
    with pytest.raises(ValueError, match="smallest possible"):
        Budget.parse(space, size=(space.min_cost - 8) // 8)


def test_mutants_trade_places_within_a_kind() -> None:
    space = depth_space()
    run = Run(space, Budget.of_drops(space), None, (), 4, 8, 0)
    table = drop_losses(space)
    parent = allocate(space, table, space.max_cost).genome
    children = {mutate(run, table, parent, 2, pivot=True) for _ in range(60)} - {None}
    assert len(children) > 5
    assert all(n_dropped(space, child) == [2, 1] for child in children if child)


def test_random_plans_drop_as_many_as_asked_for() -> None:
    space = depth_space(3, 2)
    plans = {random_drops(space, space.dearest, Random(seed)) for seed in range(20)}
    assert len(plans) > 15 and all(n_dropped(space, plan) == [3, 2] for plan in plans)


@pytest.mark.parametrize("strategy", ["evolve", "evopress", "swap"])
def test_a_search_over_drops_finds_the_optimum_of_an_additive_loss(strategy: str) -> None:
    space = depth_space()
    table = drop_losses(space, 3)
    best = allocate(space, table, space.max_cost).genome
    search = Search(
        space, Budget.of_drops(space), strategy=strategy, n_sequences=2, **{"generations": 30}
    )
    while (asked := search.ask()) is not None:
        counted = asked.genomes[:1] if asked.stage == "measure" else asked.genomes
        assert all(space.keeps_counts(genome) for genome in counted)
        search.tell([total_loss(space, table, genome) for genome in asked.genomes])
    assert search.best == best


def test_tied_sub_blocks_count_as_whole_blocks() -> None:
    menu = {name: [("drop", 0), ("dense", 1)] for name in KINDS}
    ties = [[f"layers.{i}.attn", f"layers.{i}.mlp"] for i in range(N)]
    space = SearchSpace.build(dict.fromkeys(KINDS, 1), menu, ties=ties)
    (count,) = drop_counts(space, KINDS, {"a": (2, 2), "m": (2, 2)})
    assert (count.kind, len(count.genes), count.at_least) == ("a with m", N, 2)


def test_counts_that_no_plan_can_keep_are_refused() -> None:
    space = depth_space()
    with pytest.raises(ValueError, match="9 to 9 x sub-blocks are to be dropped; 2 of 2 can be"):
        replace(space, counts=(DropCount("x", (0, 1), 9, 9),))


def test_repair_changes_only_the_genes_it_may() -> None:
    space = depth_space(2, 0)
    attention = space.counts[0].genes
    table = drop_losses(space)
    made = meet(space, table, space.dearest, genes=attention[3:])
    assert all(not space.is_dropped(made, i) for i in attention[:3])
    assert n_dropped(space, made)[0] == 2


def test_a_space_with_counts_survives_json() -> None:
    space = depth_space()
    assert SearchSpace.from_json(space.to_json()) == space


def test_swaps_find_blocks_that_are_cheap_only_together() -> None:
    space = depth_space(3, 0)
    attention = space.counts[0].genes
    table = drop_losses(space, 1)
    together = attention[2:5]  # dear alone, free as a whole

    def loss(genome: Genome) -> float:
        dropped = {i for i in attention if space.is_dropped(genome, i)}
        run = len(dropped & set(together))
        alone = sum(table[i][0] for i in dropped - set(together))
        return alone + (0.0, 1.5, 1.2, 0.1)[run]

    start = tuple(0 if i in together[:2] or i == attention[0] else 1 for i in range(len(table)))
    search = Search(
        space, Budget.of_drops(space), strategy="swap", table=table, starts=[start], n_sequences=2
    )
    while (asked := search.ask()) is not None:
        search.tell([loss(genome) for genome in asked.genomes])
    assert {i for i in attention if space.is_dropped(search.best, i)} == set(together)


def test_swaps_are_for_budgets_of_drops() -> None:
    space = replace(depth_space(), counts=())
    with pytest.raises(ValueError, match="for budgets of drops"):
        Search(space, Budget(space.max_cost, "all"), strategy="swap")
