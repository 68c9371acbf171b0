"""One file of many sizes beside files made for each size: KL, bytes of the file, bytes read.

    python tests/benchmarks/stack.py .cache/SmolLM2-135M-Instruct --data calibration.txt \
        --test wiki.test.raw --work demo/stack --sizes 60MB 75MB 90MB

The model is stacked once and cut at each size, with a count of what is read of the one file. For
the same sizes the knapsack chooses among scalar codes (--level; by default the default menu), with
the same ends, and its files are written as well. Uniform levels are the yardstick that BitStack is
to beat. All plans are scored in one pass over the same windows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from hf_evopress.calibration.data import tokenize_file
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.jobs.pipeline import export
from hf_evopress.jobs.plan_search import find_plan
from hf_evopress.jobs.stack import menu, resize_checkpoint, stack
from hf_evopress.models.size import stored_bytes
from hf_evopress.plans.plan import Plan
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.scoring.evaluate import compare_many
from hf_evopress.sharing.checkpoint_source import LocalSource
from hf_evopress.store.level_store import LevelStore

UNIFORM = ["rtn:bits=3,group_size=64,clip=false", "rtn:bits=3,group_size=64"]


def main() -> None:
    words = arguments()
    rows: dict[str, dict[str, Any]] = {}
    functions: dict[str, Any] = {}

    def add(name: str, job: Job, store: LevelStore, levels: Any, **about: Any) -> None:
        genome, evaluator = job.genome(levels), job.evaluator(store)
        chosen = job.levels(genome)
        functions[name] = lambda ids: evaluator.logits(chosen, ids)
        rows[name] = {"bits_per_weight": job.space.bits_per_weight(genome), **about}
        print(f"{time.process_time():.0f} s", name, rows[name], flush=True)

    work = Path(words.work)
    folder = work / "sizes"
    job = Job(recipe(words, out=str(folder), levels=menu(words.blocks, 1)))
    stack(job.recipe)
    store = build_levels(job)
    print("layers whose error falls with each block:", falling(store), flush=True)
    for size in words.sizes:
        out = work / f"cut-{size}"
        read = n_read(partial(resize_checkpoint, str(folder), out, size=size, overwrite=True))
        plan = Plan.from_pretrained(out)
        add(f"stack at {size}", job, store, plan.levels, file=stored_bytes(out), read=read)
    for size in words.sizes:
        made = {"out": str(work / f"searched-{size}"), "budget": {"size": size}}
        other = share(Job(recipe(words, **made, levels=words.level)), job)
        found = build_levels(other)
        plan = find_plan(other, found)
        file = stored_bytes(export(other, found, plan))
        add(f"searched for {size}", other, found, plan.levels, file=file, read=file)
    other = share(Job(recipe(words, levels=UNIFORM)), job)
    found = build_levels(other)
    for level in UNIFORM:
        add(level, other, found, uniform(other, level))
    if words.blocks >= 4:
        add("bitstack:blocks=4", job, store, uniform(job, "bitstack:blocks=4"))
    tokens = tokenize_file(words.test, job.tokenizer)
    reports = compare_many(
        functions, job.model, tokens, window=words.window, max_windows=words.windows
    )
    for name, report in reports.items():
        rows[name] |= report.to_dict()
    (work / "rows.json").write_text(json.dumps(rows, indent=1))
    show(rows)
    print(f"{time.process_time():.0f} CPU seconds")


def recipe(words: argparse.Namespace, **about: Any) -> Recipe:
    counts = {"calibration": words.calibration, "search": 1, "heldout": 2, "test": 0}
    values = {
        "model": words.model,
        "work": f"{words.work}/work",
        "budget": {"bits": 32.0},
        "ends": words.ends,
        "data": {"sources": [words.data], "seq_len": words.seq_len, **counts},
        "search": {"strategy": "knapsack", "sensitivity_tokens": words.sensitivity_tokens},
        **about,
    }
    return Recipe.from_dict({key: value for key, value in values.items() if value is not None})


def share(job: Job, other: Job) -> Job:
    """Return `job` with the model and tokens that another job of the same recipe has loaded."""
    job.take_over(other)
    return job


def uniform(job: Job, level: str) -> dict[str, Any]:
    """Return a plan with one level for all layers; embedding and head have their own."""
    return {u.name: job.menus[u.name][-1] if u.is_end else level for u in job.units}


def falling(store: LevelStore) -> str:
    """Return how many layers have a smaller error with each block, on both texts."""
    units = [name for name, unit in store.units.items() if not unit.is_end]
    counts = []
    for score in ("error", "heldout_error"):
        errors = {u: [store.scores(u, x)[score] for x in store.levels(u)] for u in units}
        n = sum(all(b < a for a, b in pairwise(values)) for values in errors.values())
        counts.append(f"{score} {n} of {len(units)}")
    return ", ".join(counts)


def n_read(call: Callable[[], Any]) -> int:
    """Return the bytes that a call reads of safetensors files."""
    read, total = LocalSource.read, 0

    def counting(self: LocalSource, name: str, start: int, end: int) -> bytes:
        nonlocal total
        found = read(self, name, start, end)
        total += len(found) * name.endswith(".safetensors")
        return found

    LocalSource.read = counting  # type: ignore[method-assign]
    try:
        call()
    finally:
        LocalSource.read = read  # type: ignore[method-assign]
    return total


def show(rows: dict[str, dict[str, Any]]) -> None:
    print("\n| | file MB | read MB | bits per weight | KL (nats) | perplexity | same top-1 |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        file, read = (f"{row[key] / 1e6:.2f}" if key in row else "" for key in ("file", "read"))
        print(
            f"| {name} | {file} | {read} | {row['bits_per_weight']:.3f} "
            f"| {row['kl_nats']:.4f} ± {row.get('kl_standard_error', 0.0):.4f} "
            f"| {row['perplexity']:.2f} | {row['top1_agreement']:.1%} |"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--test", required=True, help="evaluation text")
    parser.add_argument("--work", default="demo/stack")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--sizes", nargs="+", default=["60MB", "75MB", "90MB"])
    parser.add_argument("--level", nargs="+", help="of the searched files; the default menu")
    parser.add_argument("--ends", default="rtn:bits=6,group_size=64")
    parser.add_argument("--sensitivity-tokens", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--calibration", type=int, default=16)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
