"""Plans of many sizes from one run: the Pareto front of size and loss, as files with an index.

hf-evopress search MODEL --bits 2.5:4.5 --out front
hf-evopress show front --plot front.png
hf-evopress apply front/plan-3.012bit.json --out model-3bit
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..base.fingerprint import versions
from ..base.resources import atomic_write
from ..plans.plan import Plan
from ..plans.repo import INDEX_NAME, entry_of, index_text, list_plans
from ..store.level_store import LevelStore
from .job import Job
from .plan_search import run_search


def find_front(job: Job, store: LevelStore) -> list[Plan]:
    """Return the non-dominated plans that a recipe with strategy pareto finds, smallest first.

    Each has its loss on the search's held-out sequences in `results`. ValueError with another
    strategy.
    """
    said = job.recipe.search
    if said.strategy != "pareto":
        raise ValueError(
            f"a front needs strategy pareto, not {said.strategy}: --bits 2.5:4.5, or in a recipe "
            "search: {strategy: pareto, settings: {low: 2.5}}"
        )
    low = said.settings.get("low", 0)
    asked = {"asked": f"{f'{low} bits per weight' if low else 'the least'} to {job.budget.text}"}
    search = run_search(job, store, starts=job.starts)
    report = {key: value for key, value in search.report.items() if key not in ("front", "loss")}
    name = "kl_nats" if said.fitness == "kl" else "loss"
    plans = [
        job.plan(
            job.levels(tuple(point["genome"])),
            results={name: round(point["loss"], 6)},
            search={**report, "fitness": said.fitness, "versions": versions()},
        )
        for point in search.report["front"]
    ]
    return [plan.replace(budget={**plan.budget, **asked}) for plan in plans]


def save_front(plans: Sequence[Plan], folder: str | Path) -> list[Path]:
    """Return the files that `plans` were written to, named by their bits; an index beside them.

    A front that is there is replaced.
    """
    folder = Path(folder)
    check_front_target(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Plan] = {}
    for plan in plans:
        stem = f"plan-{plan.budget['bits_per_weight']:.3f}bit"
        same = sum(name.startswith(stem) for name in files)
        files[f"{stem}-{same + 1}.json" if same else f"{stem}.json"] = plan
    former = list_plans(str(folder))
    for name, plan in files.items():
        plan.save(folder / name)
    entries = [entry_of(name, plan.to_dict()) for name, plan in files.items()]
    atomic_write(folder / INDEX_NAME, index_text(entries))
    for name in former.keys() - files.keys():
        (folder / name).unlink(missing_ok=True)
    return [folder / name for name in files]


def check_front_target(folder: str | Path) -> None:
    """Raise ValueError where `folder` holds something else than plans."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; several plans need a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / INDEX_NAME).is_file():
        raise ValueError(f"{folder} holds files but no {INDEX_NAME}: give another folder")
