"""GGUF files of ours beside llama.cpp's own mixes, at equal file size and in the same types.

    python tests/benchmarks/offgrid.py .cache/SmolLM2-135M-Instruct .cache/SmolLM2-135M-offgrid
    python tests/benchmarks/gguf_files.py .cache/SmolLM2-135M-offgrid --data calibration.txt \
        --test wiki.test.raw --mixes Q2_K Q3_K_M Q4_K_M Q5_K_M --windows 4

Each mix is made by ggml's quantiser with the importance matrix of the calibration text; its file
size, header and tokenizer included, is the budget of a search over the types of GGUF files,
embedding included (`compress --for gguf`). All are evaluated in the same pass over the same
windows, against the model that both are made from. With --write the files go to WORK/files, and
with --llama-cpp the perplexities of ours are those of llama.cpp itself as well.

With --blocks it stops at what each type is expected to lose in some blocks, with error feedback and
without:

    python tests/benchmarks/gguf_files.py .cache/SmolLM2-135M-offgrid --data calibration.txt \
        --test wiki.test.raw --blocks 14 --types q4_1 q5_0 q5_1 q8_0 q4_k
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from whole_file import gguf_mix

from hf_evopress.calibration.data import tokenize_file
from hf_evopress.export.gguf import FILE, GGUFExport, entries_of
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels, calibrated
from hf_evopress.jobs.plan_search import find_plan
from hf_evopress.methods import compose
from hf_evopress.methods.maths.ggml.types import KINDS
from hf_evopress.methods.menu import fits
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.scoring.evaluate import compare_many
from hf_evopress.store.level_store import Source


def main() -> None:
    words = arguments()
    first = Job(recipe(words, "1GB"))
    source = calibrated(first)
    if words.blocks:
        return show_losses(first, source, words)
    functions: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    # what both files hold besides the tensors that are quantised
    header = first.space.fixed_bits / 8 - sum(
        entry.size_bytes for entry in entries_of(first.model, {}) if len(entry.shape) == 1
    )
    for mix in words.mixes:
        functions[mix], tensors = gguf_mix(first, mix)
        rows[mix] = {"file": mix, "MB": tensors + header / 1e6}
        print(mix, f"{rows[mix]['MB']:.2f} MB", flush=True)
    for mix in words.mixes:
        job = Job(recipe(words, str(int(rows[mix]["MB"] * 1e6))))
        job.take_over(first)
        store = build_levels(job)
        start = time.time()
        plan = find_plan(job, store)
        name, genome = f"ours <= {mix}", job.genome(plan.levels)
        levels, evaluator = job.levels(genome), job.evaluator(store)
        functions[name] = lambda ids, e=evaluator, x=levels: e.logits(x, ids)
        rows[name] = {
            "file": name,
            "MB": job.space.size_bytes(genome) / 1e6,
            "predicted": sum(store.scores(u, x)["sensitivity_nats"] for u, x in levels.items()),
            "types": dict(Counter(str(x.terms[0].kwargs["type"]) for x in levels.values())),
            "ends": [str(plan[u]) for u in plan.budget["ends_bytes"]],
            "search_seconds": round(time.time() - start),
        }
        if words.write:
            out = job.work / "files" / mix
            exporter = GGUFExport()
            exporter.save(job.load_model(), plan, store.state, out, tokenizer=job.tokenizer)
            rows[name]["path"] = str(out / FILE)
            rows[name]["MB"] = (out / FILE).stat().st_size / 1e6
        print(rows[name], flush=True)
    tokens = tokenize_file(words.test, first.tokenizer)
    reports = compare_many(
        functions, first.model, tokens, window=words.window, max_windows=words.windows
    )
    for name, report in reports.items():
        rows[name] |= {"kl_nats": report.kl_nats, "perplexity": report.perplexity}
        if words.llama_cpp and "path" in rows[name]:
            rows[name]["llama_cpp"] = perplexity_there(rows[name]["path"], tokens, words)
    show(rows, words.mixes, next(iter(reports.values())).dense_perplexity)
    if words.out:
        Path(words.out).write_text(json.dumps(list(rows.values()), indent=1))


def show_losses(job: Job, source: Source, words: argparse.Namespace) -> None:
    """Print the predicted loss of the layers of some blocks at each type that they take."""
    losses: dict[tuple[int, str, bool], float] = {}
    for unit in (u for u in job.units if u.block in words.blocks):
        stats, known = source.known([unit])
        W = job.model.get_submodule(unit.name).weight.detach().float()
        for kind, feedback in itertools.product(words.types, (False, True)):
            level = compose.normalize(f"gguf:type={kind},feedback={str(feedback).lower()}")
            if not fits(level, unit.shape):
                continue
            state = compose.compress(level, W, stats[unit.name])
            delta = W - compose.decompress(level, state, unit.shape, torch.float32)
            key = (unit.shape[1], kind, feedback)
            losses[key] = losses.get(key, 0.0) + known[unit.name](delta)
    print("| inputs | type | without feedback (mnats) | with | less |\n|---|---|---|---|---|")
    for width, kind in dict.fromkeys(key[:2] for key in losses):
        plain, fed = (1e3 * losses[width, kind, x] for x in (False, True))
        print(f"| {width} | {kind} | {plain:.4f} | {fed:.4f} | {1 - fed / plain:.0%} |")


def perplexity_there(path: str, tokens: torch.Tensor, words: argparse.Namespace) -> float:
    """Return the perplexity of a file on the same windows, as llama.cpp itself computes it."""
    import sys

    sys.path.append(str(Path(__file__).parent.parent))
    from llama_cpp import LlamaCpp

    model, nll = LlamaCpp(Path(path), n_context=words.window), 0.0
    for number in range(words.windows):
        ids = tokens[number * words.window : (number + 1) * words.window]
        spoken = model.logits(ids.tolist()).log_softmax(-1)
        nll -= float(spoken[:-1].gather(1, ids[1:, None]).mean()) / words.windows
    model.close()
    return math.exp(nll)


def recipe(words: argparse.Namespace, size: str) -> Recipe:
    counts = {"calibration": words.calibration, "search": words.search, "heldout": 2, "test": 0}
    settings = {"generations": words.generations} if words.strategy == "evolve" else {}
    return Recipe.from_dict(
        {
            "model": words.model,
            "work": words.work,
            "export": "gguf",
            "budget": {"size": size},
            "data": {"sources": [words.data], "seq_len": words.seq_len, **counts},
            "search": {
                "strategy": words.strategy,
                "settings": settings,
                "sensitivity_tokens": words.sensitivity_tokens,
            },
        }
    )


def show(rows: dict[str, dict[str, Any]], mixes: list[str], dense: float | None) -> None:
    print(f"\ndense perplexity {dense:.2f}\n")
    print("| file | MB | KL (nats) | perplexity | in llama.cpp | below the mix | types |")
    print("|---|---|---|---|---|---|---|")
    for name in (n for mix in mixes for n in (mix, f"ours <= {mix}")):
        row, mix = rows[name], name.removeprefix("ours <= ")
        below = "" if name == mix else f"{1 - row['kl_nats'] / rows[mix]['kl_nats']:.0%}"
        there = f"{row['llama_cpp']:.2f}" if "llama_cpp" in row else ""
        types = ", ".join(f"{n} {t}" for t, n in sorted(row.get("types", {}).items()))
        print(
            f"| {name} | {row['MB']:.1f} | {row['kl_nats']:.4f} | {row['perplexity']:.2f} "
            f"| {there} | {below} | {types} |"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration and search text")
    parser.add_argument("--test", required=True, help="evaluation text")
    parser.add_argument("--work", default="demo/gguf.work")
    parser.add_argument("--mixes", nargs="+", default=["Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M"])
    parser.add_argument("--strategy", default="knapsack")
    parser.add_argument("--generations", type=int, default=20)
    parser.add_argument("--sensitivity-tokens", type=int, default=24576)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--calibration", type=int, default=52)
    parser.add_argument("--search", type=int, default=16)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--write", action="store_true", help="write the files")
    parser.add_argument("--llama-cpp", action="store_true", help="evaluate them there, too")
    parser.add_argument("--blocks", nargs="*", type=int, help="predicted losses of these only")
    parser.add_argument("--types", nargs="+", default=list(KINDS))
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
