"""compress --for: what a target is offered, what it refuses, and where it is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_evopress.export.compressed_tensors import check_plan
from hf_evopress.export.exl3 import check_plan as check_exl3
from hf_evopress.export.vllm_limits import vllm_obstacles
from hf_evopress.jobs.for_target import for_this_machine
from hf_evopress.jobs.pipeline import compress
from hf_evopress.jobs.problem import Problem, pose
from hf_evopress.plans.plan import Plan
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.recipes.targets import EXPORTS

from ..conftest import make_tiny_model

BITS = {"bits": 6.0}


def recipe(**more: Any) -> Recipe:
    return Recipe.from_dict({"model": "m", "budget": BITS, **more})


def posed(**more: Any) -> Problem:
    return pose(make_tiny_model("llama"), recipe(**more))


def methods(problem: Problem) -> set[str]:
    ends = {unit.name for unit in problem.ends.units}
    menus = [menu for unit, menu in problem.menus.items() if unit not in ends]
    return {term.method for menu in menus for level in menu for term in level.terms}


def test_the_default_menu_is_that_of_a_cpu() -> None:
    assert posed().menus == posed(**{"for": "cpu"}).menus
    assert posed().space == posed(**{"for": "cpu"}).space


@pytest.mark.parametrize(
    "target, wanted",
    [
        ("cpu", {"gptq"}),
        ("gpu", {"gptq", "trellis"}),
        ("vllm", {"gptq"}),
        ("transformers", {"gptq", "trellis", "sparsegpt", "lowrank"}),
    ],
)
def test_a_target_is_offered_what_it_runs(target: str, wanted: set[str]) -> None:
    assert methods(posed(**{"for": target})) == wanted


def trellis_rates(problem: Problem) -> list[float]:
    terms = [level.terms[0] for level in problem.menus["model.layers.0.mlp.up_proj"]]
    return [t.kwargs["bits"] for t in terms if t.method == "trellis"]


def test_all_budgets_of_a_range_are_served_and_those_that_a_cache_leaves() -> None:
    front = {"strategy": "pareto", "settings": {"low": 2.0}}
    rates = trellis_rates(posed(**{"for": "gpu"}, search=front))
    assert rates[:3] == [1, 1.5, 2] and rates[-1] == 8
    assert trellis_rates(posed(**{"for": "gpu"}, search={"strategy": "pareto"})) == rates
    size = trellis_rates(posed(**{"for": "gpu"}, budget={"size": "300kB"}))
    shared = trellis_rates(posed(**{"for": "gpu"}, budget={"size": "300kB", "context": 64}))
    assert shared[0] == 1 < size[0] and shared[-1] == size[-1]
    every = posed(**{"for": "gpu"}, budget={"ratio": 1.0})  # of `levels`
    assert trellis_rates(every) == [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6]
    assert not every.budget.note


def test_levels_and_families_that_are_given_are_taken_instead() -> None:
    levels = ["rtn:bits=4,group_size=32", "rtn:bits=8,group_size=32"]
    assert methods(posed(**{"for": "gpu"}, levels=levels)) == {"rtn"}
    assert methods(posed(**{"for": "gpu"}, families=["sparse"])) == {"sparsegpt"}


def test_what_is_for_vllm_has_no_obstacle_there() -> None:
    model = make_tiny_model("llama", hidden_size=64)
    problem = pose(model, recipe(**{"for": "vllm"}))
    shapes = {unit.name: unit.shape for unit in problem.units}
    assert not problem.ends.units, "embedding and head stay dense"
    for n in range(4):  # the least of all menus
        plan = Plan({unit: menu[n] for unit, menu in problem.menus.items()}, shapes)
        check_plan(model, plan)
        assert all("CPU takes 4 bits only" in said for said in vllm_obstacles(plan))
    groups = [set(gene.units) for gene in problem.space.genes if len(gene.units) > 1]
    start = "model.layers.0."
    assert {f"{start}self_attn.{x}_proj" for x in "qkv"} in groups
    assert {f"{start}mlp.{x}_proj" for x in ("gate", "up")} in groups


def test_what_is_for_exl3_has_a_place_there() -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_key_value_heads": 4}
    model = make_tiny_model("llama", **sizes, tie_word_embeddings=False)
    problem = pose(model, recipe(**{"for": "exl3"}, ends="budget", budget={"bits": 11.0}))
    shapes = {unit.name: unit.shape for unit in problem.units}
    assert [unit.name for unit in problem.ends.units] == ["lm_head"]
    for unit, menu in problem.menus.items():
        bits = [level.terms[0].kwargs.get("bits") for level in menu]
        assert bits == ([2, 3, 4, 5, 6, 8] if "mlp" not in unit else [None]), "or dense"
    for n in range(6):
        levels = {unit: menu[min(n, len(menu) - 1)] for unit, menu in problem.menus.items()}
        check_exl3(model, Plan(levels, shapes))


@pytest.mark.parametrize(
    "more, reason",
    [
        ({"levels": ["trellis:bits=4"]}, "q_proj: exllamav3 does not read .*order=rows where it"),
        ({"families": ["trellis"]}, "exl3 has its own levels; leave families"),
        ({"drop": {"kinds": ["mlp"]}}, "for exl3 holds every weight and every sub-block"),
        ({"ends": "rtn:bits=8,group_size=32"}, "lm_head: exllamav3 does not read"),
    ],
)
def test_what_exllamav3_does_not_take_is_refused(more: dict[str, Any], reason: str) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4}
    with pytest.raises(ValueError, match=reason):
        pose(make_tiny_model("llama", **sizes), recipe(**{"for": "exl3"}, **more))


@pytest.mark.parametrize(
    "more, reason",
    [
        ({"levels": ["rtn:bits=3,group_size=32"]}, "'rtn:bits=3.*which vLLM does not read"),
        ({"levels": ["trellis:bits=4"]}, "'trellis:bits=4', which vLLM does not read"),
        ({"ends": "budget"}, "embedding and head stay dense for vllm, got ends='budget'"),
        ({"drop": {"kinds": ["mlp"]}}, "for vllm holds every weight and every sub-block"),
        ({"families": ["sparse"]}, "vllm has its own levels; leave families"),
    ],
)
def test_what_vllm_does_not_take_is_refused(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        posed(**{"for": "vllm"}, **more)


def test_an_unknown_target_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown export \(--for\) 'vlm', did you mean 'vllm'"):
        recipe(**{"for": "vlm"})
    with pytest.raises(ValueError, match="for or export, which mean the same, not both"):
        recipe(**{"for": "cpu", "export": "cpu"})
    assert {recipe(**{"for": name}).export for name in EXPORTS} == set(EXPORTS)


def test_the_default_is_what_the_machine_is() -> None:
    open_, cpu, card = recipe(), torch.device("cpu"), torch.device("cuda:0")
    assert for_this_machine(open_, cpu).export == "cpu"
    assert for_this_machine(open_, torch.device("mps:0")) == open_
    assert for_this_machine(open_, card).export == "gpu"
    said = [recipe(**{"for": "cpu"}), recipe(levels=["dense"]), recipe(families=["quant"])]
    assert [for_this_machine(one, card) for one in said] == said
    sparse = for_this_machine(recipe(budget={"sparsity": 0.5}), card)
    assert sparse.offered_families == ()


def test_plans_and_recipes_record_it(home: Path, tmp_path: Path) -> None:
    data = {"sources": [str(home / "text.txt")], "seq_len": 64, "calibration": 4}
    rest = {"search": 2, "heldout": 1, "test": 2}
    made = recipe(
        **{"for": "vllm"},
        model=str(home / "dense"),
        out=str(tmp_path / "small"),
        data={**data, **rest},
        search={"strategy": "knapsack", "sensitivity_tokens": 128},
    )
    result = compress(made)
    assert result.plan.search["for"] == "vllm"
    assert Recipe.load(result.folder / "evopress_recipe.yaml").export == "vllm"
    assert "levels for: vllm" in result.plan.summary()
    card = (result.folder / "README.md").read_text()
    assert "from the levels for `vllm`. It is an ordinary" in " ".join(card.split())
