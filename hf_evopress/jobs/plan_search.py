"""Run the search of a job, resumable after every round, and return its plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..base.fingerprint import text_fingerprint, versions
from ..base.resources import atomic_write, clear_leftovers
from ..plans.plan import Plan
from ..recipes.targets import DEFAULT
from ..search.ask_tell import Search
from ..search.space import Genome
from ..store.level_store import LevelStore
from .job import Job
from .search_log import ENDING, SearchLog, read_state
from .tables import Tables


def find_plan(job: Job, store: LevelStore) -> Plan:
    """Return the plan that the recipe's search settles on.

    The search's state is kept after each round: a run that was stopped gives the same plan.
    """
    search = run_search(job, store, starts=[*job.starts, *rivals(job, store).values()])
    return job.plan(
        job.levels(search.best),
        search={
            **search.report,
            "fitness": job.recipe.search.fitness,
            **({} if job.recipe.export == DEFAULT else {"for": job.recipe.export}),
            "history": search.history,
            "versions": versions(),
        },
    )


def rivals(job: Job, store: LevelStore) -> dict[str, Genome]:
    """Return the plans of the strategies that the recipe compares with, which the search's own
    starts from: strategy -> genome. A finished search is not run again."""
    others = dict.fromkeys(job.recipe.search.compare)
    return {name: run_search(job, store, name).best for name in others}


def run_search(
    job: Job, store: LevelStore, strategy: str | None = None, *, starts: Sequence[Genome] = ()
) -> Search:
    """Return the finished search of the recipe, or that of another strategy."""
    with job.computing_in(job.search_dtype):
        return _searched(job, store, strategy, starts)


def _searched(
    job: Job, store: LevelStore, strategy: str | None, starts: Sequence[Genome]
) -> Search:
    search = search_of(job, store, strategy, starts=starts)
    evaluator = job.evaluator(store)
    while (asked := search.ask()) is not None:
        plans = [job.levels(genome) for genome in asked.genomes]
        _tell(job, search, asked.stage)
        search.tell(evaluator.losses(plans, asked.sequences))
        keep(job, search)
        if strategy is None:
            job.reports.update(search.history)
    if strategy is None:
        job.reports.close()
    return search


def search_of(
    job: Job, store: LevelStore, strategy: str | None = None, *, starts: Sequence[Genome] = ()
) -> Search:
    """Return the recipe's search, at the point where an earlier run of it was stopped.

    strategy: another than the recipe's, at its default settings. starts: plans to begin with.
    """
    settings = job.recipe.search
    pool = job.tokens["search"]
    search = Search(
        job.space,
        job.budget,
        strategy=strategy or settings.strategy,
        table=tables(job).of(strategy or settings.strategy, store),
        starts=starts,
        n_sequences=len(pool),
        seq_len=pool.shape[1],
        seed=settings.seed,
        **({} if strategy else settings.settings),
    )
    file = _search_file(job, search)
    clear_leftovers(file.parent)
    kept = read_state(file)
    return search.restore(kept) if kept is not None else search


def tables(job: Job) -> Tables:
    """Return the predicted losses that strategies choose by; measured where they are looked at."""
    return Tables(
        job.problem,
        job.recipe,
        job.work,
        fitness=(job.fitness_words, job.fitness),
        model=lambda: job.model,
        tokens=lambda: job.tokens["search"],
    )


def keep(job: Job, search: Search) -> None:
    """Write the search's state, so that it can go on from here, and its log."""
    if job.ranks.is_first:
        file = _search_file(job, search)
        atomic_write(file, json.dumps(search.state()))
        SearchLog(file.with_suffix(ENDING)).update(search.history)


def _search_file(job: Job, search: Search) -> Path:
    # one file per problem: searches for several budgets share a work folder
    state = search.state()
    problem = {**state["problem"], "version": state["version"], "fitness": job.fitness_words}
    problem["dtype"] = str(job.search_dtype)
    return job.work / "search" / f"{text_fingerprint(json.dumps(problem))}.json"


def _tell(job: Job, search: Search, stage: str) -> None:
    """Report how far the search is, in generations; it may end before the last."""
    if job.progress:
        last = getattr(search.settings, "generations", 0) + 1
        job.progress(f"search: {stage}", min(len(search.history), last), last)
