"""The whole line for every family: drops, sparsity, low rank, and all of them in one budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_evopress.base.placement import dtype_of
from hf_evopress.jobs import measure, pipeline
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.jobs.plan_search import find_plan, run_search, search_of, tables
from hf_evopress.jobs.refinement import loss
from hf_evopress.methods import compose
from hf_evopress.models.dropped import dropped_modules
from hf_evopress.models.size import stored_bytes
from hf_evopress.models.stream import BlockStream
from hf_evopress.plans.level import Level
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.scoring.fitness.task import Task

QUANT = [f"gptq:bits={b},group_size=32" for b in (2, 4)]
RESIDUAL = [f"gptq:bits=2,group_size=32 + lowrank:rank={r},factors=int8" for r in (4, 8)]
JOINT_SPARSE = ["sparsegpt:sparsity=0.5,bits=4,group_size=32"]
DROPS = {"kinds": ["attention", "mlp"], "tokens": 128}


def recipe(home: Path, **changes: Any) -> Recipe:
    counts = {"calibration": 16, "search": 12, "heldout": 2, "test": 8}
    values: dict[str, Any] = {
        "model": str(home / "dense"),
        "work": str(home / "work"),
        "data": {"sources": [str(home / "text.txt")], "seq_len": 64, **counts},
    }
    search = {"sensitivity_tokens": 256} | changes.pop("search", {})
    if search.get("strategy", "evolve") in ("evolve", "evopress"):
        search["settings"] = {"generations": 2, "tokens": [128, 256]}
    return Recipe.from_dict({**values, "search": search, **changes})


def found(home: Path, **changes: Any) -> tuple[Job, dict[str, str]]:
    job = Job(recipe(home, **changes))
    plan = find_plan(job, build_levels(job))
    return job, {unit: str(level) for unit, level in plan.items()}


def test_a_budget_of_drops_gives_a_smaller_model_that_loads(home: Path) -> None:
    compare = ["block_influence", "window", "drop_perplexity"]
    result = pipeline.compress(
        recipe(
            home,
            budget={"drop": 0.34},
            out=str(home / "shallow"),
            drop={"tokens": 128},
            search={"compare": compare},
        )
    )
    assert sorted(map(str, result.plan.levels.values())) == ["drop", "drop"]
    kinds = sorted(unit.rpartition(".")[2] for unit in result.plan)
    assert kinds == ["mlp", "self_attn"]
    rows = {row.name: row for row in result.rows}
    assert set(rows) == {"dense", *compare, "searched"}
    assert rows["searched"].bits_per_weight < 16 and rows["searched"].size_bytes < 0.9 * (
        rows["dense"].size_bytes
    )
    assert stored_bytes(result.folder) <= result.plan.budget["checkpoint_bytes_at_most"]
    assert result.plan.budget["asked"] == "drop 1 attention of 3 and 1 mlp of 3"
    loaded = AutoModelForCausalLM.from_pretrained(result.folder)
    assert len(dropped_modules(loaded)) == 2


def test_no_plan_of_a_small_space_is_better_than_brute_force(home: Path) -> None:
    same = {"budget": {"drop": 0.34}, "drop": {"tokens": 128}}
    job = Job(recipe(home, **same, search={"strategy": "brute_force"}))
    best = run_search(job, build_levels(job))
    assert best.run.report["plans"] == 9
    with pytest.raises(ValueError, match="up to 9 plans, brute_force evaluates at most 4"):
        few = {"strategy": "brute_force", "settings": {"plans": 4}}
        search_of(Job(recipe(home, **same, search=few)), build_levels(job))


@pytest.mark.parametrize(
    "strategy", ["evolve", "evopress", "uniform", "owl", "pq_index", "layer_error"]
)
def test_a_sparsity_budget_is_kept_by_every_strategy(home: Path, strategy: str) -> None:
    levels = [f"sparsegpt:sparsity={s}" for s in (0.3, 0.4, 0.5, 0.6, 0.7)]
    job, plan = found(home, budget={"sparsity": 0.5}, levels=levels, search={"strategy": strategy})
    weights = {unit.name: unit.n_weights for unit in job.units}
    zeros = sum(float(x.partition("=")[2]) * weights[unit] for unit, x in plan.items())
    assert 0.499 <= zeros / sum(weights.values()) <= 0.56  # not above 0.5 of values kept
    assert job.space.counts_values and 8 < job.space.bits_per_weight(job.genome(plan)) < 9.2


def test_low_rank_has_a_budget_of_values_too(home: Path) -> None:
    job, plan = found(home, budget={"sparsity": 0.4}, families=["lowrank"])
    assert any(level.startswith("lowrank:rank=") for level in plan.values())
    assert job.space.cost(job.genome(plan)) <= 0.6 * job.space.n_weights


def test_one_budget_is_spent_across_all_families(home: Path) -> None:
    levels = [*QUANT, *RESIDUAL, *JOINT_SPARSE]
    common = {"budget": {"bits": 3.2}, "levels": levels}
    job, plan = found(home, **common, drop=DROPS, work=str(home / "joint"))
    assert job.space.bits_per_weight(job.genome(plan)) <= 3.2
    for sub in [unit for unit, level in plan.items() if level == "drop"]:
        assert not any(unit.startswith(f"{sub}.") for unit in plan)
    assert "dense" not in plan.values()  # sub-blocks that are kept are no units of a plan
    assert job.levels(job.genome(plan)).keys() == plan.keys()


def test_a_smaller_menu_is_served_from_the_same_store(home: Path) -> None:
    everything = {"budget": {"bits": 4}, "levels": [*QUANT, *RESIDUAL, *JOINT_SPARSE]}
    work = str(home / "joint")
    rtn = [f"rtn:bits={bits},group_size=32" for bits in (3, 4)]
    stores = [
        build_levels(Job(recipe(home, **{**everything, "levels": levels}, work=work)))
        for levels in (everything["levels"], QUANT, rtn, rtn[:1])
    ]
    assert stores[0].folder == stores[1].folder != stores[2].folder == stores[3].folder


def test_another_menu_makes_only_the_levels_that_the_store_lacks(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    menu = [f"rtn:bits={bits},group_size=32" for bits in (2, 3, 4)]
    more: dict[str, Any] = {"levels": menu[:2], "budget": {"bits": 4}, "ends": "dense"}
    more["work"] = str(home / "menus.work")
    build_levels(Job(recipe(home, **more)))
    asked: set[str] = set()
    make = compose.compress_many

    def watched(levels: Any, *given: Any) -> Any:
        asked.update(map(str, levels))
        return make(levels, *given)

    monkeypatch.setattr(compose, "compress_many", watched)
    job = Job(recipe(home, **{**more, "levels": menu[1:]}))
    store = build_levels(job)
    assert asked == {menu[2]}
    assert all([*map(str, store.levels(u.name))] == menu[1:] for u in job.units)


def test_plans_are_compared_in_bfloat16_and_the_model_is_whole_again(home: Path) -> None:
    asked = {"budget": {"bits": 3}, "levels": QUANT}
    losses = {}
    for dtype in ("float32", "bfloat16"):
        job = Job(recipe(home, **asked, search={"dtype": dtype}))
        before = {name: tensor.clone() for name, tensor in job.model.named_buffers()}
        before |= {name: tensor.clone() for name, tensor in job.model.named_parameters()}
        store = build_levels(job)
        run_search(job, store)
        with job.computing_in(job.search_dtype):
            assert dtype_of(job.model) == getattr(torch, dtype)
            with BlockStream(job.model).whole() as model:
                assert model.model.layers[0].mlp.up_proj.weight.dtype == getattr(torch, dtype)
                assert model.model.rotary_emb.inv_freq.dtype == torch.float32  # as it is loaded
            linears = [unit.name for unit in store.units.values() if not unit.is_end]
            losses[dtype] = loss(job, store, dict.fromkeys(linears, Level.parse(QUANT[0])))
        after = {**dict(job.model.named_buffers()), **dict(job.model.named_parameters())}
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert losses["float32"] != losses["bfloat16"]
    assert losses["float32"] == pytest.approx(losses["bfloat16"], rel=0.2)


def test_the_uniform_plan_to_compare_with_is_the_best_not_the_dearest(home: Path) -> None:
    levels = ["gptq:bits=3,group_size=32", "lowrank:rank=7,factors=int8"]  # 3.59, 3.9 bits and more
    job = Job(recipe(home, budget={"bits": 6}, levels=levels, work=str(home / "uniform.work")))
    found = measure.best_uniform(job, build_levels(job))
    assert found is not None and found[0] == f"uniform {levels[0]}"
    unmeasured = {"sensitivity_tokens": 0, "strategy": "evopress"}
    work = str(home / "unmeasured.work")
    job = Job(recipe(home, budget={"bits": 6}, levels=levels, search=unmeasured, work=work))
    dearest = measure.best_uniform(job, build_levels(job))
    costs = {level: job.space.cost(genome) for level, genome in job.space.uniform().items()}
    assert dearest is not None and dearest[0] == f"uniform {max(costs, key=costs.__getitem__)}"


def test_bfloat16_is_refused_where_weights_are_not_exact_in_it(home: Path) -> None:
    asked = {"budget": {"bits": 3}, "levels": QUANT, "search": {"dtype": "bfloat16"}}
    with pytest.raises(ValueError, match="search.dtype is bfloat16, and the model ships in .*16"):
        Job(recipe(home, **asked, dtype="float16"))
    assert Job(recipe(home, **asked)).search_dtype == torch.bfloat16


def test_a_cheap_sub_block_is_dropped_before_all_others_are_starved(home: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(home / "dense")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()  # does nothing: free to drop
    model.save_pretrained(home / "idle")
    for file in (home / "dense").glob("tokenizer*"):
        (home / "idle" / file.name).write_bytes(file.read_bytes())
    same: dict[str, Any] = {"model": str(home / "idle"), "work": str(home / "idle.work")}
    _, plan = found(home, **same, budget={"bits": 3}, levels=QUANT, drop=DROPS)
    assert plan["model.layers.1.mlp"] == "drop"
    kept = {**DROPS, "keep_first": 2}
    space = Job(recipe(home, budget={"bits": 3}, drop=kept)).space
    assert "model.layers.1.mlp" not in {unit for gene in space.genes for unit in gene.units}


def test_constraints_reach_sub_blocks(home: Path) -> None:
    def space(**rules: Any) -> Any:
        return Job(recipe(home, budget={"bits": 3}, levels=QUANT, drop=DROPS, **rules)).space

    def options(made: Any, unit: str) -> list[str]:
        gene = next(gene for gene in made.genes if unit in gene.units)
        return [option.level for option in gene.options]

    first = "model.layers.0.self_attn"
    assert options(space(pin={"re:.*[.]0[.]self_attn": "dense"}), first) == ["dense"]
    assert options(space(pin={"*.0.*": "drop"}), first) == ["drop"]
    assert options(space(forbid={"*": "drop"}), first) == ["dense"]
    made = space(forbid={"*": "gptq:bits=2*"})
    assert options(made, first) == ["drop", "dense"]
    assert options(made, f"{first}.q_proj") == QUANT[1:]
    tied = space(tie=[["self_attn", "mlp"]])
    assert ("model.layers.0.self_attn", "model.layers.0.mlp") in [g.units for g in tied.genes]


def test_no_more_sub_blocks_go_than_allowed(home: Path) -> None:
    drop = {**DROPS, "max": 0.34}
    job, plan = found(home, budget={"bits": 2.0}, levels=QUANT, drop=drop)
    dropped = [unit for unit, level in plan.items() if level == "drop"]
    assert 1 <= len(dropped) <= 2 and job.space.keeps_counts(job.genome(plan))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"budget": {"sparsity": 0.5}, "families": ["quant"]}, "removes no weights"),
        ({"budget": {"sparsity": 0.5}, "levels": QUANT}, "the menu removes no more"),
        ({"budget": {"drop": 0.3}, "levels": QUANT}, "keeps all that is not dropped dense"),
        ({"budget": {"drop": 0.3}}, "0.3 of 3 attention sub-blocks is none"),
        ({"budget": {"drop": 0.5, "bits": 3}}, "say the budget in one way"),
        ({"budget": {"bits": 3}, "families": ["quants"]}, "did you mean 'quant'"),
        ({"budget": {"bits": 3}, "families": ["quant"], "levels": QUANT}, "not both"),
        ({"budget": {"bits": 3}, "drop": {"kinds": ["atention"]}}, "did you mean 'attention'"),
        ({"budget": {"bits": 0.5}, "levels": QUANT, "drop": DROPS | {"max": 0.4}}, "smallest"),
        ({"budget": {"drop": 0.34}, "drop": {"keep_first": 3}}, "no sub-block"),
        ({"budget": {"bits": 3}, "pin": {"*.mlp": "drop"}}, "matches none"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_reason(
    home: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        Job(recipe(home, **changes))


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        ("owl", "needs --sparsity"),
        ("pq_index", "needs --sparsity"),
        ("window", "budget of drops"),
        ("block_influence", "budget of"),
    ],
)
def test_a_baseline_of_another_task_is_refused(home: Path, strategy: str, reason: str) -> None:
    job = Job(recipe(home, budget={"bits": 3}, levels=QUANT))
    with pytest.raises(ValueError, match=reason):
        search_of(job, build_levels(job), strategy)


def test_single_drops_are_measured_by_a_cost_of_the_users_own(home: Path) -> None:
    asked = recipe(home, budget={"drop": 0.34}, drop={"tokens": 128})
    sevens = Job(asked, fitness=Task(lambda dense, compressed, labels: 7.0))
    table = tables(sevens).of("evolve", build_levels(sevens))
    assert table == [[7.0, 0.0]] * 6


def test_single_drops_are_measured_once(home: Path) -> None:
    same: dict[str, Any] = {"budget": {"drop": 0.34}, "drop": {"tokens": 128}}
    same["work"] = str(home / "single")
    job = Job(recipe(home, **same))
    table = tables(job).of("evolve", build_levels(job))
    (path,) = (home / "single" / "scores").glob("drops-*.json")
    kept = json.loads(path.read_text())
    assert len(kept) == 6 and min(kept.values()) > 0
    path.write_text(json.dumps(dict.fromkeys(kept, 7.0)))
    again = Job(recipe(home, **same))
    assert table != tables(again).of("evolve", build_levels(again)) == [[7.0, 0.0]] * 6


def test_joint_two_of_four_and_int4_reloads_generates_and_takes_what_the_plan_says(
    home: Path,
) -> None:
    level = "sparsegpt:pattern=2:4,bits=4,group_size=32"
    same: dict[str, Any] = {"levels": [level], "ends": "dense", "out": str(home / "joint24")}
    result = pipeline.compress(recipe(home, budget={"ratio": 1.0}, **same))
    # 2 codes of 4 bits and 3 bits of places for 4 weights; scale and zero point for 32
    bits = result.plan.budget["bits_per_weight"]
    assert bits == pytest.approx(2.75 + 20 / 32, abs=1e-3)
    others = 16 * sum(
        p.numel()
        for name, p in AutoModelForCausalLM.from_pretrained(home / "dense").named_parameters()
        if name.removesuffix(".weight") not in result.plan
    )
    n_weights = sum(rows * columns for rows, columns in result.plan.shapes.values())
    declared = (bits * n_weights + others) / 8
    header = 150 * 21 * 6
    assert declared <= stored_bytes(result.folder) <= declared + header
    assert len(result.sample) > len(measure.PROMPT)


def test_the_command_line_says_drops_and_families(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_evopress.cli import main

    common = ["--data", str(home / "text.txt"), "--seq-len", "64", "--calibration", "16"]
    common += ["--search-pool", "12", "--work", str(home / "cli.work")]
    out = str(home / "cli")
    budget = ["--drop-ratio", "0.34", "--strategy", "block_influence", "--compare", "window"]
    with pytest.raises(SystemExit) as stopped:
        main(["compress", str(home / "dense"), "--out", out, *budget, *common])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and "window" in said and "searched" in said, said
    with pytest.raises(SystemExit) as stopped:
        main(["compress", str(home / "dense"), "--out", out, "--keep-first", "1", *common])
    assert stopped.value.code == 2
