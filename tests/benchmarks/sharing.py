"""Neighbouring blocks that share their weights: what one tensor for two layers costs and saves.

    python tests/benchmarks/sharing.py .cache/SmolLM2-135M-Instruct --work w --test wiki.test.raw \
        --pairs 2 14 26 --level gptq:bits=4,group_size=64 --rank 0 32 \
        --against gptq:bits=2,group_size=64

Each pair is blocks n and n + 1. Of two layers with weights A and B and second moments of their
inputs G and H, the shared weight is the best for both outputs, (A G + B H) (G + H)^-1; it is stored
at --level, once, and each layer's own difference from it as `lowrank` of 8 bits. Statistics are
those that `methods.py` left in the work folder. Prints stored bits per weight of the pairs' layers,
their mean relative output error on held-out text, and KL (none with --windows 0), against one level
for each layer alone.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from methods import Made, for_all, logits, make
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_evopress.calibration.data import tokenize_file
from hf_evopress.calibration.input_moments import load_stats
from hf_evopress.methods.compose import compress, cost_bits, decompress, normalize
from hf_evopress.methods.maths.linalg import Stats
from hf_evopress.plans.level import Level
from hf_evopress.scoring.evaluate import compare_many


def shared(A: Tensor, B: Tensor, G: Tensor, H: Tensor) -> Tensor:
    """Return the weight with the least sum of both outputs' errors."""
    G, H = G.double(), H.double()
    M = G + H
    M.diagonal().add_(1e-6 * M.diagonal().mean())
    return torch.linalg.solve(M, (A.double() @ G + B.double() @ H).T).T.float()


def make_shared(level: Level, rank: int, dense: Any, work: str, first: int) -> Made:
    """Return the layers of blocks `first` and the next, with one tensor for two."""
    made, blocks = Made(), (first, first + 1)
    stats = [load_stats(work, number) for number in blocks]
    for one in stats[0]:
        names = [one, one.replace(f".{first}.", f".{first + 1}.")]
        Ws = [dense.get_submodule(name).weight.detach() for name in names]
        known = [part[name] for part, name in zip(stats, names, strict=True)]
        grams = [part.hessian() for part in known]
        S, shape = shared(*Ws, *grams), (Ws[0].shape[0], Ws[0].shape[1])
        state = compress(level, S, Stats(torch.stack(grams).mean(0)))
        base = decompress(level, state, shape, torch.float32)
        made.costs |= {names[0]: cost_bits(level, shape), names[1]: 0}
        for name, W, part in zip(names, Ws, known, strict=True):
            own = base
            if rank:
                term = normalize(f"lowrank:rank={rank},factors=int8")
                state = compress(term, W - base, part)
                own = base + decompress(term, state, shape, torch.float32)
                made.costs[name] += cost_bits(term, shape)
            H = part.gram if part.heldout is None else part.heldout
            d = W - own
            made.errors[name] = float(((d @ H) * d).sum() / ((W @ H) * W).sum())
            made.weights[name] = own
    return made


def joined(parts: list[Made]) -> Made:
    """Return several pairs as one."""
    total = Made()
    for part in parts:
        total.weights |= part.weights
        total.errors |= part.errors
        total.costs |= part.costs
    return total


def main(words: argparse.Namespace) -> None:
    torch.set_num_threads(words.threads)
    dense = AutoModelForCausalLM.from_pretrained(words.model, dtype=torch.float32).eval()
    rival = copy.deepcopy(dense)
    tokens = tokenize_file(Path(words.test), AutoTokenizer.from_pretrained(words.model))
    blocks = [n for first in words.pairs for n in (first, first + 1)]
    rows: dict[str, Made] = {}
    for rank in words.rank:
        pairs = [
            make_shared(normalize(words.level), rank, dense, words.work, first)
            for first in words.pairs
        ]
        rows[f"shared {words.level}, rank {rank} each"] = joined(pairs)
    for text in words.against:
        rows[text] = make(for_all(text), dense, words.work, blocks)
    if not words.windows:
        print("| layers of the pairs | stored bits | held-out error |\n|---|---|---|")
        for name, made in rows.items():
            print(f"| {name} | {made.bits:.3f} | {made.error:.4f} |")
        return
    functions = {
        name: lambda ids, made=made: logits(rival, made.weights, ids) for name, made in rows.items()
    }
    reports = compare_many(functions, dense, tokens, window=words.window, max_windows=words.windows)
    print("| layers of the pairs | stored bits | held-out error | KL (nats) |\n|---|---|---|---|")
    for name, made in rows.items():
        report = reports[name]
        error = report.kl_standard_error  # None of a single window
        noise = "" if error is None else f" ± {error:.4f}"
        print(f"| {name} | {made.bits:.3f} | {made.error:.4f} | {report.kl_nats:.4f}{noise} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--test", required=True, help="evaluation text")
    parser.add_argument("--work", default="demo/methods.work")
    parser.add_argument("--pairs", type=int, nargs="+", default=[2, 14, 26])
    parser.add_argument("--level", default="gptq:bits=4,group_size=64")
    parser.add_argument("--rank", type=int, nargs="+", default=[0, 32])
    parser.add_argument("--against", action="append", required=True)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    main(parser.parse_args())
