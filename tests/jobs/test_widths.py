"""Models of several widths, compressed to one size: the closest to the whole one is shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_evopress.base.devices import using
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.pipeline import Result, compress
from hf_evopress.jobs.refine_existing_plan import refine_plan
from hf_evopress.jobs.widths import best_width, narrow
from hf_evopress.models.narrow import kept_channels
from hf_evopress.models.size import stored_bytes
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.recipes.targets import channel_step
from hf_evopress.refine.distillation import distillation_loss, teacher_targets
from hf_evopress.sharing.report import widths_line

from .. import second_device  # noqa: F401  registers the device

SMALL = {"seq_len": 64, "calibration": 12, "search": 8, "heldout": 2, "test": 4}


def recipe(home: Path, out: str, **changes: Any) -> Recipe:
    said: dict[str, Any] = {
        "model": str(home / "dense"),
        "budget": {"size": "70KB"},
        "data": {"sources": [str(home / "text.txt")], **SMALL},
        "search": {"strategy": "knapsack", "sensitivity_tokens": 512},
        "levels": [f"gptq:bits={b},group_size=32" for b in (2, 3, 4, 5, 6, 8)],
        "widths": [1, 0.5],
        "out": str(home / out),
    }
    return Recipe.from_dict({**said, **changes})


@pytest.fixture(scope="module")
def small(home: Path) -> Result:
    return compress(recipe(home, "narrow", widths=[0.5], refine="end-to-end", distil={"steps": 2}))


def test_the_model_is_narrow_and_of_the_size(home: Path, small: Result) -> None:
    model = AutoModelForCausalLM.from_pretrained(small.folder)
    assert model.config.intermediate_size == 64
    assert small.plan.shapes["model.layers.0.mlp.down_proj"] == (64, 64)
    assert stored_bytes(small.folder) <= 70_000
    ids = torch.arange(1, 40)[None]
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_it_is_measured_against_the_whole_model(home: Path, small: Result) -> None:
    dense, searched = small.rows[0], next(r for r in small.rows if r.name == "searched")
    whole = AutoModelForCausalLM.from_pretrained(home / "dense", dtype="auto")
    assert dense.size_bytes == sum(2 * p.numel() for p in whole.parameters())
    assert dense.report.kl_nats == 0
    assert searched.report.kl_nats > 1e-4
    assert searched.size_bytes == stored_bytes(small.folder)


def test_plan_recipe_and_card_are_of_the_whole_model(home: Path, small: Result) -> None:
    assert small.plan.base_model == str(home / "dense")
    kept = Recipe.load(small.folder / "evopress_recipe.yaml")
    assert kept.model == str(home / "dense")
    assert kept.widths == (0.5,)
    (row,) = small.plan.search["widths"]
    assert (row["channels"], row["of"]) == (64, 128)
    assert "64 of 128 channels" in (small.folder / "README.md").read_text()
    with pytest.raises(ValueError, match="fewer channels in its MLPs: run the recipe"):
        small.plan.check(dict.fromkeys(small.plan, (64, 128)))


def test_the_loss_of_a_width_is_that_of_what_ships(home: Path) -> None:
    said = recipe(home, "measured", widths=[0.5])
    result = compress(said)
    job = Job(said)
    ids = job.tokens["search"]
    small = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32)
    with torch.no_grad():
        targets = teacher_targets(job.model.float()(input_ids=ids).logits, 256)
        found = distillation_loss(small(input_ids=ids).logits, *targets)
    (row,) = result.plan.search["widths"]
    assert row["loss"] == pytest.approx(float(found), rel=0.02)


def test_the_closest_is_kept_and_a_second_run_makes_the_same(home: Path) -> None:
    best, _, plan = best_width(Job(recipe(home, "both")))
    wide, small = plan.search["widths"]
    assert (wide["channels"], small["channels"]) == (128, 64)
    (kept, other) = (wide, small) if wide["loss"] < small["loss"] else (small, wide)
    assert kept["loss"] < 0.9 * other["loss"]
    assert plan.shapes["model.layers.0.mlp.down_proj"] == (64, kept["channels"])
    assert (best.whole is best) == (kept is wide)
    again = best_width(Job(recipe(home, "both")))[2]
    assert again.to_json() == plan.to_json()


def test_a_width_may_fit_where_the_whole_model_does_not(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tight = {"levels": ["gptq:bits=8,group_size=32"], "budget": {"size": "170KB"}, "ends": "dense"}
    job = Job(recipe(home, "tight", widths=[1, 0.5], **tight))
    assert job.channels == (64,)
    assert "128 channels: no plan fits a budget of 170KB" in caplog.text
    _, _, plan = best_width(job)
    assert plan.shapes["model.layers.0.mlp.down_proj"] == (64, 64)
    with pytest.raises(ValueError, match="no plan fits a budget of 170KB"):
        Job(recipe(home, "tight", widths=[1], **tight))


def test_a_share_that_rounds_to_all_channels_keeps_the_size(home: Path) -> None:
    job = Job(recipe(home, "near", widths=[0.99]))
    assert job.channels == (128,) and job.budget.text == "70KB"


def test_only_narrower_models_under_a_size_with_a_cache(home: Path) -> None:
    budget = {"size": "120KB", "context": 256}
    settings = ["kv:bits=4,group_size=16", "kv:bits=8,group_size=16"]
    said: dict[str, Any] = {"budget": budget, "cache": settings, "widths": [0.5]}
    data = {"sources": [str(home / "text.txt")], **SMALL, "seq_len": 128, "calibration": 6}
    _, _, plan = best_width(Job(recipe(home, "cache", data=data, **said)))
    assert plan.cache and plan.budget["memory_bytes_at_most"] <= 120_000


def test_a_width_whose_model_collapses_is_not_taken(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([float("nan"), 0.5])
    monkeypatch.setattr("hf_evopress.jobs.widths.loss", lambda *_: next(losses))
    _, _, plan = best_width(Job(recipe(home, "both")))
    assert [row["loss"] for row in plan.search["widths"]] == [None, 0.5]
    assert plan.shapes["model.layers.0.mlp.down_proj"] == (64, 64)
    assert "128 (collapsed), 64 (0.5000)" in widths_line(plan)
    plan.to_json()


def test_blocks_one_at_a_time_with_drops_and_refinement(home: Path) -> None:
    """On a device that blocks only visit; every part of the line is of the narrower model."""
    said = recipe(
        home,
        "visit",
        widths=[0.5],
        device="sim",
        offload="cpu",
        refine="fast",
        drop={"kinds": ["attention", "mlp"], "tokens": 256},
    )
    result = compress(said)
    assert result.plan.search["widths"][0]["channels"] == 64
    assert AutoModelForCausalLM.from_pretrained(result.folder).config.intermediate_size == 64


def test_steps_are_what_the_target_divides(tiny_model: Any) -> None:
    model = tiny_model("llama", intermediate_size=512)
    assert kept_channels(model, [0.7], step=channel_step("cpu")) == (384,)
    assert kept_channels(model, [0.6], step=channel_step("gpu")) == (256,)
    assert kept_channels(model, [0.7], step=channel_step("gguf")) == (256,)
    assert kept_channels(tiny_model("llama", intermediate_size=96), [0.7]) == (64,)


def test_a_plan_of_a_narrower_model_is_not_refined_on_the_whole_one(
    home: Path, small: Result, tmp_path: Path
) -> None:
    text = [str(home / "text.txt")]
    with pytest.raises(ValueError, match="fewer channels in its MLPs: run the recipe"):
        refine_plan(str(small.folder), tmp_path / "out", data=text, mode="fast", seq_len=64)


def test_another_device_makes_the_same_model(home: Path, tmp_path: Path) -> None:
    made, ids = {}, torch.empty(0)
    for device in ("cpu", "sim"):
        job = Job(recipe(home, "device", device=device, work=str(tmp_path / device)))
        with using(job.device, offload="none"):
            small = narrow(job, 64)
        made[device] = AutoModelForCausalLM.from_pretrained(small.source, dtype=torch.float32)
        ids = job.tokens["search"]
    dense = AutoModelForCausalLM.from_pretrained(home / "dense", dtype=torch.float32)
    losses = {}
    for device, model in made.items():
        with torch.no_grad():
            targets = teacher_targets(dense(input_ids=ids).logits, 256)
            losses[device] = float(distillation_loss(model(input_ids=ids).logits, *targets))
    # a channel or two may go in the place of others
    assert losses["sim"] == pytest.approx(losses["cpu"], rel=0.25)


def test_another_model_in_the_work_folder_is_refused(home: Path) -> None:
    work = str(home / "mixed.work")
    job = Job(recipe(home, "mixed", work=work))
    assert AutoTokenizer.from_pretrained(narrow(job, 64).source).vocab_size  # a whole model
    changed = {"data": {"sources": [str(home / "text.txt")], **SMALL, "calibration": 10}}
    other = Job(recipe(home, "mixed", work=work, **changed))
    with pytest.raises(ValueError, match="made with other"):
        narrow(other, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {"bits": 3.0}}, "give a budget of size"),
        ({"widths": [0.0]}, r"shares of an MLP's channels, in \(0, 1\]; got 0"),
        ({"widths": [1.5]}, "got 1.5"),
        ({"widths": [0.5, 0.5]}, "names a share twice: 0.5, 0.5"),
        ({"adapter": {"rank": 4}}, "does not go with an adapter"),
        ({"search": {"start": ["plan.json"]}}, "does not go with search.start"),
    ],
)
def test_what_cannot_be_is_said_at_once(home: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(home, "bad", **changes)


def test_what_the_model_cannot_be_is_said_before_it_is_loaded(home: Path) -> None:
    for changes, message in (
        ({"widths": [0.1]}, "a width of 0.1 leaves none of 128 channels, in steps of 64"),
        ({"widths": [0.5, 0.6]}, "leave those out that are the same"),
        ({"skip": ["*.1.mlp.down_proj"]}, "layers.1.mlp.down_proj, which skip leaves as it is"),
        ({"skip": ["*.gate_proj"]}, "layers.0.mlp.gate_proj, which skip leaves as it is"),
    ):
        with pytest.raises(ValueError, match=message):
            Job(recipe(home, "bad", **changes))


def test_blocks_of_another_kind_are_refused(tiny_model: Any) -> None:
    with pytest.raises(ValueError, match="Phi3ForCausalLM have no self_attn.q_proj"):
        kept_channels(tiny_model("phi3"), [0.5])
    model = tiny_model("qwen3")
    model.config.auto_map = {"AutoModelForCausalLM": "modeling.Own"}
    with pytest.raises(ValueError, match="brings its own code"):
        kept_channels(model, [0.5])
