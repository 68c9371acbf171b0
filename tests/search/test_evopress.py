from __future__ import annotations

import itertools
from collections import Counter
from random import Random

import pytest

from hf_evopress.search.ask_tell import Search
from hf_evopress.search.budget import Budget
from hf_evopress.search.evopress import n_flips
from hf_evopress.search.space import Genome, SearchSpace


def model(blocks: int = 4) -> SearchSpace:
    """Two sizes of linears, whole-bit levels without scales: the published setting."""
    units: dict[str, int] = {}
    for i in range(blocks):
        units |= {f"l.{i}.q": 10, f"l.{i}.o": 10, f"l.{i}.up": 30, f"l.{i}.down": 30}
    menu = {u: [(f"b{b}", b * n) for b in (2, 3, 4, 5)] for u, n in units.items()}
    return SearchSpace.build(units, menu)


def start(space: SearchSpace, **settings: object) -> Search:
    return Search(space, Budget.parse(space, bits=3), strategy="evopress", **settings)  # type: ignore[arg-type]


def test_the_number_of_switches_is_distributed_as_published() -> None:
    rng = Random(0)
    counts = Counter(n_flips(rng) for _ in range(9000))
    assert [round(9 * counts[k] / 9000) for k in (1, 2, 3)] == [5, 3, 1]


def test_an_integer_target_starts_from_the_uniform_plan_alone() -> None:
    space = model()
    asked = start(space, uniform=False).ask()
    assert asked is not None and asked.stage == "selection 1"
    moved = [sum(abs(c - 1) for c in genome) for genome in asked.genomes]
    assert max(moved) <= 6  # three pairs of switches


def test_a_fractional_target_starts_from_the_best_of_random_plans() -> None:
    space = model()
    budget = Budget.parse(space, bits=2.5)
    search = Search(space, budget, strategy="evopress", uniform=False, initially_generated=8)
    asked = search.ask()
    assert asked is not None and asked.stage == "start" and len(asked.genomes) == 8
    assert all({0, 1} == set(genome) for genome in asked.genomes)  # lowered from 3 bits


@pytest.mark.parametrize("group", ["size", "name"])
def test_bits_are_conserved_within_each_group(group: str) -> None:
    space = model()
    asked = start(space, group=group, uniform=False).ask()
    assert asked is not None

    def spent(genome: Genome) -> Counter[object]:
        total: Counter[object] = Counter()
        for gene, choice in zip(space.genes, genome, strict=True):
            key = gene.n_weights if group == "size" else gene.kind
            total[key] += gene.options[choice].cost_bits
        return total

    assert all(spent(g) == spent((1,) * len(g)) for g in asked.genomes)


def test_without_groups_units_of_any_size_trade() -> None:
    space = model()
    asked = start(space, group="none", uniform=False, offspring=64).ask()
    assert asked is not None
    is_large = [gene.n_weights > 10 for gene in space.genes]
    large = [sum(itertools.compress(plan, is_large)) for plan in asked.genomes]
    assert len(set(large)) > 1


def test_stages_select_on_more_tokens_and_the_parent_enters_the_last_only() -> None:
    space = model()
    settings = {"offspring": 8, "survivors": (4, 2, 1), "tokens": (1, 2, 4), "uniform": False}
    search = start(space, n_sequences=16, **settings)  # type: ignore[arg-type]
    seen = []
    for _ in range(3):
        asked = search.ask()
        assert asked is not None
        seen.append(asked)
        search.tell([[float(i)] * asked.n_sequences for i in range(len(asked.genomes))])
    parent = (1,) * 16
    assert [len(asked.genomes) for asked in seen] == [8, 4, 2 + 1]
    assert [asked.n_sequences for asked in seen] == [1, 2, 4]
    assert [parent in asked.genomes for asked in seen] == [False, False, True]
    assert search.best == seen[0].genomes[0]  # the winner, not the last that was evaluated


def test_an_elitist_parent_survives_when_no_offspring_is_better() -> None:
    space = model()
    search = start(space, generations=3, uniform=False)
    while (asked := search.ask()) is not None:
        search.tell([float(sum((c - 1) ** 2 for c in genome)) for genome in asked.genomes])
    assert search.best == (1,) * 16


def test_a_parent_without_neighbours_ends_the_search() -> None:
    menu = {"l.0.a": [("x", 20), ("y", 30)], "l.1.b": [("x", 40)]}
    space = SearchSpace.build({"l.0.a": 10, "l.1.b": 20}, menu)
    search = Search(space, Budget(60, ""), strategy="evopress")
    assert search.is_finished and search.best == (0, 0)


def test_it_improves_on_uniform_on_a_separable_problem() -> None:
    space = model()
    scale = [Random(i).lognormvariate(0, 1) for i in range(16)]

    def loss(genome: Genome) -> float:
        return sum(s * 4.0**-c for s, c in zip(scale, genome, strict=True))

    search = start(space, generations=30)
    while (asked := search.ask()) is not None:
        search.tell([loss(genome) for genome in asked.genomes])
    assert loss(search.best) < 0.9 * loss((1,) * 16)
