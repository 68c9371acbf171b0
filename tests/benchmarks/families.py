"""Every family under one budget: sparsity, drops, low rank, and all of them against bits alone.

    python tests/benchmarks/families.py drop .cache/SmolLM2-135M-Instruct \
        --data calibration.txt --test wiki.test.raw --at 0.125 0.25 --out drop.json

Tasks: sparsity and lowrank (--at: shares of weights or parameters removed), drop (--at: shares of
attention and of MLP sub-blocks), joint (--at: stored bits per weight), monotone (pairs of drop
plans of which the larger is the better one). All rows of a task are evaluated in one pass over
the same windows: differences between rows are paired, and their standard errors are given.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_evopress.calibration.data import tokenize_file
from hf_evopress.calibration.input_moments import load_stats
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.jobs.measure import best_uniform
from hf_evopress.jobs.plan_search import run_search, tables
from hf_evopress.methods import compose
from hf_evopress.plans.level import DROP, Level
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.scoring.baseline_scores import pq_shares
from hf_evopress.scoring.evaluate import compare_many
from hf_evopress.search.paired import compare
from hf_evopress.store.level_store import LevelStore

FAMILIES: dict[str, dict[str, Any]] = {
    "bits": {"families": ["quant"]},
    "bits + ranks": {"families": ["residual"]},
    "bits + drops": {"families": ["quant"], "drop": {"kinds": ["attention", "mlp"]}},
    "everything": {"families": ["all"], "drop": {"kinds": ["attention", "mlp"]}},
}
DEPTH = ("block_influence", "window", "drop_perplexity", "knapsack")


@dataclass
class Found:
    """One row: a plan, the job that scores it, and what finding it took."""

    name: str
    job: Job
    store: LevelStore
    levels: Mapping[str, Level]
    bits: float
    about: dict[str, Any] = field(default_factory=dict)


class Bench:
    """Jobs that share one model, one tokenizer and the same tokens."""

    def __init__(self, words: argparse.Namespace) -> None:
        self.words = words
        self.last: Job | None = None

    def job(self, budget: Mapping[str, float], strategy: str = "evolve", **more: Any) -> Job:
        words = self.words
        counts = {"calibration": words.calibration, "search": words.search, "heldout": 2, "test": 0}
        settings: dict[str, Any] = {"generations": words.generations}
        if words.tokens:
            settings["tokens"] = words.tokens
        if words.patience:
            settings["patience"] = words.patience
        recipe = {
            "model": words.model,
            "work": words.work,
            "budget": dict(budget),
            "ends": "dense",
            "data": {"sources": [words.data], "seq_len": words.seq_len, **counts},
            "search": {
                "strategy": strategy,
                "settings": settings,
                "dtype": words.dtype,
                "start": words.start,
            },
            **more,
        }
        job = Job(Recipe.from_dict(recipe))
        if self.last is not None:
            job.take_over(self.last)
        self.last = job
        return job

    def found(
        self, name: str, job: Job, store: LevelStore, strategy: str | None = None, **more: Any
    ) -> Found:
        """Return the plan of a strategy, of the recipe's own without one."""
        start = time.process_time()
        search = run_search(job, store, strategy, **more)
        about = {
            "evaluated_tokens": search.run.evaluated_tokens,
            "cpu_seconds": round(time.process_time() - start, 1),
            "generations": max(0, len(search.history) - 1),
        }
        print(f"{name}: {about}", flush=True)
        genome = search.best
        bits = job.space.bits_per_weight(genome)
        return Found(name, job, store, job.levels(genome), bits, about)


def drops(bench: Bench) -> Iterator[Found]:
    for share in bench.words.at:
        job = bench.job({"drop": share}, "swap", drop={"tokens": bench.words.drop_tokens})
        store = build_levels(job)
        rivals = [bench.found(f"{share:.1%}: {s}", job, store, s) for s in DEPTH]
        yield from rivals
        starts = [job.genome(rival.levels) for rival in rivals]
        yield bench.found(f"{share:.1%}: searched", job, store, starts=starts)


def sparsity(bench: Bench) -> Iterator[Found]:
    for share in bench.words.at:
        job = bench.job({"sparsity": share})
        store = build_levels(job)
        yield from uniform(f"sparsity {share}", job, store)
        rivals = [
            bench.found(f"sparsity {share}: {strategy}", job, store, strategy)
            for strategy in ("owl", "pq_index", "layer_error", "knapsack")
        ]
        yield from rivals
        searched = bench.found(f"sparsity {share}: searched", job, store)
        for rival in rivals:
            rank = spearman(sparsities(rival), sparsities(searched))
            print(f"{rival.name}: rank correlation with what was searched {rank:.2f}", flush=True)
        shares = pq_shares(job.model, job.problem.units, partial(load_stats, job.work))
        kept = torch.tensor([shares[unit] for unit in sorted(searched.levels)])
        rank = spearman(kept, 1 - sparsities(searched))
        print(f"shares that SAP keeps at least: rank correlation with those kept {rank:.2f}")
        yield searched


def sparsities(found: Found) -> Tensor:
    """Return the sparsity of each layer (units,), in the order of their names."""
    first = [next(compose.parts(level))[1] for _, level in sorted(found.levels.items())]
    return torch.tensor([float(params.get("sparsity", 0.0)) for params in first])


def spearman(x: Tensor, y: Tensor) -> float:
    """Return Spearman's rank correlation of x and y (n,), equal values sharing a mean rank."""
    ranks = [torch.stack([(v < z).sum() + (v == z).sum() / 2 for z in v]) for v in (x, y)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def lowrank(bench: Bench) -> Iterator[Found]:
    for share in bench.words.at:
        job = bench.job({"sparsity": share}, families=["lowrank"])
        store = build_levels(job)
        name = f"ranks, {1 - share:g} of values"
        yield from uniform(name, job, store)
        yield bench.found(f"{name}: knapsack", job, store, "knapsack")
        yield bench.found(f"{name}: searched", job, store)


def joint(bench: Bench) -> Iterator[Found]:
    everything = bench.job({"ratio": 1.0}, **FAMILIES["everything"])
    build_levels(everything)  # the stores of the parts are served from it
    for bits in bench.words.at:
        parts: list[Found] = []
        for name in bench.words.parts:
            job = bench.job({"bits": bits}, **FAMILIES[name])
            store = build_levels(job)
            starts = [job.genome(part.levels) for part in parts] if name == "everything" else []
            starts += job.starts
            parts.append(bench.found(f"{bits} bits: {name}", job, store, starts=starts))
            yield parts[-1]
        yield from uniform(f"{bits} bits", job, store)


def uniform(budget: str, job: Job, store: LevelStore) -> Iterator[Found]:
    """Yield the dearest uniform plan within the budget, if there is one."""
    if (found := best_uniform(job, store)) is not None:
        name, genome = found
        bits = job.space.bits_per_weight(genome)
        yield Found(f"{budget}: {name}", job, store, job.levels(genome), bits)


def monotone(bench: Bench) -> None:
    """Search pairs of drop plans, one within the other, for one where the larger is better.

    Pairs of the sub-blocks that cost most alone: there a second drop can undo what the first
    does. Found on the first --tokens, confirmed on as many fresh ones as the second number says.
    """
    job = bench.job({"drop": 0.1}, drop={"tokens": bench.words.drop_tokens})
    store = build_levels(job)
    with job.computing_in(job.search_dtype):
        show_pairs(bench.words, job, store)


def show_pairs(words: argparse.Namespace, job: Job, store: LevelStore) -> None:
    table = tables(job).of("knapsack", store)
    if table is None:
        raise ValueError("single drops were not measured")
    cost = {g.units[0]: row[0] for g, row in zip(job.space.genes, table, strict=True)}
    worst = sorted(cost, key=lambda name: -cost[name])[: words.pairs_of]
    evaluator = job.evaluator(store)
    found_on, confirmed_on = (max(2, n // words.seq_len) for n in words.tokens or (2048, 8192))
    first, rest = range(found_on), range(found_on, found_on + confirmed_on)
    pairs = list(combinations(worst, 2))
    plans = [{name: DROP} for name in worst] + [dict.fromkeys(pair, DROP) for pair in pairs]
    losses = evaluator.losses(plans, first)
    single = dict(zip(worst, losses, strict=False))
    gains = []
    for pair, loss in zip(pairs, losses[len(worst) :], strict=True):
        for name in pair:
            measured = compare(loss, single[name])
            gains.append((measured.mean, measured, name, pair))
    gains.sort(key=lambda gain: gain[0])
    print(f"{len(pairs)} pairs of the {len(worst)} dearest sub-blocks, {found_on} sequences")
    for _, measured, name, pair in gains[:5]:
        plans = [{name: DROP}, dict.fromkeys(pair, DROP)]
        small, large = evaluator.losses(plans, rest)
        again = compare(large, small)
        other = next(other for other in pair if other != name)
        print(
            f"drop {name}: KL {sum(small) / len(small):.4f}; {other} as well: "
            f"{sum(large) / len(large):.4f}, difference {again.mean:+.4f} +- {again.stderr:.4f} "
            f"on {again.n} fresh sequences ({measured.mean:+.4f} where it was found)"
        )


TASKS = {"drop": drops, "sparsity": sparsity, "lowrank": lowrank, "joint": joint}


def main() -> None:
    words = arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    bench = Bench(words)
    if words.task == "monotone":
        monotone(bench)
        return
    found = list(TASKS[words.task](bench))
    if words.plans:
        save_plans(found, Path(words.plans))
    functions: dict[str, Any] = {}
    for row in found:
        evaluator = row.job.evaluator(row.store)
        functions[row.name] = lambda ids, e=evaluator, x=row.levels: e.logits(x, ids)
    model = found[0].job.model
    tokens = tokenize_file(words.test, found[0].job.tokenizer)
    start = time.time()
    reports = compare_many(functions, model, tokens, window=words.window, max_windows=words.windows)
    rows = [
        {
            "plan": row.name,
            "bits_per_weight": row.bits,
            **row.about,
            "perplexity": reports[row.name].perplexity,
            "kl_nats": reports[row.name].kl_nats,
            "kl_windows": list(reports[row.name].kl_windows),
            "levels": {unit: str(level) for unit, level in row.levels.items()},
        }
        for row in found
    ]
    dense = next(iter(reports.values())).dense_perplexity
    show(rows, dense, words)
    print(f"evaluated in {time.time() - start:.0f} s")
    if words.out:
        Path(words.out).write_text(json.dumps({"dense_perplexity": dense, "rows": rows}, indent=1))


def save_plans(found: list[Found], folder: Path) -> None:
    """Write each row's plan, such as 3.3-bits-everything.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in found:
        name = re.sub(r"[^\w.]+", "-", row.name).strip("-")
        (folder / f"{name}.json").write_text(row.job.plan(row.levels).to_json(), encoding="utf-8")


def show(rows: list[dict[str, Any]], dense: float | None, words: argparse.Namespace) -> None:
    n = len(rows[0]["kl_windows"])
    print(f"\n{n} windows of {words.window} tokens, dense perplexity {dense:.2f}\n")
    print(
        "| plan | stored bits | perplexity | KL (nats) | against the last of its budget | tokens |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        same = [r for r in rows if r["plan"].partition(":")[0] == row["plan"].partition(":")[0]]
        last = next((r for r in same if r["plan"].endswith(("searched", "everything"))), same[-1])
        paired = compare(last["kl_windows"], row["kl_windows"])
        print(
            f"| {row['plan']} | {row['bits_per_weight']:.3f} | {row['perplexity']:.2f} "
            f"| {row['kl_nats']:.4f} | {paired.mean:+.4f} +- {paired.stderr:.4f} "
            f"| {row.get('evaluated_tokens', '')} |"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=[*TASKS, "monotone"])
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration and search text")
    parser.add_argument("--test", required=True, help="evaluation text")
    parser.add_argument("--at", type=float, nargs="+", default=[])
    parser.add_argument("--work", default="demo/families.work")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"],
                        help="to search in; bfloat16 is twice as fast on some CPUs")  # fmt: skip
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", help="of the strategy's rounds")
    parser.add_argument("--patience", type=int, help="generations without success")
    parser.add_argument("--start", nargs="+", default=[], help="plans to begin with")
    parser.add_argument("--parts", nargs="+", default=[*FAMILIES], choices=[*FAMILIES],
                        help="of joint: rows to search")  # fmt: skip
    parser.add_argument("--drop-tokens", type=int, default=2048)
    parser.add_argument("--pairs-of", type=int, default=12)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--search", type=int, default=32)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--plans", help="folder to write the plan of each row to")
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
