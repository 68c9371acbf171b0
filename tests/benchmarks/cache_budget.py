"""Weights and key-value cache under one budget: plans of the knapsack and the search, and their KL.

python tests/benchmarks/cache_budget.py MODEL --data calibration.txt --test wiki.test.raw --work w
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from hf_evopress.calibration.data import tokenize_file
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.jobs.measure import best_uniform
from hf_evopress.jobs.plan_search import run_search, tables
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.scoring.evaluator import Evaluator
from hf_evopress.search.knapsack import solve


def job_of(
    words: argparse.Namespace, pin: dict[str, str], search: dict[str, Any] | None = None
) -> Job:
    return Job(
        Recipe.from_dict(
            {
                "model": words.model,
                "budget": {"size": words.size, "context": words.context},
                "data": {"sources": [words.data], "calibration": 32, "search": 24},
                "work": words.work,
                "search": search or {"strategy": "knapsack"},
                "pin": pin,
            }
        ),
        progress=show_progress,
    )


def show_progress(what: str, done: int, total: int) -> None:
    """Print a line for each generation, and the last of everything else."""
    if what.startswith("search") or done == total:
        print(f"{time.process_time():.0f} CPU s: {what} {done}/{total}", flush=True)


def main(words: argparse.Namespace) -> None:
    job = job_of(words, {})
    store = build_levels(job)
    plans = {}

    def add(name: str, job: Job, genome: tuple[int, ...]) -> None:
        plan = job.plan(job.levels(genome)).budget
        held, file = plan["cache_bytes"] / 1e6, plan["checkpoint_bytes_at_most"] / 1e6
        cells = f"{held:.1f} | {file:.1f} | {plan['bits_per_weight']:.2f}"
        plans[f"| {name} | {cells} |"] = job.levels(genome)

    def solved(job: Job) -> tuple[int, ...]:
        table = tables(job).of("knapsack", store)
        assert table is not None
        return solve(job.space, table, job.budget.limit).genome

    add("chosen together", job, solved(job))
    if words.generations:
        settings = {"generations": words.generations, "tokens": words.tokens}
        evolved = job_of(words, {}, {"strategy": "evolve", "settings": settings})
        evolved.take_over(job)
        found = run_search(evolved, store)
        add(f"evolved from it, {found.run.evaluated_tokens} tokens", evolved, found.best)
    if (uniform := best_uniform(job, store)) is not None:
        add(uniform[0], job, uniform[1])
    for setting in words.setting:
        pinned = job_of(words, {"*.kv_cache": setting})
        pinned.take_over(job)
        add(f"all caches {setting}, weights searched", pinned, solved(pinned))
    tokens = tokenize_file(Path(words.test), job.tokenizer)[: words.windows * words.window]
    pool = tokens.view(words.windows, words.window)
    evaluator = Evaluator(job.model, store, pool, job.fitness)
    losses = evaluator.losses([*plans.values()], range(words.windows))
    print("| plan | cache, MB | file, MB | bits per weight | KL (nats) |\n|---|---|---|---|---|")
    for row, loss in zip(plans, losses, strict=True):
        print(f"{row} {sum(loss) / len(loss):.4f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--test", required=True, help="evaluation text")
    parser.add_argument("--work", required=True)
    parser.add_argument("--size", default="120MB")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--setting", nargs="*", default=["kv:bits=4", "kv:bits=3"])
    parser.add_argument("--generations", type=int, default=0, help="of a search from the first")
    parser.add_argument("--tokens", type=int, nargs=2, default=[1024, 4096], help="of its rounds")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=2)
    main(parser.parse_args())
