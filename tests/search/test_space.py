from __future__ import annotations

import json
from random import Random

import pytest

from hf_evopress.search.budget import Budget
from hf_evopress.search.space import SearchSpace

from ..spaces import random_space, random_table

UNITS = {f"model.layers.{i}.mlp.{n}": 100 for i in range(2) for n in ("gate", "up", "down")}
MENU = {unit: [("rtn:bits=4", 400), ("rtn:bits=2", 200), ("rtn:bits=3", 300)] for unit in UNITS}
GATE, UP, DOWN = (f"model.layers.0.mlp.{n}" for n in ("gate", "up", "down"))


def make(**rules: object) -> SearchSpace:
    return SearchSpace.build(UNITS, MENU, fixed_bits=800, **rules)  # type: ignore[arg-type]


def droppable() -> SearchSpace:
    """Two blocks whose mlp can be dropped whole, with three linears inside each."""
    subs = {f"model.layers.{i}.mlp": 0 for i in range(2)}
    menu = {**MENU, **{sub: [("dense", 0), ("drop", 0)] for sub in subs}}
    inside = {unit: unit.rpartition(".")[0] for unit in UNITS}
    return SearchSpace.build({**subs, **UNITS}, menu, inside=inside)


def test_options_are_sorted_by_cost() -> None:
    assert [o.cost_bits for o in make().genes[0].options] == [200, 300, 400]


def test_cost_is_the_sum_of_the_chosen_options() -> None:
    space = make()
    assert space.cost((0, 0, 0, 0, 0, 2)) == 5 * 200 + 400
    assert space.bits_per_weight((0,) * 6) == 2.0
    assert space.size_bytes((0,) * 6) == (800 + 1200) // 8


def test_levels_and_genome_are_inverse() -> None:
    space = make(ties=[[GATE, UP]])
    genome = (2, 1, 0, 1, 2)
    assert space.genome(space.levels(genome)) == genome


def test_tied_units_share_a_gene_that_costs_their_sum() -> None:
    space = make(ties=[[UP, GATE]])
    assert space.genes[0].units == (GATE, UP)
    assert space.genes[0].options[0].cost_bits == 400
    with pytest.raises(ValueError, match="share a level"):
        space.genome({**space.levels((0,) * 5), UP: "rtn:bits=4"})


def test_ties_keep_only_levels_that_all_units_offer() -> None:
    menu = {**MENU, UP: [("rtn:bits=3", 300)]}
    space = SearchSpace.build(UNITS, menu, ties=[[GATE, UP]])
    assert [o.level for o in space.genes[0].options] == ["rtn:bits=3"]


def test_pins_and_forbidden_levels_leave_the_rest() -> None:
    space = make(pins={"*.down": "rtn:bits=4"}, forbid={"*.up": ["*bits=2", "*bits=3*"]})
    assert [[o.level for o in g.options] for g in space.genes[:3]] == [
        ["rtn:bits=2", "rtn:bits=3", "rtn:bits=4"],
        ["rtn:bits=4"],
        ["rtn:bits=4"],
    ]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"pins": {"*.dwn": "rtn:bits=4"}}, "matches no unit"),
        ({"pins": {"*.down": "rtn:bits=5"}}, "did you mean 'rtn:bits=4'|'rtn:bits=3'|bits=2"),
        ({"forbid": {"*": "rtn*"}}, "no level left"),
        ({"ties": [[GATE, UP], [UP, DOWN]]}, "tied twice"),
        ({"ties": [[GATE, GATE + "s"]]}, "did you mean"),
        ({"inside": {GATE: "nowhere"}}, "is no unit"),
    ],
)
def test_wrong_rules_are_refused(rules: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**rules)


def test_a_tie_without_a_common_level_is_refused() -> None:
    menu = {**MENU, UP: [("dense", 1600)]}
    with pytest.raises(ValueError, match="offered by all"):
        SearchSpace.build(UNITS, menu, ties=[[GATE, UP]])


def test_the_block_is_read_from_the_name_or_given() -> None:
    assert [g.block for g in make().genes] == [0, 0, 0, 1, 1, 1]
    assert {g.block for g in make(blocks=dict.fromkeys(UNITS, 7)).genes} == {7}


def test_a_dropped_sub_block_frees_the_units_inside() -> None:
    space = droppable()
    kept, dropped = (1, 1, *(2,) * 6), (0, 1, *(2,) * 6)
    assert (space.cost(kept), space.cost(dropped)) == (2400, 1200)
    assert (space.min_cost, space.max_cost) == (0, 2400)
    levels = space.levels(dropped)
    assert levels["model.layers.0.mlp"] == "drop" and GATE not in levels
    assert space.genome(levels) == space.canonical(dropped) == (0, 1, 0, 0, 0, 2, 2, 2)


def test_a_change_of_one_gene_is_the_difference_of_the_sums() -> None:
    for seed in range(200):
        rng = Random(seed)
        space = random_space(rng)
        table = random_table(rng, space)
        old = [rng.randrange(len(gene.options)) for gene in space.genes]
        i = rng.randrange(len(old))
        new = old.copy()
        new[i] = rng.randrange(len(space.genes[i].options))
        before, after = tuple(old), tuple(new)
        assert space.change(space.costs, before, i, new[i]) == space.cost(after) - space.cost(
            before
        )
        difference = sum(space.values(table, after)) - sum(space.values(table, before))
        assert space.change(table, before, i, new[i]) == pytest.approx(difference)


def test_uniform_plans_keep_sub_blocks() -> None:
    space = droppable()
    assert space.uniform()["rtn:bits=3"] == (1, 1, 1, 1, 1, 1, 1, 1)


def test_a_unit_without_the_uniform_level_takes_one_of_no_more_bits() -> None:
    menu = {**MENU, DOWN: [("dense", 1600), ("rtn:bits=2,g", 250), ("rtn:bits=1", 100)]}
    plans = SearchSpace.build(UNITS, menu).uniform()
    assert sorted(plans) == ["rtn:bits=2", "rtn:bits=3", "rtn:bits=4"]
    assert [plan[2] for plan in plans.values()].count(1) == 2
    assert plans["rtn:bits=2"][2] == 0


def test_a_budget_says_the_same_in_three_ways() -> None:
    space = make()
    bits = Budget.parse(space, bits=3.3)
    assert bits.limit == 1980
    assert Budget.parse(space, size=(1980 + 800) // 8).limit == 2780 // 8 * 8 - 800
    assert Budget.parse(space, ratio=0.25).limit == (800 + 9600) // 4 - 800
    assert bits.allows(space, (1,) * 6) and not bits.allows(space, (2,) * 6)


def test_decimal_budgets_are_exact() -> None:
    units = {"a.0.w": 1000}
    space = SearchSpace.build(units, {"a.0.w": [("x", 2300), ("y", 16000)]})
    assert Budget.parse(space, bits=2.3).limit == 2300  # 2.3 * 1000 == 2299.99... in floats


@pytest.mark.parametrize(
    ("given", "least"),
    [({"bits": 1.9}, {"bits": "2"}), ({"size": "100B"}, {"size": "250B"}),
     ({"ratio": 0.1}, {"ratio": "0.1924"})],
)  # fmt: skip
def test_an_impossible_budget_names_the_smallest_in_the_same_unit_and_that_one_works(
    given: dict[str, str], least: dict[str, str]
) -> None:
    space = make()
    (value,) = least.values()
    with pytest.raises(ValueError, match=f"smallest possible is (ratio )?{value}"):
        Budget.parse(space, **given)  # type: ignore[arg-type]
    assert Budget.parse(space, **least).allows(space, space.cheapest)  # type: ignore[arg-type]


def test_a_budget_above_the_largest_plan_is_cut_with_a_note() -> None:
    budget = Budget.parse(make(), bits=9)
    assert budget.limit == 2400 and "largest" in budget.note


@pytest.mark.parametrize(
    "given", [{}, {"bits": 3, "ratio": 0.2}, {"bits": 0}, {"bits": "many"}, {"size": "3 apples"}]
)
def test_a_budget_is_said_in_exactly_one_sound_way(given: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        Budget.parse(make(), **given)  # type: ignore[arg-type]


def test_space_and_budget_survive_json() -> None:
    space = droppable()
    copy = SearchSpace.from_json(json.loads(json.dumps(space.to_json())))
    assert copy == space and copy.fingerprint == space.fingerprint
    budget = Budget.parse(space, bits=2.5)
    assert Budget.from_json(json.loads(json.dumps(budget.to_json()))) == budget


def test_nested_droppable_sub_blocks_are_refused() -> None:
    units = {"b.0": 0, "b.0.mlp": 0, "b.0.mlp.up": 10}
    menu = {"b.0": [("drop", 0)], "b.0.mlp": [("drop", 0)], "b.0.mlp.up": [("x", 1)]}
    with pytest.raises(ValueError, match="only one of the two"):
        SearchSpace.build(units, menu, inside={"b.0.mlp": "b.0", "b.0.mlp.up": "b.0.mlp"})


def test_a_space_of_values_budgets_those_and_still_knows_its_bits() -> None:
    menu = {"l.0": [("a", 100, 5), ("b", 170, 10)], "l.1": [("a", 100, 5), ("b", 170, 10)]}
    space = SearchSpace.build({"l.0": 10, "l.1": 10}, menu)
    budget = Budget.parse(space, sparsity=0.25)
    assert budget.limit == 15 and budget.allows(space, (0, 1)) and not budget.allows(space, (1, 1))
    assert space.cost((0, 1)) == 15 and space.bits_per_weight((0, 1)) == 270 / 20
    assert SearchSpace.from_json(space.to_json()) == space
    with pytest.raises(ValueError, match="sparsity 0.5: the menu removes no more"):
        Budget.parse(space, sparsity=0.6)
    with pytest.raises(ValueError, match="counts values kept"):
        Budget.parse(space, bits=3)


def test_options_must_agree_on_what_is_counted() -> None:
    with pytest.raises(ValueError, match="do not say their values"):
        SearchSpace.build({"l.0": 10}, {"l.0": [("a", 100, 5), ("b", 170)]})
