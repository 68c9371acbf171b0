"""KL and perplexity of uniform, knapsack and searched plans at equal bits, on text unseen so far.

    python tests/benchmarks/quality.py .cache/SmolLM2-135M-Instruct \
        --data calibration.txt --test wiki.test.raw --bits 2.8 3.3 3.8 4.31 --out quality.json

One store serves all budgets. Plain levels (rounding without clip search, GPTQ with damping 0.01,
no sink moment, no clip search) are made as controls. Every row is evaluated in one pass over the
same windows, so differences between rows are paired.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from hf_evopress.calibration.data import tokenize_file
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.jobs.measure import best_uniform
from hf_evopress.jobs.plan_search import find_plan
from hf_evopress.methods.compose import normalize
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.scoring.evaluate import compare_many

CONTROLS = {
    "RTN {bits}": "rtn:bits={bits},group_size=64,clip=false",
    "plain GPTQ {bits}": "gptq:bits={bits},group_size=64,clip=false,damp=0.01,sink=0.0",
}


def main() -> None:
    words = arguments()
    functions: dict[str, Any] = {}
    about: dict[str, dict[str, Any]] = {}
    job = None
    for bits in words.bits:
        for strategy in words.strategies:
            job = share(Job(recipe(words, bits, strategy)), job)
            store = build_levels(job)
            start = time.process_time()
            plan = find_plan(job, store)
            name = f"{strategy} {bits}"
            about[name] = {
                "bits_per_weight": plan.budget["bits_per_weight"],
                "search_cpu_seconds": round(time.process_time() - start, 1),
                "evaluated_tokens": plan.search["evaluated_tokens"],
            }
            functions[name] = scorer(job, store, plan.levels)
            print(name, about[name], flush=True)
        if (found := best_uniform(job, store)) is not None:
            level, genome = found
            levels = {u: normalize(x) for u, x in job.space.levels(genome).items()}
            functions[f"{level} (at most {bits})"] = scorer(job, store, levels)
            about[f"{level} (at most {bits})"] = {
                "bits_per_weight": job.space.bits_per_weight(genome)
            }
    for name, level, store_job, store in controls(words):
        levels = {unit: normalize(level) for unit in store.units}
        functions[name] = scorer(store_job, store, levels)
        genome = store_job.space.genome({u: str(x) for u, x in levels.items()})
        about[name] = {"bits_per_weight": store_job.space.bits_per_weight(genome)}
    tokens = tokenize_file(words.test, job.tokenizer)
    start = time.time()
    reports = compare_many(
        functions, job.model, tokens, window=words.window, max_windows=words.windows
    )
    rows = [
        {
            "plan": name,
            **about[name],
            "perplexity": report.perplexity,
            "kl_nats": report.kl_nats,
            "kl_standard_error": report.kl_standard_error,
            "top1_agreement": report.top1_agreement,
            "kl_windows": list(report.kl_windows),
        }
        for name, report in reports.items()
    ]
    dense = next(iter(reports.values())).dense_perplexity
    show(rows, dense)
    print(f"evaluated in {time.time() - start:.0f} s")
    if words.out:
        Path(words.out).write_text(json.dumps({"dense_perplexity": dense, "rows": rows}, indent=1))


def share(job: Job, other: Job | None) -> Job:
    """Return `job` with the model and tokens that another job of the same recipe has loaded."""
    if other is not None:
        job.take_over(other)
    return job


def recipe(words: argparse.Namespace, bits: float, strategy: str) -> Recipe:
    settings: dict[str, Any] = {}
    if words.generations and strategy in ("evolve", "evopress"):
        settings["generations"] = words.generations
    return Recipe.from_dict(
        {
            "model": words.model,
            "work": words.work,
            "budget": {"bits": bits},
            "ends": "dense",
            **({"levels": words.level} if words.level else {"families": words.family}),
            "data": data(words),
            "search": {
                "strategy": strategy,
                "settings": settings,
                "sensitivity_tokens": words.sensitivity_tokens,
            },
        }
    )


def data(words: argparse.Namespace) -> dict[str, Any]:
    counts = {"calibration": words.calibration, "search": words.search, "heldout": 2, "test": 0}
    return {"sources": [words.data], "seq_len": words.seq_len, **counts}


def controls(words: argparse.Namespace) -> list[tuple[str, str, Job, Any]]:
    made = []
    if words.controls:
        levels = {
            name.format(bits=b): level.format(bits=b)
            for name, level in CONTROLS.items()
            for b in words.controls
        }
        job = Job(
            Recipe.from_dict(
                {
                    "model": words.model,
                    "work": f"{words.work}-controls",
                    "budget": {"ratio": 1.0},
                    "ends": "dense",
                    "levels": list(levels.values()),
                    "data": data(words),
                    "search": {"sensitivity_tokens": 0},
                }
            )
        )
        store = build_levels(job)
        made = [(name, level, job, store) for name, level in levels.items()]
    return made


def scorer(job: Job, store: Any, levels: Any) -> Any:
    evaluator = job.evaluator(store)
    return lambda ids: evaluator.logits(levels, ids)


def show(rows: list[dict[str, Any]], dense: float | None) -> None:
    print(f"\ndense perplexity {dense:.2f}\n")
    print("| plan | stored bits | perplexity | KL (nats) | same top-1 | search tokens |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['plan']} | {row['bits_per_weight']:.3f} | {row['perplexity']:.2f} "
            f"| {row['kl_nats']:.4f} | {row['top1_agreement']:.1%} "
            f"| {row.get('evaluated_tokens', '')} |"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration and search text")
    parser.add_argument("--test", required=True, help="evaluation text")
    parser.add_argument("--work", default="demo/quality.work")
    parser.add_argument("--bits", type=float, nargs="+", default=[3.3])
    parser.add_argument("--strategies", nargs="+", default=["knapsack", "evolve"])
    parser.add_argument("--controls", type=int, nargs="*", default=[3, 4], help="bit-widths")
    parser.add_argument("--level", action="extend", nargs="+", help="default: the default menu")
    parser.add_argument(
        "--family", action="extend", nargs="+", default=[], help="instead of levels"
    )
    parser.add_argument("--generations", type=int)
    parser.add_argument("--sensitivity-tokens", type=int, default=6144)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--calibration", type=int, default=52)
    parser.add_argument("--search", type=int, default=16)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
