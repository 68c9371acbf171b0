from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_evopress.search.ask_tell import STRATEGIES, TABLES, Search
from hf_evopress.search.baselines import knapsack
from hf_evopress.search.budget import Budget
from hf_evopress.search.knapsack import total_loss
from hf_evopress.search.space import Genome, SearchSpace

from ..spaces import all_genomes, random_space, random_table

Loss = Callable[[Genome, int], float]  # genome, sequence -> loss

QUICK: dict[str, dict[str, Any]] = {
    "evolve": {"generations": 4, "offspring": 3, "drawn": 8, "tokens": (2, 4)},
    "evopress": {"generations": 3, "offspring": 4, "survivors": (2, 1), "tokens": (2, 4)},
    "knapsack": {},
    "uniform": {"tokens": 2},
    "random": {"plans": 4, "tokens": 2},
    "pareto": {"points": 3, "corrections": 1, "tokens": 2},
}


def linears(n: int, bits: tuple[int, ...] = (2, 3, 4)) -> SearchSpace:
    units = {f"model.layers.{i}.w": 10 for i in range(n)}
    return SearchSpace.build(units, {u: [(f"b{b}", 10 * b) for b in bits] for u in units})


def drive(search: Search, loss: Loss, *, steps: int | None = None) -> Search:
    while (asked := search.ask()) is not None and steps != 0:
        search.tell([[loss(g, s) for s in asked.sequences] for g in asked.genomes])
        steps = None if steps is None else steps - 1
    return search


def noisy(table: list[list[float]], space: SearchSpace, *, sd: float = 0.3) -> Loss:
    """Additive losses + a noise that depends on the plan and the sequence."""

    def loss(genome: Genome, sequence: int) -> float:
        exact = sum(row[c] for row, c in zip(table, space.canonical(genome), strict=True))
        return exact + Random(f"{genome}{sequence}").gauss(0, sd)

    return loss


def problem(seed: int, strategy: str) -> tuple[SearchSpace, Budget, list[list[float]]]:
    rng = Random(seed)
    space = random_space(rng, max_blocks=3)
    table = random_table(rng, space)
    low = space.min_cost
    if strategy == "uniform":
        low = min(map(space.cost, space.uniform().values()), default=space.max_cost)
    return space, Budget(rng.randint(low, space.max_cost), "random"), table


@pytest.mark.parametrize("strategy", QUICK)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_budget_is_never_exceeded_and_ties_never_broken(strategy: str, seed: int) -> None:
    space, budget, table = problem(seed, strategy)
    if strategy == "uniform" and not space.uniform():
        return
    search = Search(
        space, budget, strategy=strategy, table=table, n_sequences=8, seed=seed, **QUICK[strategy]
    )
    loss = noisy(table, space)
    while (asked := search.ask()) is not None:
        for genome in asked.genomes:
            assert budget.allows(space, genome)
            assert space.genome(space.levels(genome)) == space.canonical(genome)
        assert len(set(asked.genomes)) == len(asked.genomes)
        search.tell([[loss(g, s) for s in asked.sequences] for g in asked.genomes])
    assert budget.allows(space, search.best)


@pytest.mark.parametrize("strategy", QUICK)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_search_killed_at_any_step_resumes_to_the_identical_result(
    strategy: str, seed: int
) -> None:
    space, table = linears(8), random_table(Random(seed), linears(8))
    loss = noisy(table, space)

    def new() -> Search:
        return Search(
            space,
            Budget.parse(space, bits=3.1),
            strategy=strategy,
            table=table,
            n_sequences=8,
            seed=seed,
            **QUICK[strategy],
        )

    whole = drive(new(), loss)
    rounds = len(whole.state()["told"])
    for steps in range(rounds + 1):
        killed = drive(new(), loss, steps=steps)
        resumed = new().restore(json.loads(json.dumps(killed.state())))
        assert resumed.ask() == killed.ask()
        drive(resumed, loss)
        assert resumed.best == whole.best
        assert resumed.history == whole.history
        assert json.dumps(resumed.state()) == json.dumps(whole.state())
        assert resumed.report == whole.report


def test_the_same_seed_gives_the_same_plan_and_another_seed_other_rounds() -> None:
    space, table = linears(12), random_table(Random(3), linears(12))

    def run(seed: int) -> list[Any]:
        search = Search(space, Budget.parse(space, bits=3), n_sequences=8, seed=seed)
        seen = []
        while (asked := search.ask()) is not None:
            seen.append(asked)
            search.tell(
                [[noisy(table, space)(g, s) for s in asked.sequences] for g in asked.genomes]
            )
        return seen

    assert run(1) == run(1) != run(2)


def test_a_state_of_another_problem_is_refused() -> None:
    space = linears(4)
    state = Search(space, Budget(120, ""), n_sequences=8).state()
    with pytest.raises(ValueError, match="seed, n_sequences changed|n_sequences changed"):
        Search(space, Budget(120, ""), n_sequences=9).restore(state)
    with pytest.raises(ValueError, match="budget changed"):
        Search(space, Budget(110, ""), n_sequences=8).restore(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "evopres"}, "did you mean 'evopress'"),
        ({"generation": 3}, "did you mean 'generations'"),
        ({"tokens": (1, 2, 3)}, "two counts"),
        ({"generations": "three"}, "of the kind of 20, got 'three'"),
        ({"tokens": [1, True]}, "of the kind of"),
        ({"strategy": "evopress", "survivors": (2,)}, "one survivor count per stage"),
        ({"strategy": "evopress", "survivors": (2, 2)}, "fall to 1"),
        ({"strategy": "evopress", "group": "color"}, "size, name, none"),
        ({"strategy": "knapsack"}, "needs predicted losses"),
        ({"confidence": 2}, "confidence"),
        ({"starts": [(2, 2, 2, 2)]}, "over the budget"),
        ({"n_sequences": 0}, "needs sequences"),
        ({"table": [[1.0]]}, "losses"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    space = linears(4)
    with pytest.raises(ValueError, match=message):
        Search(space, Budget.parse(space, bits=3), **arguments)


def test_a_budget_that_no_plan_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="the smallest has 80"):
        Search(linears(4), Budget(79, "79 bits"))


def test_losses_of_the_wrong_shape_are_refused() -> None:
    search = Search(linears(4), Budget(120, ""), n_sequences=8, tokens=(2, 4))
    asked = search.ask()
    assert asked is not None
    with pytest.raises(ValueError, match="genomes"):
        search.tell([1.0])
    with pytest.raises(ValueError, match="sequences"):
        search.tell([[1.0] * 5 for _ in asked.genomes])
    assert search.ask() == asked


def test_a_collapsed_model_does_not_break_the_search() -> None:
    space = linears(4)
    search = Search(space, Budget.parse(space, bits=3), n_sequences=8)

    def loss(genome: Genome, sequence: int) -> float:
        return float("nan") if 0 in genome else 1.0

    assert 0 not in drive(search, loss).best


@pytest.mark.parametrize("strategy", ["evolve", "evopress"])
def test_every_uniform_plan_within_the_budget_competes_in_the_first_round(strategy: str) -> None:
    space = linears(6)
    search = Search(space, Budget.parse(space, bits=3.3), strategy=strategy, **QUICK[strategy])
    asked = search.ask()
    assert asked is not None
    assert {(0,) * 6, (1,) * 6} <= set(asked.genomes)


def test_a_space_with_one_plan_is_finished_at_once() -> None:
    space = linears(3, (3,))
    for strategy in ("evolve", "evopress", "uniform", "random"):
        search = drive(Search(space, Budget(90, ""), strategy=strategy), lambda g, s: 1.0)
        assert search.is_finished and search.best == (0, 0, 0)


def test_uniform_names_the_case_where_only_mixtures_fit() -> None:
    units = {"m.0.w": 10, "m.1.w": 10}
    menu = {"m.0.w": [("a", 20), ("b", 40)], "m.1.w": [("b", 40), ("c", 50)]}
    space = SearchSpace.build(units, menu)
    with pytest.raises(ValueError, match="no uniform plan fits"):
        Search(space, Budget(60, "60 bits"), strategy="uniform")


def test_a_pool_smaller_than_a_round_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    search = Search(linears(4), Budget(120, ""), n_sequences=4, seq_len=10, tokens=(40, 80))
    drive(search, lambda genome, sequence: float(sum(genome)))
    assert [r.levelname for r in caplog.records].count("WARNING") == 1
    assert "the search pool has 30" in caplog.text


def test_each_generation_is_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="hf_evopress")
    space = linears(6)
    search = drive(Search(space, Budget.parse(space, bits=3)), lambda genome, s: float(genome[0]))
    assert len(search.history) == sum("generation" in r.message for r in caplog.records)


def test_baselines_that_are_not_tried_here_are_the_knapsack_over_other_losses() -> None:
    others = set(STRATEGIES) - set(QUICK) - {"brute_force", "swap"}
    assert others == {name for name, table in TABLES.items() if table}
    assert {STRATEGIES[name][0] for name in others} == {knapsack}


def test_brute_force_finds_the_best_plan_within_the_budget() -> None:
    space = linears(3)
    rng = Random(1)
    table = random_table(rng, space)
    search = Search(space, Budget(90, "90 bits"), strategy="brute_force", n_sequences=2)
    found = drive(search, lambda genome, _: total_loss(space, table, genome)).best
    within = [genome for genome in all_genomes(space) if space.cost(genome) <= 90]
    assert search.report["plans"] == len(within)
    assert found == min(within, key=lambda genome: total_loss(space, table, genome))
    with pytest.raises(ValueError, match="up to 27 plans"):
        Search(space, Budget(90, "90 bits"), strategy="brute_force", plans=8)
