from __future__ import annotations

import itertools
from math import isclose
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_evopress.search.knapsack import fill, front, solve, total_loss
from hf_evopress.search.space import SearchSpace

from ..spaces import all_genomes, random_space, random_table


def line(n: int, menu: list[int], *, weights: int = 10) -> SearchSpace:
    units = {f"m.{i}.w": weights for i in range(n)}
    return SearchSpace.build(units, {u: [(f"b{b}", b * weights) for b in menu] for u in units})


@settings(max_examples=250, deadline=None)
@given(seed=st.integers(0, 2**32), is_whole=st.booleans())
def test_the_optimum_equals_brute_force(seed: int, is_whole: bool) -> None:
    rng = Random(seed)
    space = random_space(rng)
    table = random_table(rng, space, is_whole=is_whole)
    limit = rng.randint(space.min_cost, space.max_cost)
    solution = solve(space, table, limit)
    least = min(total_loss(space, table, g) for g in all_genomes(space) if space.cost(g) <= limit)
    assert isclose(solution.loss, least, abs_tol=1e-9)
    assert solution.is_optimal
    assert solution.cost_bits == space.cost(solution.genome) <= limit
    assert isclose(total_loss(space, table, solution.genome), solution.loss, abs_tol=1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_lower_bound_holds_even_when_states_run_out(seed: int) -> None:
    rng = Random(seed)
    space = random_space(rng)
    table = random_table(rng, space)
    limit = rng.randint(space.min_cost, space.max_cost)
    rough, exact = solve(space, table, limit, max_states=1), solve(space, table, limit)
    assert rough.cost_bits <= limit
    assert rough.lower_bound - 1e-9 <= exact.loss <= rough.loss + 1e-9


def test_two_hundred_equal_units_are_solved_exactly() -> None:
    space = line(200, [2, 3, 4, 6])
    table = [[16.0, 4.0, 1.0, 0.1]] * 200
    solution = solve(space, table, 200 * 10 * 3 + 10 * 7)
    assert solution.is_optimal and solution.loss == pytest.approx(193 * 4 + 7)


def test_a_thousand_units_with_twenty_levels_are_solved_to_the_proof() -> None:
    rng = Random(0)
    units = {f"m.{i}.w": rng.choice([110592, 331776, 884736]) for i in range(1000)}
    bits = [b + extra for b in (2, 3, 4, 5) for extra in (0.125, 0.25, 0.28, 0.5, 0.75)]
    space = SearchSpace.build(
        units, {u: [(f"b{b}", int(b * w)) for b in bits] for u, w in units.items()}
    )
    table = [
        [rng.lognormvariate(0, 1) * gene.n_weights * 4**-b * rng.uniform(0.8, 1.2) for b in bits]
        for gene in space.genes
    ]
    assert solve(space, table, int(3.3 * space.n_weights)).is_optimal


def test_a_sub_block_is_dropped_where_its_bits_serve_better_elsewhere() -> None:
    units = {"l.0.mlp": 0, "l.0.mlp.up": 100, "l.1.w": 100}
    linear = [("b2", 200), ("b4", 400)]
    menu = {"l.0.mlp": [("dense", 0), ("drop", 0)], "l.0.mlp.up": linear, "l.1.w": linear}
    space = SearchSpace.build(units, menu, inside={"l.0.mlp.up": "l.0.mlp"})
    table = [[1.5, 0.0], [1.0, 0.1], [9.0, 0.0]]
    assert space.levels(solve(space, table, 400).genome) == {"l.0.mlp": "drop", "l.1.w": "b4"}
    assert space.levels(solve(space, table, 600).genome)["l.0.mlp"] == "dense"


def test_an_unreachable_limit_names_the_smallest() -> None:
    with pytest.raises(ValueError, match="the smallest has 40"):
        solve(line(2, [2, 4]), [[1, 0], [1, 0]], 39)


@pytest.mark.parametrize("table", [[[1.0, 0.0]], [[1.0], [1.0]], [[1.0, float("nan")]] * 2])
def test_a_table_of_another_shape_or_with_nan_is_refused(table: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="losses"):
        solve(line(2, [2, 4]), table, 60)


def test_the_front_is_non_dominated_and_spans_the_budgets() -> None:
    rng = Random(1)
    space = line(12, [2, 3, 4, 8])
    table = [sorted((rng.uniform(0, 4) for _ in range(4)), reverse=True) for _ in range(12)]
    plans = front(space, table, points=9)
    assert plans[0].cost_bits == space.min_cost and plans[-1].cost_bits == space.max_cost
    assert len(plans) == 9
    for a, b in itertools.pairwise(plans):
        assert a.cost_bits < b.cost_bits and a.loss > b.loss


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_fill_leaves_no_raise_that_fits_and_helps(seed: int) -> None:
    rng = Random(seed)
    space = random_space(rng)
    table = random_table(rng, space)
    limit = rng.randint(space.min_cost, space.max_cost)
    full = fill(space, table, space.cheapest, limit)
    assert space.cost(full) <= limit
    for i, gene in enumerate(space.genes):
        for n in range(full[i] + 1, len(gene.options)):
            other = (*full[:i], n, *full[i + 1 :])
            fits = space.cost(other) <= limit and space.is_active(full, i)
            if fits and not gene.options[full[i]].is_drop:
                assert table[i][n] >= table[i][full[i]]
