"""Methods at equal stored bytes: one level on every linear layer, its KL, the time to make it.

    python tests/benchmarks/methods.py .cache/SmolLM2-135M-Instruct --data calibration.txt \
        --test wiki.test.raw --work w --level gptq:bits=3,group_size=64 --level dict:bits=3.3
    python tests/benchmarks/methods.py ... --blocks 5 15 25 --level ...     # these blocks only

Statistics of the inputs and of the outputs' gradients are made once per work folder. Prints per
level the stored bits per weight of the layers that have it, their mean relative output error on
text that is held out, the KL that they are expected to add, the KL from the dense model (none with
--windows 0), and the CPU seconds that making them took.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_evopress.calibration.data import tokenize_file
from hf_evopress.calibration.input_moments import load_stats
from hf_evopress.calibration.output_moments import kfac_loss, load_moments
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import calibrated
from hf_evopress.methods.compose import compress_stacked, cost_bits, decompress, normalize
from hf_evopress.plans.level import Level
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.scoring.evaluate import compare_many


class Made:
    """The weights of one level, and what they cost."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.errors: list[float] = []
        self.bits = self.numel = 0
        self.seconds = self.nats = 0.0


def make(level: Level, dense: Any, work: str, blocks: Sequence[int]) -> Made:
    """Return the layers of some blocks at `level`, those that share an input made together."""
    made = Made()
    for number in blocks:
        stats, G = load_stats(work, number), load_moments(work, number)
        inputs: dict[int, list[str]] = {}
        for name in stats:
            inputs.setdefault(id(stats[name]), []).append(name)
        for names in inputs.values():
            Ws = [dense.get_submodule(name).weight.detach() for name in names]
            known = stats[names[0]].with_outputs(map(G.get, names))
            start = time.process_time()
            states = compress_stacked(level, Ws, known)
            made.seconds += time.process_time() - start
            H = known.gram if known.heldout is None else known.heldout
            for name, W, state in zip(names, Ws, states, strict=True):
                shape = (W.shape[0], W.shape[1])
                made.weights[name] = decompress(level, state, shape, torch.float32)
                d = W - made.weights[name]
                if name in G:
                    made.nats += kfac_loss(d, known.hessian(), G[name])
                made.errors.append(float(((d @ H) * d).sum() / ((W @ H) * W).sum()))
                made.weights[name] = made.weights[name].bfloat16()
                made.bits += cost_bits(level, shape)
                made.numel += W.numel()
    return made


def logits(rival: Any, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Return what the dense model computes with these weights in the place of its own."""
    with torch.no_grad():
        for name, W in weights.items():
            rival.get_submodule(name).weight.copy_(W)
        return rival(ids).logits


def statistics(words: argparse.Namespace) -> None:
    """Make the statistics of the work folder, unless they are there."""
    blocks = AutoConfig.from_pretrained(words.model).num_hidden_layers
    last = f"block_{blocks - 1:05d}.safetensors"
    if all((Path(words.work) / part / last).is_file() for part in ("stats", "moments")):
        return
    recipe = Recipe.from_dict(
        {
            "model": words.model,
            "work": words.work,
            "budget": {"ratio": 1.0},
            "ends": "dense",
            "levels": ["rtn:bits=4,group_size=64"],  # statistics do not depend on the menu
            "data": {
                "sources": [words.data],
                "seq_len": words.seq_len,
                "calibration": words.calibration,
                "search": 4,
                "heldout": 2,
                "test": 0,
            },
            "search": {"sensitivity_tokens": words.sensitivity_tokens},
        }
    )
    calibrated(Job(recipe))


def main(words: argparse.Namespace) -> None:
    torch.set_num_threads(words.threads)
    statistics(words)
    dense = AutoModelForCausalLM.from_pretrained(words.model, dtype=torch.float32).eval()
    rival = copy.deepcopy(dense)
    blocks = words.blocks or range(dense.config.num_hidden_layers)
    tokens = tokenize_file(Path(words.test), AutoTokenizer.from_pretrained(words.model))
    rows: dict[str, Made] = {}
    for text in words.level:
        level = normalize(text)
        rows[str(level)] = made = make(level, dense, words.work, blocks)
        print(
            f"{level}: {made.bits / made.numel:.3f} bits, held-out error "
            f"{sum(made.errors) / len(made.errors):.5f}, predicted KL {made.nats:.4f}, "
            f"{made.seconds:.0f} CPU s",
            flush=True,
        )
    if not words.windows:
        return
    functions = {
        name: lambda ids, made=made: logits(rival, made.weights, ids) for name, made in rows.items()
    }
    reports = compare_many(functions, dense, tokens, window=words.window, max_windows=words.windows)
    print("| level | stored bits | held-out error | predicted KL | KL (nats) | CPU s |")
    print("|---|---|---|---|---|---|")
    for name, made in rows.items():
        report = reports[name]
        print(
            f"| {name} | {made.bits / made.numel:.3f} | {sum(made.errors) / len(made.errors):.4f} "
            f"| {made.nats:.3f} | {report.kl_nats:.4f} ± {report.kl_standard_error:.4f} "
            f"| {made.seconds:.0f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--test", required=True, help="evaluation text")
    parser.add_argument("--work", default="demo/methods.work")
    parser.add_argument("--level", action="append", required=True)
    parser.add_argument("--blocks", type=int, nargs="+")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--calibration", type=int, default=56)
    parser.add_argument("--sensitivity-tokens", type=int, default=40960)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    main(parser.parse_args())
