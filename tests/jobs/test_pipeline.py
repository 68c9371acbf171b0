"""The whole line on a tiny trained model: what was scored is what is shipped, and it resumes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_evopress
from hf_evopress.jobs import pipeline, plan_search
from hf_evopress.jobs.apply import apply_plan
from hf_evopress.jobs.evaluate import evaluate_model
from hf_evopress.jobs.follow_up import check_follow_up
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.jobs.plan_search import find_plan
from hf_evopress.models.size import stored_bytes
from hf_evopress.plans.plan import Plan
from hf_evopress.recipes.recipe import Recipe

from ..hub_server import Hub


def recipe(home: Path, out: str, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": str(home / "dense"),
        "out": str(home / out),
        "work": str(home / "work"),
        "budget": {"bits": 3.6},
        "levels": [f"gptq:bits={b},group_size=32" for b in (2, 3, 4, 5)],
        "data": {
            "sources": [str(home / "text.txt")],
            "seq_len": 64,
            "calibration": 24,
            "search": 24,
            "heldout": 4,
            "test": 16,
        },
        "search": {
            "sensitivity_tokens": 512,
            "settings": {"generations": 2, "tokens": [256, 512]},
        },
    }
    return Recipe.from_dict({**values, **changes})


@pytest.fixture(scope="module")
def result(home: Path) -> pipeline.Result:
    return pipeline.compress(recipe(home, "out"))


def test_the_plan_keeps_its_budget_and_uses_it(result: pipeline.Result) -> None:
    assert 3.5 < result.plan.budget["bits_per_weight"] <= 3.6
    searched = next(row for row in result.rows if row.name == "searched")
    assert searched.bits_per_weight == pytest.approx(
        result.plan.budget["bits_per_weight"], rel=1e-5
    )


def test_the_checkpoint_is_no_larger_than_declared(result: pipeline.Result) -> None:
    declared = result.plan.budget["checkpoint_bytes_at_most"]
    assert 0.9 * declared < stored_bytes(result.folder) <= declared


def test_the_reloaded_model_gives_the_logits_that_were_scored(
    home: Path, result: pipeline.Result
) -> None:
    job = Job(recipe(home, "out"))
    evaluator = job.evaluator(build_levels(job))
    loaded = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32).eval()
    ids = job.tokens["search"][:3]
    with torch.no_grad():
        assert torch.equal(evaluator.logits(result.plan.levels, ids), loaded(ids).logits)


def test_a_fresh_process_loads_the_folder_by_the_ordinary_call(result: pipeline.Result) -> None:
    code = (
        "import hf_evopress, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(result.folder)!r})\n"
        f"t = AutoTokenizer.from_pretrained({str(result.folder)!r})\n"
        "print(type(m.model.layers[0].mlp.up_proj).__name__, len(t('the red').input_ids))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["CompressedLinear", "7"], run.stderr


def test_the_folder_holds_plan_recipe_and_figures(result: pipeline.Result) -> None:
    plan = Plan.load(result.folder)
    assert plan == result.plan and set(plan.results["evaluation"]) >= {"dense", "searched"}
    assert Recipe.load(result.folder / "evopress_recipe.yaml").budget.bits == 3.6
    assert plan.search["strategy"] == "evolve" and plan.search["evaluated_tokens"] > 0


def test_the_same_recipe_gives_the_same_plan_byte_for_byte(
    home: Path, result: pipeline.Result
) -> None:
    again = pipeline.compress(recipe(home, "again", work=str(home / "work2")))
    assert again.plan.levels == result.plan.levels
    assert (again.folder / "model.safetensors").read_bytes() == (
        result.folder / "model.safetensors"
    ).read_bytes()


def test_a_search_that_is_stopped_goes_on_to_the_same_plan(
    home: Path, result: pipeline.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = recipe(home, "x", budget={"bits": 3.1})
    job = Job(changed)
    store = build_levels(job)
    rounds = []
    keep = plan_search.keep

    def stop_after_two(job: Job, search: Any) -> None:
        keep(job, search)
        rounds.append(1)
        if len(rounds) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(plan_search, "keep", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            find_plan(job, store)
    resumed = find_plan(Job(changed), store)
    straight = find_plan(Job(recipe(home, "x", budget={"bits": 3.1})), store)
    assert resumed == straight


def test_another_budget_reuses_statistics_and_levels(
    home: Path, result: pipeline.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("levels were made again")

    monkeypatch.setattr("hf_evopress.methods.compose.compress_many", never)
    job = Job(recipe(home, "other", budget={"bits": 4.0}))
    assert find_plan(job, build_levels(job)).budget["bits_per_weight"] <= 4.0


def test_every_strategy_makes_a_plan_within_the_budget(home: Path, result: pipeline.Result) -> None:
    for strategy in ("evopress", "knapsack", "uniform", "random"):
        search = {"strategy": strategy, "sensitivity_tokens": 512}
        job = Job(recipe(home, "x", search=search, budget={"bits": 3.8}))
        assert find_plan(job, build_levels(job)).budget["bits_per_weight"] <= 3.8


def test_ties_and_pins_hold_in_the_plan(home: Path, result: pipeline.Result) -> None:
    changed = recipe(
        home,
        "x",
        work=str(home / "work3"),
        tie=[["q_proj", "k_proj", "v_proj"]],
        pin={"*.0.mlp.down_proj": "gptq:bits=8,group_size=32"},
        search={"strategy": "knapsack", "sensitivity_tokens": 512},
    )
    job = Job(changed)
    plan = find_plan(job, build_levels(job))
    for block in range(3):
        levels = {plan[f"model.layers.{block}.self_attn.{x}_proj"] for x in "qkv"}
        assert len(levels) == 1
    assert str(plan["model.layers.0.mlp.down_proj"]) == "gptq:bits=8,group_size=32"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": {"bits": 1.5}}, "smallest possible is 2.56"),
        ({"budget": {"size": "1kB"}}, "smallest possible is"),
        ({"levels": ["gptq:bits=3,group_size=48"]}, "group sizes that do: 32"),
        ({"levels": ["gptq:bits=9,group_size=32"]}, "bits from 2, 3, 4, 5, 6, 7, 8; got bits=9"),
        ({"levels": ["gtpq:bits=3,group_size=32"]}, "did you mean 'gptq'"),
        ({"skip": ["*"]}, "leaves none of the"),
        ({"tie": [["q_proj", "kproj"]]}, "tie names 'kproj'"),
        ({"pin": {"*.nope": "dense"}}, "matches none"),
    ],
)
def test_bad_recipes_fail_before_any_weight_is_loaded(
    home: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(Job, "load_model", lambda self: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match=words):
        Job(recipe(home, "bad", **changes))


def test_a_compressed_model_is_refused_as_a_start(home: Path, result: pipeline.Result) -> None:
    with pytest.raises(ValueError, match=r"already compressed \(evopress\)"):
        Job(recipe(home, "bad", model=str(result.folder)))


def test_a_folder_with_other_files_is_not_replaced(home: Path) -> None:
    (home / "mine").mkdir()
    (home / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="thesis.txt.*--overwrite"):
        pipeline.compress(recipe(home, "mine"))
    assert (home / "mine" / "thesis.txt").read_text() == "precious"


def test_a_text_that_is_too_short_says_how_much_is_needed(home: Path) -> None:
    (home / "short.txt").write_text("too short")
    data = {"sources": [str(home / "short.txt")], "seq_len": 64}
    with pytest.raises(ValueError, match="token"):
        pipeline.compress(recipe(home, "short", data=data))


def test_a_plan_is_applied_without_a_search(home: Path, result: pipeline.Result) -> None:
    result.plan.save(home / "plan.json")
    folder = apply_plan(
        str(home / "plan.json"), home / "applied", data=[str(home / "text.txt")],
        n_sequences=24, seq_len=64,
    )  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert str(loaded.model.layers[0].mlp.up_proj.level) == str(
        result.plan["model.layers.0.mlp.up_proj"]
    )
    assert len(AutoTokenizer.from_pretrained(folder)) == 256


def test_a_model_of_the_hub_is_recorded_and_applied_by_its_commit(hub: Hub, home: Path) -> None:
    files = {path.name: path.read_bytes() for path in (home / "dense").iterdir()}
    first = hub.put("me/dense", files)
    made = pipeline.compress(
        recipe(
            home, "hub", model="me/dense", work=str(home / "hub.work"), budget={"bits": 5},
            levels=["rtn:bits=4,group_size=32,clip=false"],
            search={"strategy": "uniform", "sensitivity_tokens": 0},
        )
    )  # fmt: skip
    assert made.plan.revision == first
    assert Recipe.load(made.folder / "evopress_recipe.yaml").revision == first
    assert f"revision: {first}" in (made.folder / "README.md").read_text()
    other = {name: data for name, data in files.items() if name != "model.safetensors"}
    hub.put("me/dense", {**other, "model.safetensors": b"another model"})
    again = apply_plan(str(made.folder), home / "hub2")
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (made.folder / weights).read_bytes()


def test_evaluate_measures_the_folder_against_the_dense_model(
    home: Path, result: pipeline.Result
) -> None:
    measured = evaluate_model(
        str(result.folder), str(home / "text.txt"), against=str(home / "dense"), window=64,
        max_windows=8,
    )  # fmt: skip
    assert measured["kl_nats"] > 0 and 0 < measured["top1_agreement"] <= 1
    assert measured["bits_per_weight"] == pytest.approx(
        result.plan.budget["bits_per_weight"], rel=1e-5
    )
    assert measured["size_bytes"] == stored_bytes(result.folder)


def test_sizes_of_plans_that_are_not_written_are_comparable(
    home: Path, result: pipeline.Result
) -> None:
    uniform = next(row for row in result.rows if row.name.startswith("uniform"))
    job = Job(recipe(home, "out"))
    level = uniform.name.removeprefix("uniform ")
    plan = result.plan.replace(levels=job.levels(job.space.uniform()[level]))
    plan.save(home / "uniform.json")
    folder = apply_plan(
        str(home / "uniform.json"), home / "uniform", data=[str(home / "text.txt")],
        n_sequences=24, seq_len=64,
    )  # fmt: skip
    assert uniform.size_bytes == pytest.approx(stored_bytes(folder), abs=64)


def test_the_package_is_registered_by_import() -> None:
    assert hf_evopress.__version__


def test_the_text_of_a_job_can_be_what_the_model_writes_itself(home: Path) -> None:
    data = {"sources": ["self"], "seq_len": 32, "calibration": 8, "search": 8, "test": 4}
    asked = recipe(
        home, "own", work=str(home / "own.work"), data=data, levels=["rtn:bits=2,group_size=32"]
    )
    job = Job(asked)
    tokens = job.tokens
    rows = {tuple(row.tolist()) for part in tokens.values() for row in part}
    assert len(rows) == sum(map(len, tokens.values())) == 24  # disjoint, 4 of them held out
    loss = job.model(input_ids=tokens["search"], labels=tokens["search"]).loss
    random = torch.randint(256, tokens["search"].shape)
    assert loss < 0.5 * job.model(input_ids=random, labels=random).loss
    assert torch.equal(Job(asked).tokens["search"], tokens["search"])


def test_the_text_of_a_job_can_be_answers_to_prompts(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    data = {"sources": [f"self:{file}"], "seq_len": 32, "calibration": 4, "search": 4, "test": 4}
    levels = ["rtn:bits=2,group_size=32"]
    with pytest.raises(FileNotFoundError, match=r"no file .*prompts\.txt .* to take prompts from"):
        Job(recipe(home, "asked", work=str(tmp_path / "work"), data=data, levels=levels))
    file.write_text("the first one\nanother\n")
    asked = recipe(home, "asked", work=str(tmp_path / "work"), data=data, levels=levels)
    made = Job(asked).tokens
    texts = [bytes(row.tolist()) for part in made.values() for row in part]
    assert len({*texts}) == 16
    assert sum(text.startswith(b"the first one") for text in texts) == 8
    file.write_text("yet another\n")
    assert not torch.equal(Job(asked).tokens["search"], made["search"])


def test_an_adapter_needs_a_text_where_the_search_has_none(home: Path) -> None:
    asked = recipe(home, "own", data={"sources": ["self"]}, adapter={"rank": 2})
    with pytest.raises(ValueError, match=r"adapter learns from a text.*give adapter\.sources"):
        check_follow_up(asked)
