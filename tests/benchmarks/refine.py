"""What refinement is worth: KL, perplexity and CPU seconds of plans before and after, same bytes.

    python tests/benchmarks/refine.py .cache/SmolLM2-135M-Instruct \
        --data calibration.txt --test wiki.test.raw --bits 2.8 3.3 --modes fast best+end-to-end \
        --plans uniform knapsack --out refine.json

Modes: fast, best, end-to-end, and fast or best followed by +end-to-end. Plans: uniform, knapsack,
and files of plans, such as those that tests/benchmarks/search.py leaves: with the best five of
a search one sees whether refinement changes their order.

The plans come from the level store that tests/benchmarks/quality.py leaves in --work. Every row
is evaluated in one pass over the same windows, so differences between rows are paired. Blocks
that are finished are kept in --work: a run that was stopped goes on, and reports the CPU seconds
of what it did itself.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_evopress.adapters.by_name import load
from hf_evopress.base.devices import has_bfloat16
from hf_evopress.base.fingerprint import text_fingerprint
from hf_evopress.calibration.data import tokenize_file
from hf_evopress.calibration.output_moments import load_moments
from hf_evopress.export.evopress import EvoPressExport
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.jobs.measure import best_uniform
from hf_evopress.jobs.plan_search import find_plan
from hf_evopress.jobs.refinement import distil
from hf_evopress.plans.plan import Plan
from hf_evopress.recipes.recipe import END_TO_END, Recipe
from hf_evopress.refine.block_tuning import Tuning
from hf_evopress.refine.blockwise import Settings, refine
from hf_evopress.scoring.evaluate import compare_many
from hf_evopress.store.level_store import LevelStore


def main() -> None:
    words = arguments()
    functions: dict[str, Any] = {}
    about: dict[str, dict[str, Any]] = {}
    job = None
    for bits in words.bits:
        job = share(Job(recipe(words, bits)), job)
        store = LevelStore(f"{words.work}/store") if words.as_is else build_levels(job)
        for kind in words.plans:
            levels, stored = plan_of(kind, job, store)
            if levels is None:
                print(f"no uniform plan fits {bits} bits")
                continue
            for mode in ("none", *words.modes):
                name = f"{kind} {bits} {mode}"
                start = time.process_time()
                blockwise = mode.removesuffix(END_TO_END).rstrip("+") or "none"
                states = refined(job, store, levels, blockwise, words)
                functions[name] = partial(job.evaluator(states).logits, levels)
                if mode.endswith(END_TO_END):
                    functions[name] = distilled(job, states, levels, words)
                about[name] = {
                    "bits_per_weight": stored,
                    "cpu_seconds": round(time.process_time() - start),
                }
                print(name, about[name], flush=True)
    assert job is not None
    tokens = tokenize_file(words.test, job.tokenizer)
    reports = compare_many(
        functions, job.model, tokens, window=words.window, max_windows=words.windows
    )
    rows = []
    print("\n| plan | stored bits | perplexity | KL (nats) | same top-1 | CPU s |")
    print("|---|---|---|---|---|---|")
    for name, report in reports.items():
        row = {
            "plan": name,
            **about[name],
            "perplexity": report.perplexity,
            "kl_nats": report.kl_nats,
            "kl_windows": list(report.kl_windows),
            "top1_agreement": report.top1_agreement,
        }
        rows.append(row)
        print(
            f"| {name} | {row['bits_per_weight']:.3f} | {report.perplexity:.2f} | "
            f"{report.kl_nats:.4f} | {report.top1_agreement:.1%} | {row['cpu_seconds']} |"
        )
    if words.out:
        Path(words.out).write_text(json.dumps({"settings": vars(words), "rows": rows}, indent=1))


def refined(job: Job, store: Any, levels: Any, mode: str, words: argparse.Namespace) -> Any:
    """Return the states of levels after `mode`, from the files of an earlier run if any."""
    if mode == "none":
        return store
    tuning = Tuning(
        steps=words.steps,
        batch=words.batch,
        code_rate=words.code_rate,
        float_rate=words.float_rate,
        zero_rate=words.zero_rate,
        bfloat16=has_bfloat16(job.model.device),
    )
    settings = Settings(mode, tuple(words.alphas), tuning)
    name = text_fingerprint(
        repr(settings),
        str(words.sequences),
        str(sorted(levels.items())),
        *([str(words.written)] if words.written else []),
    )
    return refine(
        job.model,
        store,
        levels,
        torch.cat([job.tokens["calibration"][: words.sequences], job.written]),
        job.tokens["heldout"],
        Path(words.work) / "refined" / name,
        settings=settings,
        moments=partial(load_moments, words.work),
        progress=lambda *done: print(*done, f"{time.process_time():.0f} CPU s", flush=True),
    )


def distilled(job: Job, states: Any, levels: Any, words: argparse.Namespace) -> Any:
    """Return the model of these states after distillation of its floats, from its checkpoint."""
    wanted = (job.recipe.distil, words.written, getattr(states, "refined", ""), levels)
    folder = Path(words.work) / "distilled" / text_fingerprint(*map(str, wanted))
    if not (folder / "config.json").is_file():
        source, plan, tokenizer = Path(f"{folder}.source"), job.plan(levels), job.tokenizer
        if not (source / "config.json").is_file():
            EvoPressExport().save(job.load_model(), plan, states.state, source, tokenizer=tokenizer)
        _, plan = distil(job, plan, source)
        print(plan.results["distilled"], flush=True)
        source.rename(folder)
    return load(str(folder))


def plan_of(kind: str, job: Job, store: Any) -> tuple[Any, float]:
    if kind not in ("uniform", "knapsack"):
        levels = dict(Plan.load(kind).levels)
        return levels, job.space.bits_per_weight(job.space.genome(levels))
    if kind != "uniform":
        plan = find_plan(job, store)
        return dict(plan.levels), plan.budget["bits_per_weight"]
    found = best_uniform(job, store)
    if found is None:
        return None, 0.0
    return job.levels(found[1]), job.space.bits_per_weight(found[1])


def share(job: Job, other: Job | None) -> Job:
    """Return `job` with the model and tokens that another job of the same recipe has loaded."""
    if other is not None:
        job.take_over(other)
    return job


def recipe(words: argparse.Namespace, bits: float) -> Recipe:
    counts = {"calibration": words.calibration, "search": words.search, "heldout": 2, "test": 0}
    counts["written"] = words.written
    return Recipe.from_dict(
        {
            "model": words.model,
            "work": words.work,
            "budget": {"bits": bits},
            "ends": "dense",
            **({"levels": words.level} if words.level else {}),
            **({"families": words.family} if words.family else {}),
            "data": {"sources": [words.data], "seq_len": words.seq_len, **counts},
            "search": {
                "strategy": "knapsack",
                "sensitivity_tokens": words.sensitivity_tokens,
            },
            "refine": "best+end-to-end",
            "distil": {"steps": words.distil_steps, "learning_rate": words.distil_lr},
        }
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--test", required=True, help="evaluation text")
    parser.add_argument("--work", default="demo/quality.work")
    parser.add_argument("--as-is", action="store_true", help="take the store in --work unchecked")
    parser.add_argument("--bits", type=float, nargs="+", default=[3.3])
    parser.add_argument("--plans", nargs="+", default=["knapsack"], help="uniform, knapsack")
    parser.add_argument("--modes", nargs="+", default=["fast", "best"])
    parser.add_argument("--alphas", type=float, nargs="+", default=list(Settings().alphas))
    tuning = Tuning()
    parser.add_argument("--steps", type=int, default=tuning.steps)
    parser.add_argument("--batch", type=int, default=tuning.batch)
    parser.add_argument("--code-rate", type=float, default=tuning.code_rate)
    parser.add_argument("--zero-rate", type=float, default=tuning.zero_rate)
    parser.add_argument("--float-rate", type=float, default=tuning.float_rate)
    parser.add_argument("--distil-steps", type=int, default=100, help="of end-to-end")
    parser.add_argument("--distil-lr", type=float, help="learning rate of end-to-end")
    parser.add_argument("--written", type=int, default=0, help="sequences of the model's own text")
    parser.add_argument("--sequences", type=int, default=None, help="of calibration, to refine on")
    parser.add_argument("--level", action="extend", nargs="+", help="default: the default menu")
    parser.add_argument("--family", action="extend", nargs="+", help="such as all")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--sensitivity-tokens", type=int, default=6144)
    parser.add_argument("--calibration", type=int, default=52)
    parser.add_argument("--search", type=int, default=16)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
