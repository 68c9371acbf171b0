"""Finish a plan that is already there: compress its model by it, refined, without a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .cards import write_card
from .finish import finish
from .job import Job, versions
from .pipeline import Result, export, figures, measure, unseen_tokens
from .plan import Plan
from .recipe import Recipe
from .store import Progress


def refine_plan(
    plan: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    mode: str = "best",
    data: Sequence[str] = (),
    test: str | None = None,
    window: int = 2048,
    max_windows: int | None = 10,
    work: str | Path | None = None,
    n_sequences: int = 56,
    seq_len: int = 1024,
    seed: int = 0,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Return the model of `plan` with its levels refined, in folder `out`, reloaded and measured.

    plan: a file, a folder, a compressed model or a repository on the Hub. model: the dense model,
    by default the plan's own. Only the plan's levels are made, then finished in mode fast or best.
    """
    found = Plan.from_pretrained(plan)
    recipe = recipe_of_plan(
        found,
        model=model,
        out=str(out),
        work=str(work) if work is not None else None,
        mode=mode,
        data={"sources": list(data), "seq_len": seq_len, "calibration": n_sequences, "seed": seed},
        revision=revision or found.revision,
    )
    job = Job(recipe, progress=progress)
    unseen, window = unseen_tokens(job, test, window)
    store = job.build()
    made = job.plan(
        found.levels, search={**found.search, "versions": versions()}, results=found.results
    )
    states, made = finish(job, store, made)
    folder = export(job, states, made)
    rows, sample = measure(job, states, made, folder, unseen, window, max_windows)
    made = made.replace(results={**made.results, **figures(rows)})
    made.save(folder)
    recipe.save(folder / "evopress_recipe.yaml")
    write_card(folder, made, recipe)
    return Result(folder, made, rows, sample)


def recipe_of_plan(
    plan: Plan,
    *,
    model: str | None,
    out: str,
    work: str | None,
    mode: str,
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
            "budget": {"ratio": 1.0},
            "levels": ["dense"],
            "pin": pins,
            "drop": {"kinds": ["attention", "mlp"]} if dropped else {},
            "data": data,
            "refine": mode,
        }
    )
