"""Weights and key-value cache under one budget: searched, shipped, loaded, counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from hf_evopress import GearCache, Plan
from hf_evopress.base.devices import using
from hf_evopress.jobs.convert import convert
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.measure import FULL_CACHE
from hf_evopress.jobs.pipeline import compress
from hf_evopress.jobs.refine_existing_plan import refine_plan
from hf_evopress.loading.kv_cache.cache import GearLayer
from hf_evopress.models.kv_cache import cache_argument
from hf_evopress.models.size import stored_bytes
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.scoring.cached import through_cache
from hf_evopress.sharing.report import cache_lines

from .. import second_device  # noqa: F401  registers the device

SMALL = {"seq_len": 192, "calibration": 4, "search": 6, "heldout": 1, "test": 2}
CONTEXT = 1000
# errors along inputs alone: the second device takes its time for each of the others' small steps
LEVELS = [f"gptq:bits={bits},group_size=32,outputs=false" for bits in (2, 3, 4, 6)]
IDS = torch.arange(1, CONTEXT + 1)[None] % 250


def recipe(home: Path, out: Path, **changes: Any) -> Recipe:
    said: dict[str, Any] = {
        "model": str(home / "dense"),
        "budget": {"size": "250kB", "context": CONTEXT},
        "levels": LEVELS,
        "data": {"sources": [str(home / "text.txt")], **SMALL},
        "search": {"settings": {"generations": 2}, "sensitivity_tokens": 384},
        "out": str(out),
    }
    return Recipe.from_dict({**said, **changes})


@pytest.fixture(scope="module")
def made(home: Path) -> Any:
    return compress(recipe(home, home / "small"), window=192)


@pytest.fixture(scope="module")
def loaded(made: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.bfloat16).eval()


def filled(model: Any, cache: Any) -> Any:
    """Return the cache after IDS, one buffer at a time; positions beyond the model's are fine."""
    with torch.no_grad():
        through_cache(model, lambda: cache, step=64)(IDS)
    return cache


def test_file_and_cache_fit_together(made: Any, loaded: Any) -> None:
    budget = made.plan.budget
    held = filled(loaded, GearCache.of(loaded)).nbytes
    assert held == budget["cache_bytes"] and budget["context"] == CONTEXT
    assert held + stored_bytes(made.folder) <= budget["memory_bytes_at_most"] <= 250_000
    full = GearCache.bytes_at(loaded.config, CONTEXT, bits=16)
    assert held < full  # what it saved went into weights
    assert "250kB with the cache of 1000 tokens" in budget["asked"]


def test_the_plan_has_a_setting_for_each_layer(made: Any) -> None:
    plan = made.plan
    assert list(plan.cache) == [f"model.layers.{n}.self_attn.kv_cache" for n in range(3)]
    assert not any(unit.endswith("kv_cache") for unit in plan)
    saved = Plan.from_pretrained(str(made.folder))
    assert saved == plan and saved.cache == plan.cache
    assert "caches  kv:bits=" in plan.summary()
    assert f"{plan.budget['cache_bytes'] / 1e6:.1f} MB at 1000 tokens" in cache_lines(plan)
    assert cache_lines(plan) in (made.folder / "README.md").read_text(encoding="utf-8")
    renamed = plan.rename({r"^model\.": "model.language_model."})
    assert all(unit.startswith("model.language_model.") for unit in renamed.cache)


def test_generate_uses_the_settings_without_an_argument(loaded: Any) -> None:
    name = cache_argument(loaded)

    def generated(**given: Any) -> Any:
        return loaded.generate(
            IDS[:, :150],
            max_new_tokens=80,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            return_dict_in_generate=True,
            **given,
        )

    def kinds(found: Any) -> list[bool]:
        cache = getattr(found, "cache", None) or found.past_key_values
        return [isinstance(layer, GearLayer) for layer in cache.layers]

    own = generated()
    wanted = [isinstance(x, GearLayer) for x in GearCache.of(loaded).layers]
    assert kinds(own) == wanted and any(wanted)
    by_hand = generated(**{name: GearCache.of(loaded)})
    assert torch.equal(own.sequences, by_hand.sequences)
    assert not any(kinds(generated(cache_implementation="dynamic")))
    assert not any(kinds(generated(**{name: DynamicCache(config=loaded.config)})))


def test_a_dequantized_model_has_a_full_cache(made: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made.folder).dequantize()
    assert not any(isinstance(layer, GearLayer) for layer in GearCache.of(model).layers)
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert stock.generate(IDS[:, :70], max_new_tokens=3, pad_token_id=0).shape[0] == 1


def test_saved_again_it_keeps_its_settings(loaded: Any, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [type(x) for x in GearCache.of(again).layers] == [
        type(x) for x in GearCache.of(loaded).layers
    ]


def test_figures_are_those_of_the_cache(made: Any) -> None:
    rows = {row.name: row.report.kl_nats for row in made.rows}
    assert rows["searched"] != rows[FULL_CACHE]
    assert any(name.startswith("uniform") and ", cache " in name for name in rows)


def test_settings_can_be_offered_pinned_and_dropped_with_their_layer(home: Path) -> None:
    first = "model.layers.0.self_attn.kv_cache"
    job = Job(
        recipe(
            home,
            home / "x",
            cache=["dense", "kv:bits=2", "kv:bits=2,rank=2,outliers=0.05"],
            pin={"*.0.self_attn.kv_cache": "dense"},
            drop={"kinds": ["attention"]},
        )
    )
    genes = {gene.units[0]: gene for gene in job.space.genes}
    assert [option.level for option in genes[first].options] == ["dense"]
    second = genes["model.layers.1.self_attn.kv_cache"]
    assert len(second.options) == 3 and second.inside is not None
    levels = job.levels(job.space.cheapest)
    assert not any(unit.endswith("kv_cache") for unit in levels)  # all attention is dropped
    plan = job.plan(levels)
    assert plan.budget["cache_bytes"] == 3 * 4 * CONTEXT and not plan.cache
    assert job.genome(plan) == job.space.cheapest
    dense = job.plan(job.levels(job.space.dearest))
    assert job.genome(dense) == job.space.dearest


def test_a_budget_that_cannot_be_met_says_the_least(home: Path) -> None:
    with pytest.raises(ValueError, match=r"least|smallest possible is \d+B .*the cache") as caught:
        Job(recipe(home, home / "x", budget={"size": "50kB", "context": CONTEXT}))
    least = str(caught.value).partition("possible is ")[2].partition("B")[0]
    assert Job(recipe(home, home / "x", budget={"size": least, "context": CONTEXT})).budget.limit
    with pytest.raises(ValueError, match="no plan fits"):
        Job(recipe(home, home / "x", budget={"size": str(int(least) - 1), "context": CONTEXT}))


def test_recipes_that_cannot_choose_a_cache_are_refused(home: Path) -> None:
    for changes, told in [
        ({"budget": {"bits": 3, "context": 100}}, "with a budget of size"),
        ({"budget": {"size": "1MB", "context": 0}}, "it is 1 or more"),
        ({"budget": {"size": "1MB"}, "cache": ["dense"]}, "needs budget.context"),
        ({"search": {"strategy": "random"}}, "strategy random does not choose"),
        ({"search": {"sensitivity_tokens": 0}}, "needs search.sensitivity_tokens"),
        ({"export": "gguf"}, "gguf has a cache of its own"),
        ({"data": {"seq_len": 64}}, "from the 65th on"),
    ]:
        with pytest.raises(ValueError, match=told):
            recipe(home, home / "x", **changes)
    with pytest.raises(ValueError, match="a setting of the key-value cache"):
        Job(recipe(home, home / "x", cache=["rtn:bits=4,group_size=64"]))


def test_refining_keeps_the_settings(made: Any, home: Path) -> None:
    given: dict[str, Any] = {"data": [str(home / "text.txt")], "seq_len": 64, "n_sequences": 8}
    again = refine_plan(made.folder, home / "refined", mode="fast", window=192, **given)
    assert again.plan.cache == made.plan.cache
    assert again.plan.budget["cache_bytes"] == made.plan.budget["cache_bytes"]
    assert FULL_CACHE in [row.name for row in again.rows]


def test_other_formats_say_that_they_leave_the_settings_out(
    made: Any, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert(str(made.folder), home / "stock", format="dense")
    assert "settings for the key-value cache" in caplog.text
    stock = AutoModelForCausalLM.from_pretrained(home / "stock")
    assert GearCache.of(stock).nbytes == 0


def test_the_second_device_gives_what_the_cpu_gives(home: Path, made: Any) -> None:
    with using("sim"):
        there = compress(recipe(home, home / "sim", work=str(home / "sim.work")), window=192)
    assert there.plan.cache.keys() == made.plan.cache.keys()
    assert there.plan.budget["memory_bytes_at_most"] <= 250_000
    ours, theirs = (r.rows[-1].report.kl_nats for r in (made, there))
    # statistics there are in bfloat16, whose sums some processors round otherwise: another plan,
    # 0.0003 nats apart at most of what has been seen
    assert theirs == pytest.approx(ours, rel=0.5, abs=5e-4)
    model = AutoModelForCausalLM.from_pretrained(there.folder, dtype=torch.bfloat16).to("sim")
    assert filled(model, GearCache.of(model)).nbytes == there.plan.budget["cache_bytes"]
    ids = IDS[:, :70].to("sim")
    assert model.generate(ids, max_new_tokens=3, pad_token_id=0).shape[1] >= 71
