"""What each feature of the evaluator costs and what it does to the choice among candidates.

    python tests/benchmarks/evaluator.py .cache/SmolLM2-135M-Instruct --data calibration.txt \
        --work demo/quality.work --bits 2.8

Candidates are mutants of the knapsack plan, half of them blind, half at or after a pivot block.
All settings see the same tokens. Regret: how much worse the candidate is that a setting ranks
first, by the exact KL in float32; Spearman: of a setting's losses with the exact ones.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import torch
from quality import data

from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.jobs.plan_search import tables
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.scoring.evaluator import Evaluator
from hf_evopress.scoring.fitness.kl import KL
from hf_evopress.search.evolve import mutate
from hf_evopress.search.knapsack import solve
from hf_evopress.search.rounds import Run

SETTINGS: dict[str, tuple[KL, str, bool]] = {
    "exact: all columns, one by one": (KL(top_k=0), "float32", False),
    "+ prefix sharing": (KL(top_k=0), "float32", True),
    "+ top-256 and one bucket": (KL(top_k=256), "float32", True),
    "top-64 and one bucket": (KL(top_k=64), "float32", True),
    "head at top-64 and 2048 sampled": (KL(top_k=64, columns=2048), "float32", True),
    "bfloat16, top-256": (KL(top_k=256), "bfloat16", True),
    "bfloat16, top-64 and 2048 sampled": (KL(top_k=64, columns=2048), "bfloat16", True),
}


def main() -> None:
    words = arguments()
    job = Job(recipe(words))
    store = build_levels(job)
    plans = [job.levels(genome) for genome in candidates(job, store, words)]
    pool = job.tokens["search"].reshape(-1, words.pool_len)[: words.sequences]
    exact: list[float] = []
    first = 0.0
    print("| setting | CPU s per candidate | speed | Spearman | regret (nats) |")
    print("|---|---|---|---|---|")
    for name, (fitness, dtype, together) in SETTINGS.items():
        job.model.to(getattr(torch, dtype))
        evaluator = Evaluator(job.model, store, pool, fitness)
        numbers = range(len(pool))
        evaluator.losses(plans, numbers[:1])  # the dense model has run, levels are decompressed
        evaluator._make_targets(numbers)
        start = time.process_time()
        if together:
            rows = evaluator.losses(plans, numbers)
        else:
            rows = [evaluator.losses([plan], numbers)[0] for plan in plans]
        cost = (time.process_time() - start) / len(plans)
        losses = [sum(row) / len(row) for row in rows]
        exact, first = exact or losses, first or cost
        chosen = min(range(len(plans)), key=losses.__getitem__)
        regret = exact[chosen] - min(exact)
        speed = f"{first / cost:.2f}x"
        print(f"| {name} | {cost:.2f} | {speed} | {spearman(losses, exact):.4f} | {regret:.5f} |")

    print(f"\nexact losses of {len(plans)} candidates: {min(exact):.4f} to {max(exact):.4f}")


def candidates(job: Job, store: Any, words: argparse.Namespace) -> list[tuple[int, ...]]:
    table = tables(job).of("evolve", store)
    if table is None:
        raise ValueError("mutants are drawn by sensitivities: keep search.sensitivity_tokens")
    parent = solve(job.space, table, job.budget.limit).genome
    run = Run(job.space, job.budget, table, (), 1, 1, words.seed)
    rng = random.Random(words.seed)
    found: dict[tuple[int, ...], None] = {}
    for i in range(100 * words.candidates):
        if len(found) == words.candidates:
            break
        child = mutate(run, table, parent, rng.randint(1, 3), pivot=bool(i % 2))
        if child is not None:
            found[child] = None
    return list(found)


def spearman(a: list[float], b: list[float]) -> float:
    ranks = [torch.tensor(x).argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def recipe(words: argparse.Namespace) -> Recipe:
    return Recipe.from_dict(
        {
            "model": words.model,
            "work": words.work,
            "budget": {"bits": words.bits},
            "ends": "dense",
            "data": data(words),
            **({"levels": words.level} if words.level else {}),
        }
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration and search text")
    parser.add_argument("--work", default="demo/quality.work", help="as tests/benchmarks/quality")
    parser.add_argument("--bits", type=float, default=2.8)
    parser.add_argument("--candidates", type=int, default=12)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--level", action="extend", nargs="+", help="default: the default menu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--pool-len", type=int, default=512)
    parser.add_argument("--calibration", type=int, default=52)
    parser.add_argument("--search", type=int, default=16)
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
