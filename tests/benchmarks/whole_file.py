"""Front of file size against KL: everything in the file bends, beside llama.cpp's own mixes.

    python tests/benchmarks/offgrid.py .cache/SmolLM2-135M-Instruct .cache/SmolLM2-135M-offgrid
    python tests/benchmarks/whole_file.py .cache/SmolLM2-135M-offgrid --data calibration.txt \
        --test wiki.test.raw --sizes 80MB 90MB 104MB 110MB --gguf Q4_K_M Q5_K_M

The model lies on no quantisation grid (see offgrid.py) and is compared with itself. llama.cpp's
mixes are made by ggml's own quantiser (pip install "hf-evopress[gguf]") and evaluated in the same
pass over the same windows. The importance matrix is that of the calibration text. Types whose
blocks do not divide a row fall back as they do in llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_evopress.calibration.data import tokenize_file
from hf_evopress.calibration.input_moments import load_stats
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.jobs.plan_search import find_plan
from hf_evopress.methods import compose
from hf_evopress.methods.maths.ggml.encoder import encode
from hf_evopress.methods.maths.ggml.types import KINDS
from hf_evopress.models.patching import patched
from hf_evopress.models.units import find_units
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.scoring.evaluate import compare_many

# what llama.cpp takes where a row is no multiple of 256
FALLBACK = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
PLAIN = {"Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K", "Q3_K_M": "Q3_K"}


def main() -> None:
    words = arguments()
    functions: dict[str, Any] = {}
    sizes: dict[str, float] = {}
    notes: dict[str, Any] = {}
    job: Job | None = None
    asked = [(size, words.ends) for size in words.sizes] + [
        (size, "dense") for size in words.before
    ]
    for size, bend in asked:
        new = Job(recipe(words, size, bend))
        if job is not None:
            new.take_over(job)
        job = new
        store = build_levels(job)
        plan = find_plan(job, store)
        levels = job.levels(job.genome(plan.levels))
        evaluator = job.evaluator(store)
        size = size if bend == words.ends else f"{size}, ends {bend}"
        functions[size] = lambda ids, e=evaluator, x=levels: e.logits(x, ids)
        sizes[size] = job.space.size_bytes(job.genome(plan.levels)) / 1e6
        ends = {u: str(plan[u]) for u in plan.budget.get("ends_bytes", {}) if u in plan}
        predicted = sum(store.scores(u, x).get("sensitivity_nats", 0.0) for u, x in levels.items())
        notes[size] = {
            "bits_per_weight": plan.budget["bits_per_weight"],
            "ends": ends,
            "predicted": predicted,
            "predicted_ends": sum(store.scores(u, levels[u])["sensitivity_nats"] for u in ends),
        }
        print(size, f"{sizes[size]:.1f} MB", notes[size], flush=True)
    assert job is not None  # argparse asks for a size
    for mix in words.gguf:
        functions[mix], sizes[mix] = gguf_mix(job, mix)
        print(mix, f"{sizes[mix]:.1f} MB", flush=True)
    start = time.time()
    tokens = tokenize_file(words.test, job.tokenizer)
    reports = compare_many(
        functions, job.model, tokens, window=words.window, max_windows=words.windows
    )
    rows = [
        {
            "file": name,
            "MB": round(sizes[name], 1),
            "kl_nats": report.kl_nats,
            "perplexity": report.perplexity,
            **notes.get(name, {}),
        }
        for name, report in reports.items()
    ]
    show(rows, next(iter(reports.values())).dense_perplexity)
    print(f"evaluated in {time.time() - start:.0f} s")
    if words.out:
        Path(words.out).write_text(json.dumps(rows, indent=1))


def recipe(words: argparse.Namespace, size: str, ends: str) -> Recipe:
    counts = {"calibration": words.calibration, "search": words.search, "heldout": 2, "test": 0}
    settings = {"generations": words.generations} if words.strategy == "evolve" else {}
    return Recipe.from_dict(
        {
            "model": words.model,
            "work": words.work,
            "budget": {"size": size},
            **({"levels": words.level} if words.level else {"families": words.family}),
            "ends": ends,
            "data": {"sources": [words.data], "seq_len": words.seq_len, **counts},
            "search": {
                "strategy": words.strategy,
                "settings": settings,
                "sensitivity_tokens": words.sensitivity_tokens,
            },
        }
    )


# -- llama.cpp ---------------------------------------------------------------------------------


def gguf_mix(job: Job, mix: str) -> tuple[Any, float]:
    """Return the logits of the model in one of llama.cpp's mixes, and the megabytes of tensors."""
    model, n_blocks, size = job.model, job.model.config.num_hidden_layers, 0
    weights: dict[str, Tensor] = {}
    units = {unit.name: unit for unit in find_units(model)}
    for block in range(n_blocks):
        stats = load_stats(job.work, block)
        for name in (u.name for u in units.values() if u.block == block):
            W = model.get_submodule(name).weight
            importance = stats[name].gram.diagonal()
            weights[name], n_bytes = quantised(W, kind_of(mix, name, block, n_blocks), importance)
            size += n_bytes
    embedding = model.get_input_embeddings().weight
    table, n_bytes = quantised(embedding, "Q8_0", None)
    size += n_bytes
    named = {id(p): p for p in model.parameters()}
    known = {id(model.get_submodule(u).weight) for u in units} | {id(embedding)}
    size += sum(4 * p.numel() for key, p in named.items() if key not in known)

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        forwards: dict[str, Any] = {}
        for name, W in weights.items():
            bias = model.get_submodule(name).bias
            forwards[name] = lambda x, W=W, b=bias: torch.nn.functional.linear(x, W, b)
        own = embedding.data
        embedding.data = table
        try:
            with patched(model, forwards):
                return model(input_ids=ids, use_cache=False).logits
        finally:
            embedding.data = own

    return logits, size / 1e6


def kind_of(mix: str, name: str, block: int, n_blocks: int) -> str:
    """Return the type that llama.cpp gives a layer of a model built as Llama is."""
    part = name.rpartition(".")[2]
    more = block < n_blocks // 8 or block >= 7 * n_blocks // 8 or (block - n_blocks // 8) % 3 == 2
    if mix in ("Q4_K_M", "Q5_K_M") and part in ("v_proj", "down_proj") and more:
        return "Q6_K"
    if mix == "Q3_K_M":
        if part == "v_proj":
            return "Q5_K" if block < 2 else "Q4_K"
        if part == "down_proj":
            return "Q5_K" if block < n_blocks // 16 else "Q4_K" if more else "Q3_K"
        return "Q4_K" if part == "o_proj" else "Q3_K"
    if mix == "Q2_K":
        return "Q3_K" if part in ("v_proj", "down_proj", "o_proj") else "Q2_K"
    return PLAIN.get(mix, mix)


def quantised(weight: Tensor, kind: str, importance: Tensor | None) -> tuple[Tensor, int]:
    """Return the weight that ggml's own codes of a type stand for, and their bytes."""
    name = kind.lower()
    if weight.shape[1] % KINDS[name].block:
        name = FALLBACK[kind].lower()
    blocks = encode(KINDS[name], weight, importance)
    level, shape = compose.normalize(f"gguf:type={name}"), (weight.shape[0], weight.shape[1])
    made = compose.decompress(level, {"blocks": blocks}, shape, weight.dtype)
    return made.to(weight.device), blocks.numel()


def show(rows: list[dict[str, Any]], dense: float | None) -> None:
    print(f"\ndense perplexity {dense:.2f}\n")
    print("| file | MB | KL (nats) | perplexity | decoder bits | ends |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        bits = f"{row['bits_per_weight']:.2f}" if "bits_per_weight" in row else ""
        ends = ", ".join(row.get("ends", {}).values())
        print(
            f"| {row['file']} | {row['MB']:.1f} | {row['kl_nats']:.4f} "
            f"| {row['perplexity']:.2f} | {bits} | {ends} |"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration and search text")
    parser.add_argument("--test", required=True, help="evaluation text")
    parser.add_argument("--work", default="demo/whole_file.work")
    parser.add_argument("--sizes", nargs="+", default=["80MB", "90MB", "104MB", "110MB"])
    parser.add_argument("--before", nargs="*", default=[], help="sizes, with the ends left dense")
    parser.add_argument("--gguf", nargs="*", default=[], help="mixes, such as Q4_K_M Q2_K")
    parser.add_argument("--strategy", default="knapsack")
    parser.add_argument("--ends", default="auto")
    parser.add_argument("--level", action="extend", nargs="+", help="default: the default menu")
    parser.add_argument(
        "--family", action="extend", nargs="+", default=[], help="instead of levels"
    )
    parser.add_argument("--generations", type=int, default=20)
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
