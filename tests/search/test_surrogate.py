from __future__ import annotations

from random import Random

import pytest

from hf_evopress.search.knapsack import total_loss
from hf_evopress.search.paired import Paired
from hf_evopress.search.space import SearchSpace
from hf_evopress.search.surrogate import Surrogate, rate_table

from ..spaces import random_space


def linears(n: int = 6) -> SearchSpace:
    units = {f"m.{i}.{'up' if i % 2 else 'down'}": 10 for i in range(n)}
    return SearchSpace.build(units, {u: [(f"b{b}", 10 * b) for b in (2, 3, 4)] for u in units})


def test_without_measurements_the_table_is_the_prior() -> None:
    table = [[3.0, 2.0, 1.0]] * 6
    surrogate = Surrogate(linears(), table)
    assert surrogate.table() == table


def test_it_learns_additive_losses_that_the_table_got_wrong() -> None:
    rng = Random(0)
    space = linears()
    truth = [[4 * s, 2 * s, s] for s in (rng.uniform(0.2, 3) for _ in range(6))]
    surrogate = Surrogate(space, [[4.0, 2.0, 1.0]] * 6)
    base = (1,) * 6

    def error(table: list[list[float]]) -> float:
        plans = [tuple(Random(seed).choices(range(3), k=6)) for seed in range(50)]
        wrong = 0.0
        for plan in plans:
            guess = total_loss(space, table, plan) - total_loss(space, table, base)
            wrong += abs(guess - total_loss(space, truth, plan) + total_loss(space, truth, base))
        return wrong

    before = error(surrogate.table())
    for _ in range(60):
        plan = tuple(rng.choices(range(3), k=6))
        gain = total_loss(space, truth, plan) - total_loss(space, truth, base)
        surrogate.learn(plan, base, Paired(gain, 0.001, 8))
    assert error(surrogate.table()) < 0.25 * before


def test_a_noisy_measurement_moves_it_less_than_a_sure_one() -> None:
    def moved(stderr: float) -> float:
        surrogate = Surrogate(linears(), [[3.0, 2.0, 1.0]] * 6)
        for i in range(1, 6):  # these agree with the table
            plan = tuple(0 if k == i else 1 for k in range(6))
            surrogate.learn(plan, (1,) * 6, Paired(1.0, 0.1, 8))
        surrogate.learn((0, 1, 1, 1, 1, 1), (1,) * 6, Paired(3.0, stderr, 8))
        return surrogate.table()[0][0] - surrogate.table()[0][1] - 1

    assert 0 < moved(5.0) < 0.2 * moved(0.01)


def test_what_is_learnt_of_a_level_carries_over_to_other_units() -> None:
    surrogate = Surrogate(linears(), [[3.0, 2.0, 1.0]] * 6)
    surrogate.learn((0, 1, 1, 1, 1, 1), (1,) * 6, Paired(3.0, 0.01, 8))
    low, middle, _ = surrogate.table()[4]
    assert low - middle > 1.0


def test_a_table_in_other_units_is_scaled_to_what_is_measured() -> None:
    surrogate = Surrogate(linears(), [[4.0, 2.0, 1.0]] * 6)
    for i in range(6):
        plan = tuple(0 if k == i else 1 for k in range(6))
        surrogate.learn(plan, (1,) * 6, Paired(200.0, 1.0, 8))
    assert surrogate.table()[0] == pytest.approx([400, 200, 100], rel=0.1)


def test_choices_inside_a_dropped_sub_block_predict_nothing() -> None:
    units = {"l.0.mlp": 0, "l.0.mlp.up": 10}
    menu = {"l.0.mlp": [("dense", 0), ("drop", 0)], "l.0.mlp.up": [("b2", 20), ("b4", 40)]}
    space = SearchSpace.build(units, menu, inside={"l.0.mlp.up": "l.0.mlp"})
    surrogate = Surrogate(space, rate_table(space))
    surrogate.learn((0, 0), (0, 1), Paired(0.0, 0.001, 8))
    for row, prior in zip(surrogate.table(), rate_table(space), strict=True):
        assert row == pytest.approx(prior)


def test_the_rate_table_falls_with_bits_and_charges_drops() -> None:
    for seed in range(50):
        space = random_space(Random(seed))
        for gene, row in zip(space.genes, rate_table(space), strict=True):
            by_cost = [v for v, o in zip(row, gene.options, strict=True) if not o.is_drop]
            assert by_cost == sorted(by_cost, reverse=True)
            if gene.options[0].is_drop:
                assert row[0] == max(row) > 0
