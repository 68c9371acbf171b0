"""Held-out loss against evaluated tokens and time, for every way to choose levels from one store.

    python tests/benchmarks/search.py .cache/SmolLM2-135M-Instruct --data calibration.txt \
        --test wiki.test.raw --bits 2.4 2.8 --out demo/search

uniform, a knapsack on relative layer errors, a knapsack on sensitivities, the published EvoPress
search and ours share one store, one pool of search text and one text to judge on, which none of
them sees. Every search is followed: its best plan after each generation is judged. Figures are
the KL on the teacher's top 256 tokens and one bucket for the rest, a lower bound of the full KL.
Each search is kept in OUT after each round, so that a run that was stopped goes on; its best plans
are in OUT/plans, and tests/benchmarks/refine.py takes them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from quality import data, share

from hf_evopress.base.resources import atomic_write
from hf_evopress.calibration.data import tokenize_file
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.jobs.plan_search import tables
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.scoring.evaluator import Evaluator
from hf_evopress.scoring.fitness.kl import KL
from hf_evopress.scoring.fitness.perplexity import Perplexity
from hf_evopress.search.ask_tell import Search
from hf_evopress.search.paired import compare
from hf_evopress.sharing.plots import pareto_plot
from hf_evopress.store.level_store import LevelStore

RUNS = {
    "uniform": "uniform",
    "layer-error knapsack": "knapsack",
    "knapsack": "knapsack",
    "evolve": "evolve",
    "evopress": "evopress",
}


def main() -> None:
    words = arguments()
    out = Path(words.out)
    out.mkdir(parents=True, exist_ok=True)
    job = None
    for bits in words.bits:
        job = share(Job(recipe(words, bits)), job)
        store, own = build_levels(job), job.model.dtype
        job.model.to(getattr(torch, words.dtype))
        pool = job.tokens["search"].reshape(-1, words.pool_len)
        evaluator = Evaluator(job.model, store, pool, KL())
        tracks = {name: follow(words, job, store, evaluator, name) for name in words.runs}
        judge(words, job, store, bits, tracks)
        keep_plans(job, bits, tracks, out / "plans")
        job.model.to(own)
        show(job, bits, tracks, words.runs[0])
        draw(tracks, out / f"search-{bits}.png")


def draw(tracks: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw loss against evaluated tokens; a plan that took none is a line across."""
    last = max(row["tokens"] for track in tracks.values() for row in track)
    series = {}
    for name, track in tracks.items():
        points = [(row["tokens"], row["kl"]) for row in track]
        series[name] = points if points[-1][0] else [(0, points[-1][1]), (last, points[-1][1])]
    names = {"size_name": "evaluated tokens", "loss_name": "KL on unseen text (nats)"}
    pareto_plot(series, path, **names)


def recipe(words: argparse.Namespace, bits: float) -> Recipe:
    return Recipe.from_dict(
        {
            "model": words.model,
            "work": words.work,
            "budget": {"bits": bits},
            "ends": "dense",
            "data": data(words),
            "search": {"sensitivity_tokens": words.sensitivity_tokens},
            **({"drop": {"kinds": ["attention", "mlp"]}} if words.drop else {}),
            **({"levels": words.level} if words.level else {}),
        }
    )


def follow(
    words: argparse.Namespace, job: Job, store: LevelStore, evaluator: Evaluator, name: str
) -> list[dict[str, Any]]:
    """Return the best plan after each generation, with tokens and seconds spent so far."""
    bits = job.recipe.budget.bits
    file = Path(words.out) / f"{bits}-{name.replace(' ', '-')}-seed{words.seed}.json"
    kept = json.loads(file.read_text()) if file.is_file() else {"track": [], "seconds": 0.0}
    search = Search(
        job.space,
        job.budget,
        strategy=RUNS[name],
        table=tables(job).of("layer_error" if name.startswith("layer") else "evolve", store),
        n_sequences=len(evaluator.tokens),
        seq_len=words.pool_len,
        seed=words.seed,
        **{"evolve": ours(words), "evopress": published(words)}.get(name, {}),
    )
    if "state" in kept:
        search.restore(kept["state"])
    track, seconds = kept["track"], kept["seconds"]
    start = time.perf_counter() - seconds
    while True:
        asked = search.ask()
        if search.history and (not track or len(search.history) > track[-1]["records"]):
            track.append(
                {
                    "records": len(search.history),
                    "genome": list(search.best),
                    "tokens": search.run.evaluated_tokens,
                    "seconds": time.perf_counter() - start,
                }
            )
        if asked is None:
            break
        plans = [job.levels(genome) for genome in asked.genomes]
        search.tell(evaluator.losses(plans, asked.sequences))
        spent = {"seconds": time.perf_counter() - start}
        atomic_write(file, json.dumps({"track": track, "state": search.state(), **spent}))
    if not track or track[-1]["genome"] != list(search.best):
        spent = {"tokens": search.run.evaluated_tokens, "seconds": time.perf_counter() - start}
        track.append({"records": len(search.history), "genome": list(search.best), **spent})
    atomic_write(file, json.dumps({"track": track, "state": search.state(), **spent_of(track)}))
    print(name, bits, spent_of(track), search.report.get("against", ""), flush=True)
    return track


def spent_of(track: list[dict[str, Any]]) -> dict[str, float]:
    return {"seconds": track[-1]["seconds"], "tokens": track[-1]["tokens"]}


def judge(
    words: argparse.Namespace,
    job: Job,
    store: LevelStore,
    bits: float,
    tracks: dict[str, list[dict[str, Any]]],
) -> None:
    """Add the loss on unseen text to every row: all plans on the same windows."""
    file = Path(words.out) / f"{bits}-judged-{words.windows}x{words.window}.json"
    known = json.loads(file.read_text()) if file.is_file() else {"kl": {}, "nll": {}}
    tokens = tokenize_file(words.test, job.tokenizer)[: words.windows * words.window]
    windows = tokens.reshape(-1, words.window)
    everyone = [tuple(row["genome"]) for track in tracks.values() for row in track]
    finals = [tuple(track[-1]["genome"]) for track in tracks.values()]
    for kind, fitness, genomes in (
        ("kl", KL(), everyone),
        ("nll", Perplexity(), finals),
    ):
        new = [g for g in dict.fromkeys(genomes) if json.dumps(g) not in known[kind]]
        if new:
            evaluator = Evaluator(job.model, store, windows, fitness)
            rows = evaluator.losses([job.levels(g) for g in new], range(len(windows)))
            known[kind] |= {json.dumps(g): row for g, row in zip(new, rows, strict=True)}
            atomic_write(file, json.dumps(known))
    for track in tracks.values():
        for row in track:
            row["windows"] = known["kl"][json.dumps(tuple(row["genome"]))]
            row["kl"] = sum(row["windows"]) / len(row["windows"])
        nll = known["nll"][json.dumps(tuple(track[-1]["genome"]))]
        track[-1]["perplexity"] = math.exp(sum(nll) / len(nll))


def keep_plans(
    job: Job, bits: float, tracks: dict[str, list[dict[str, Any]]], folder: Path
) -> None:
    """Write each distinct plan of each track, with its loss here: the last is the final one."""
    for name, track in tracks.items():
        distinct = {tuple(row["genome"]): row for row in track}
        for number, (genome, row) in enumerate(distinct.items()):
            plan = job.plan(job.levels(genome), results={"kl_nats": row["kl"]})
            plan.save(folder / f"{bits}-{name.replace(' ', '-')}-{number}.json")


def show(job: Job, bits: float, tracks: dict[str, list[dict[str, Any]]], first: str) -> None:
    base = tracks.get("knapsack", tracks[first])[-1]
    print(f"\n### {bits} bits per weight\n")
    print("| plan | stored bits | KL | against knapsack | perplexity | tokens | seconds |")
    print("|---|---|---|---|---|---|---|")
    for name, track in tracks.items():
        last = track[-1]
        paired = compare(last["windows"], base["windows"])
        against = "" if last is base else f"{paired.mean:+.4f} +- {paired.stderr:.4f}"
        stored = job.space.bits_per_weight(tuple(last["genome"]))
        print(
            f"| {name} | {stored:.3f} | {last['kl']:.4f} | {against} | {last['perplexity']:.2f} "
            f"| {last['tokens']:,} | {last['seconds']:.0f} |"
        )
    for name, track in tracks.items():
        if len(track) > 1:
            steps = ", ".join(f"{row['tokens']:,}: {row['kl']:.4f}" for row in track)
            print(f"\n{name}, KL by evaluated tokens: {steps}")
    if "evopress" in tracks and "evolve" in tracks:
        target = tracks["evopress"][-1]["kl"]
        reached = next((row for row in tracks["evolve"] if row["kl"] <= target), None)
        spent = tracks["evopress"][-1]["tokens"]
        if reached:
            share_of = reached["tokens"] / spent
            print(f"\nevolve reaches evopress's final KL in {share_of:.1%} of its tokens")


def ours(words: argparse.Namespace) -> dict[str, Any]:
    settings = {"generations": words.generations, "tokens": words.tokens}
    return {**settings, "offspring": words.offspring}


def published(words: argparse.Namespace) -> dict[str, Any]:
    return {
        "generations": words.evopress_generations,
        "tokens": words.evopress_tokens,
        "initial_tokens": words.evopress_tokens[0],
        "uniform": False,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration and search text")
    parser.add_argument("--test", required=True, help="text to judge on")
    parser.add_argument("--work", default="demo/quality.work", help="as tests/benchmarks/quality")
    parser.add_argument("--out", default="demo/search")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.8, 3.3, 3.8, 4.3])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--level", action="extend", nargs="+", help="default: the default menu")
    parser.add_argument("--drop", action="store_true", help="sub-blocks may be dropped as well")
    parser.add_argument("--sensitivity-tokens", type=int, default=6144)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"],
                        help="to compute in; bfloat16 is twice as fast on some CPUs")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generations", type=int, default=20)
    parser.add_argument("--offspring", type=int, default=6)
    parser.add_argument("--tokens", type=int, nargs=2, default=[2048, 8192])
    parser.add_argument("--evopress-generations", type=int, default=20)
    parser.add_argument("--evopress-tokens", type=int, nargs=2, default=[2048, 8192])
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--pool-len", type=int, default=512, help="sequences of the search")
    parser.add_argument("--calibration", type=int, default=52)
    parser.add_argument("--search", type=int, default=16)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
