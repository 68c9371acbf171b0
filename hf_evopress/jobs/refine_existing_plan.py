"""Compress a model by an existing plan, with refinement and without a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..base.devices import on_device
from ..base.fingerprint import versions
from ..base.own_code import is_trusted, trusts_code
from ..base.progress import Progress
from ..base.target import writes_out
from ..methods import compose
from ..plans.plan import Plan
from ..recipes.recipe import Recipe
from .job import Job
from .levels import build_levels
from .measure import unseen_tokens
from .pipeline import Result, ship, text_name


@trusts_code
@on_device
@writes_out("plan", "model", "data", "test", "work")
def refine_plan(
    plan: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    mode: str = "best",
    steps: int | None = None,
    learning_rate: float | None = None,
    codes: bool = False,
    data: Sequence[str] = (),
    column: str = "text",
    test: str | None = None,
    window: int | None = None,
    max_windows: int | None = 10,
    work: str | Path | None = None,
    n_sequences: int = 56,
    search_pool: int = 32,
    written: int = 0,
    seq_len: int = 1024,
    seed: int = 0,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Return the model of `plan` with its levels refined, in folder `out`, reloaded and measured.

    plan: a file, a folder, a compressed model or a repository on the Hub. model: the dense model,
    by default the plan's own. Only the plan's levels are made, then finished in a mode of
    `recipes.recipe.REFINE`; steps, learning_rate and codes
    (whether they move as well) are of its end-to-end part. written: sequences
    that the dense model writes itself, to learn from as well. search_pool: sequences that a search
    is left, as in the run whose `work` folder this goes on with: the others are what calibrates.
    """
    found = _canonical(Plan.from_pretrained(plan))
    recipe = recipe_of_plan(
        found,
        model=model,
        out=str(out),
        work=str(work) if work is not None else None,
        mode=mode,
        distil={"steps": steps, "learning_rate": learning_rate, "codes": codes},
        data={
            "sources": list(data),
            "column": column,
            "seq_len": seq_len,
            "calibration": n_sequences,
            "search": search_pool,
            "written": written,
            "seed": seed,
        },
        revision=revision or found.revision,
    )
    job = _job_of(found, recipe, progress)
    unseen, length = unseen_tokens(job, test, window)
    store = build_levels(job)
    made = job.plan(found.levels, search={**found.search, "versions": versions()})
    # what it was found for is the plan's own, where it says so; its figures were of other weights
    budget = {k: v for k, v in {**made.budget, "asked": found.budget.get("asked")}.items() if v}
    made = _with_cache(made.replace(budget=budget), found)
    return ship(job, store, made, (unseen, length, max_windows), text_name(recipe, test))


def _canonical(plan: Plan) -> Plan:
    return plan.replace(levels=compose.normalize_each(plan.levels))


def _job_of(plan: Plan, recipe: Recipe, progress: Progress | None) -> Job:
    """Return the job of a recipe in which a plan is pinned, and what it leaves out is skipped.

    Raises ValueError where the plan is of other units than the model.
    """
    try:
        job = Job(recipe, progress=progress)
    except ValueError:  # of a pin, if the plan is of another model
        known = {unit.name: unit.shape for unit in Job(replace(recipe, pin={})).units}
        inside = {unit for unit, level in plan.items() if _is_in_block(unit) and not level.is_drop}
        if inside - {*known}:
            plan.check(known)
        raise
    plan.check({**plan.shapes, **{unit.name: unit.shape for unit in job.units}})
    dropped = tuple(f"{unit}." for unit, level in plan.items() if level.is_drop)
    left_out = (u.name for u in job.units if u.name not in plan and _is_in_block(u.name))
    if skipped := tuple(name for name in left_out if not name.startswith(dropped)):
        return Job(replace(recipe, skip=skipped), progress=progress)
    return job


def _is_in_block(unit: str) -> bool:
    return any(part.isdecimal() for part in unit.split("."))


def _with_cache(made: Plan, found: Plan) -> Plan:
    """Return the plan `made` with the settings for the cache of the one that was found."""
    if not found.cache:
        return made
    known = {k: found.budget[k] for k in ("context", "cache_bytes") if k in found.budget}
    if "cache_bytes" in known:
        size = made.budget["checkpoint_bytes_at_most"]
        known["memory_bytes_at_most"] = known["cache_bytes"] + size
    cache = {unit: str(level) for unit, level in found.cache.items()}
    return made.replace(cache=cache, budget={**made.budget, **known})


def recipe_of_plan(
    plan: Plan,
    *,
    model: str | None,
    out: str,
    work: str | None,
    mode: str,
    distil: Mapping[str, Any],
    data: dict[str, object],
    revision: str | None,
) -> Recipe:
    """Return the recipe in which every unit is pinned to its level in `plan`."""
    source = model or plan.base_model
    if source is None:
        raise ValueError("the plan does not name its model; give one with --model")
    if mode == "none":
        raise ValueError("refine none changes nothing; take fast or best, or use apply")
    dropped = any(level.is_drop for level in plan.levels.values())
    pins = {unit: str(level) for unit, level in plan.levels.items()}
    return Recipe.from_dict(
        {
            "model": source,
            "out": out,
            "work": work,
            "revision": revision if source == plan.base_model else None,
            "trust_remote_code": is_trusted(),
            "budget": {"ratio": 1.0},
            "levels": ["dense"],
            "pin": pins,
            "drop": {"kinds": ["attention", "mlp"]} if dropped else {},
            "data": data,
            "refine": mode,
            "distil": {key: value for key, value in distil.items() if value is not None},
        }
    )
