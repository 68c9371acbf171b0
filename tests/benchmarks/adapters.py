"""EoRA against other ways to spend the same bytes, on the task's text and on another one.

    hf-evopress levels MODEL --work WORK --data calibration.txt      # or any compress run
    python tests/benchmarks/adapters.py MODEL --work WORK --task task.txt --test wiki.test.raw

The base is a uniform level of WORK's store. At the bytes of a uniform rank: EoRA, EoRA aimed at
the dense model's outputs, ranks by knapsack, the plain SVD of the error, and the same bytes
spent on bits (knapsack over the store's levels by the same sensitivities). The first 4/5 of the
task's text calibrate, the rest is for measuring. Rows share windows: differences are paired.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_evopress.adapters.eora import Walk, attached
from hf_evopress.adapters.eora_ranks import ranks_for_size
from hf_evopress.adapters.folder import adapter_bytes
from hf_evopress.calibration.data import tokenize_file
from hf_evopress.calibration.output_moments import load_moments
from hf_evopress.loading.layers import compress_linear
from hf_evopress.methods.compose import cost_bits, normalize
from hf_evopress.methods.maths.metric import Metric
from hf_evopress.scoring.evaluate import compare_many
from hf_evopress.search import knapsack
from hf_evopress.search.space import SearchSpace
from hf_evopress.store.level_store import LevelStore


def main() -> None:
    words = arguments()
    store = LevelStore(words.work / "store")
    dense = AutoModelForCausalLM.from_pretrained(words.model, dtype=torch.float32).eval()
    dense.requires_grad_(False)
    base = at_levels(words.model, store, dict.fromkeys(store.units, words.level))
    tokenizer = AutoTokenizer.from_pretrained(words.model)
    task = tokenize_file(words.task, tokenizer)
    cut = len(task) * 4 // 5
    tokens = task[:cut][: words.tokens].view(-1, words.seq_len)
    rows = adapters(words, dense, base, tokens)
    shapes = {name: unit.shape for name, unit in store.units.items()}
    n_weights = sum(a * b for a, b in shapes.values())
    base_bits = sum(cost_bits(normalize(words.level), shape) for shape in shapes.values())
    size = adapter_bytes(shapes, dict.fromkeys(shapes, words.rank))
    levels = more_bits(store, base_bits + 8 * size)
    bits = {name: (base_bits + 8 * r["bytes"]) / n_weights for name, r in rows.items()}
    bits["more bits, knapsack"] = sum(cost_bits(normalize(x), shapes[n]) for n, x in levels.items())
    bits["more bits, knapsack"] /= n_weights
    models: dict[str, Any] = {name: scorer(base, r["factors"]) for name, r in rows.items()}
    models["more bits, knapsack"] = at_levels(words.model, store, levels)
    figures = {
        text: compare_many(models, dense, ids, window=words.window, max_windows=words.windows)
        for text, ids in (
            ("task", task[cut:]),
            ("other", tokenize_file(words.test, tokenizer)),
        )
    }
    show(figures, bits, rows)
    if words.out:
        made = {text: {n: r.to_dict() for n, r in found.items()} for text, found in figures.items()}
        Path(words.out).write_text(json.dumps({"bits": bits, "figures": made}, indent=1))


def adapters(words: argparse.Namespace, dense: Any, base: Any, tokens: Tensor) -> dict[str, Any]:
    """Return row -> factors, bytes and seconds of CPU."""
    made: dict[str, Any] = {"no adapter": {"factors": {}, "bytes": 0, "seconds": 0.0}}
    walk = Walk(base, dense, tokens)
    start = time.process_time()

    def add(name: str, factors: Any) -> None:
        nonlocal start
        size = sum(2 * (a.numel() + b.numel()) for a, b in factors.values())
        spent = time.process_time() - start
        made[name] = {"factors": factors, "bytes": size, "seconds": spent}
        print(f"{name}: {size / 1e6:.2f} MB, {spent:.0f} CPU s", flush=True)
        start = time.process_time()

    add(f"SVD rank {words.rank}", plain_svd(walk, words.rank))
    add(f"EoRA rank {words.rank}", walk.factors(lambda name, residual: words.rank))
    curves = walk.curves(lambda block: load_moments(words.work, block))
    shapes = {name: curve.shape for name, curve in curves.items()}
    size = adapter_bytes(shapes, dict.fromkeys(shapes, words.rank))
    ranks = ranks_for_size(curves, size)
    add("EoRA, ranks by bytes", walk.factors(lambda name, residual: ranks[name]))
    made["EoRA, ranks by bytes"]["ranks"] = by_type(ranks)
    aimed = Walk(base, dense, tokens, prefix=True)
    add(f"EoRA rank {words.rank}, prefix", aimed.factors(lambda name, residual: words.rank))
    return made


def plain_svd(walk: Walk, rank: int) -> dict[str, Any]:
    factors = {}
    for unit in walk.units:
        W = walk.dense.get_submodule(unit.name).weight.detach().float()
        delta = W - walk.compressed.get_submodule(unit.name).weight.detach().float()
        U = Metric(None, metric="plain").basis(delta)[1][:, :rank].float()
        factors[unit.name] = ((U.T @ delta).bfloat16(), U.bfloat16())
    return factors


def more_bits(store: LevelStore, limit_bits: int) -> dict[str, str]:
    """Return the levels of least predicted loss within `limit_bits`."""
    offered = {
        name: [(str(x), store.cost_bits(name, x)) for x in store.levels(name)]
        for name in store.units
    }
    weights = {name: unit.n_weights for name, unit in store.units.items()}
    space = SearchSpace.build(weights, offered)
    losses = [
        [store.scores(gene.units[0], x.level)["sensitivity_nats"] for x in gene.options]
        for gene in space.genes
    ]
    return space.levels(knapsack.solve(space, losses, limit_bits).genome)


def at_levels(model: str, store: LevelStore, levels: dict[str, str]) -> Any:
    made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for name, level in levels.items():
        linear = made.get_submodule(name)
        made.set_submodule(name, compress_linear(linear, level, store.state(name, level)))
    return made.requires_grad_(False)


def scorer(base: Any, factors: Any) -> Any:
    def logits(ids: Tensor) -> Tensor:
        with attached(base, factors):
            return base(input_ids=ids, use_cache=False).logits

    return logits


def by_type(ranks: dict[str, int]) -> dict[str, float]:
    found: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        found.setdefault(name.rpartition(".")[2], []).append(rank)
    return {kind: sum(of) / len(of) for kind, of in found.items()}


def show(figures: Any, bits: dict[str, float], rows: dict[str, Any]) -> None:
    texts = list(figures)
    for text in texts:
        dense = next(iter(figures[text].values())).dense_perplexity
        print(f"dense perplexity on {text}: {dense:.2f}")
    print("\n| plan | bits | " + " | ".join(f"{t} KL | {t} perplexity" for t in texts) + " |")
    print("|---" * (2 + 2 * len(texts)) + "|")
    for name in bits:
        cells = [
            f"{figures[t][name].kl_nats:.4f} | {figures[t][name].perplexity:.2f}" for t in texts
        ]
        print(f"| {name} | {bits[name]:.3f} | " + " | ".join(cells) + " |")
    for name, row in rows.items():
        if "ranks" in row:
            print(f"mean ranks of {name}: {row['ranks']}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True, help="with store and moments")
    parser.add_argument("--task", required=True, help="text to adapt to")
    parser.add_argument("--test", required=True, help="another text")
    parser.add_argument("--level", default="gptq:bits=3,group_size=64")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
