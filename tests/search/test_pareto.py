from __future__ import annotations

import itertools
from random import Random
from typing import Any

import pytest

from hf_evopress.search.ask_tell import Search
from hf_evopress.search.budget import Budget
from hf_evopress.search.knapsack import total_loss
from hf_evopress.search.space import SearchSpace


def linears(n: int) -> SearchSpace:
    units = {f"model.layers.{i}.w": 10 for i in range(n)}
    menu = {u: [(f"b{b}", 10 * b) for b in (2, 3, 4)] for u in units}
    return SearchSpace.build(units, menu)


def table(n: int, seed: int) -> list[list[float]]:
    rng = Random(seed)
    return [[s, s / 4, s / 16] for s in (rng.lognormvariate(0, 1) for _ in range(n))]


def run(space: SearchSpace, truth: list[list[float]], **settings: Any) -> Search:
    search = Search(
        space, Budget.parse(space, bits=4), strategy="pareto", n_sequences=16, **settings
    )
    while (asked := search.ask()) is not None:
        search.tell([total_loss(space, truth, genome) for genome in asked.genomes])
    return search


def test_the_front_is_non_dominated_and_stays_between_its_budgets() -> None:
    space = linears(12)
    points = run(space, table(12, 0), low=2.5).report["front"]
    assert len(points) >= 5
    assert all(2.5 <= point["bits_per_weight"] + 0.1 <= 4.1 for point in points)
    for a, b in itertools.pairwise(points):
        assert a["bits_per_weight"] < b["bits_per_weight"] and a["loss"] > b["loss"]


def test_corrections_improve_a_front_that_began_from_a_guess() -> None:
    space, truth = linears(12), table(12, 1)

    def mean_loss(corrections: int) -> float:
        points = run(space, truth, corrections=corrections).report["front"]
        inside = [p["loss"] for p in points if 2.4 < p["bits_per_weight"] < 3.6]
        return sum(inside) / len(inside)

    assert mean_loss(3) < mean_loss(0)


def test_every_point_can_be_applied_later() -> None:
    space, truth = linears(6), table(6, 2)
    for point in run(space, truth).report["front"]:
        genome = tuple(point["genome"])
        assert space.genome(space.levels(genome)) == genome
        assert total_loss(space, truth, genome) == pytest.approx(point["loss"])


def test_a_front_upside_down_is_refused() -> None:
    space = linears(4)
    with pytest.raises(ValueError, match="above 3 bits per weight"):
        Search(space, Budget.parse(space, bits=3), strategy="pareto", low=3.5)
