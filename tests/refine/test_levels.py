"""Levels that are tuned before the search."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_evopress.calibration.output_moments import load_moments
from hf_evopress.jobs import pipeline, refinement
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.jobs.refinement import refining_tokens
from hf_evopress.methods import compose
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.refine.block_tuning import Tuning
from hf_evopress.refine.blockwise import Settings
from hf_evopress.refine.levels import RefinedLevels, chosen, refine_levels

LEVELS = [f"gptq:bits={bits},group_size=32" for bits in (2, 3, 4)]
TWO = compose.normalize(LEVELS[0])


def recipe(home: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": str(home / "dense"),
        "work": str(home / "tuned.work"),
        "budget": {"bits": 3},
        "ends": "dense",
        "levels": LEVELS,
        "refine_levels": ["gptq:bits=2,*"],
        "data": {
            "sources": [str(home / "text.txt")],
            "seq_len": 64,
            "calibration": 16,
            "search": 12,
            "heldout": 4,
            "test": 8,
        },
        "search": {"sensitivity_tokens": 256, "strategy": "knapsack"},
    }
    return Recipe.from_dict({**values, **changes})


@pytest.fixture(scope="module", autouse=True)
def small_rates() -> Iterator[None]:
    """The rates are for real models; a tiny one needs smaller ones."""
    tuning = Tuning(steps=40, batch=6, code_rate=0.005, float_rate=2e-3, zero_rate=0.03)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            refinement, "refine_settings", lambda job, mode: Settings(mode, tuning=tuning)
        )
        yield


@pytest.fixture(scope="module")
def job(home: Path, small_rates: None) -> Job:
    return Job(recipe(home))


@pytest.fixture(scope="module")
def store(job: Job) -> RefinedLevels:
    store = build_levels(job)
    assert isinstance(store, RefinedLevels)
    return store


def test_the_chosen_levels_are_tuned_and_the_others_as_before(
    job: Job, store: RefinedLevels
) -> None:
    changed = 0
    for unit in store.units:
        for level in store.levels(unit):
            new, old = store.state(unit, level), store.store.state(unit, level)
            assert {n: (t.shape, t.dtype) for n, t in new.items()} == {
                n: (t.shape, t.dtype) for n, t in old.items()
            }
            same = all(torch.equal(new[name], old[name]) for name in new)
            assert same or level == TWO
            changed += not same
    assert changed > len(store.units) // 2


def test_a_plan_of_tuned_levels_is_closer_to_the_dense_model(
    job: Job, store: RefinedLevels
) -> None:
    plan = dict.fromkeys(store.units, TWO)
    (before,), (after,) = (
        job.evaluator(s).losses([plan], range(len(job.tokens["search"])))
        for s in (store.store, store)
    )
    assert sum(after) < sum(before)


def test_a_level_that_does_not_help_stays_as_it_was(job: Job, store: RefinedLevels) -> None:
    losses = iter([0.1, 0.2])
    tokens, heldout = refining_tokens(job)
    kept = refine_levels(
        job.model,
        store.store,
        job.recipe.refine_levels,
        tokens,
        heldout,
        job.work / "refined-levels",
        settings=refinement.refine_settings(job, "best"),
        loss=lambda *_: next(losses),
        moments=lambda block: load_moments(job.work, block),
    )
    assert isinstance(kept, RefinedLevels) and not kept.made


def test_less_loss_is_expected_of_them(store: RefinedLevels) -> None:
    key = "sensitivity_nats"
    gains = [store.scores(u, TWO)[key] / store.store.scores(u, TWO)[key] for u in store.units]
    assert all(0 < gain <= 1 for gain in gains) and min(gains) < 0.98
    unit = next(iter(store.units))
    assert store.scores(unit, LEVELS[1]) == store.store.scores(unit, LEVELS[1])


def test_they_are_made_once(job: Job, store: RefinedLevels) -> None:
    files = {f: f.stat().st_mtime_ns for f in (job.work / "refined-levels").rglob("*.safetensors")}
    again = build_levels(Job(recipe(Path(job.recipe.model).parent)))
    unit = next(iter(store.units))
    states = [s.state(unit, TWO) for s in (store, again)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert files and all(f.stat().st_mtime_ns == at for f, at in files.items())


def test_what_the_search_compared_is_what_ships(home: Path, store: RefinedLevels) -> None:
    out = home / "tuned-out"
    result = pipeline.compress(recipe(home, out=str(out), refine="fast"))  # checks the logits
    assert "gptq:bits=2,group_size=32" in map(str, result.plan.levels.values())
    rows = {row.name for row in result.rows}
    assert "searched" in rows
    assert ("before refinement" in rows) == result.plan.results["refined"]["is_kept"]


def test_a_pattern_without_a_level_is_refused_at_once(home: Path) -> None:
    with pytest.raises(ValueError, match="no level offered matches 'gptq:bits=5,.*known: gptq"):
        Job(recipe(home, refine_levels=["gptq:bits=5,*"]))
    assert chosen([TWO], ["*"]) == [TWO]
