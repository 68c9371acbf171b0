"""Methods at equal stored bytes: one level on every linear layer, its KL, the time to make it.

    python tests/benchmarks/methods.py .cache/SmolLM2-135M-Instruct --data calibration.txt \
        --test wiki.test.raw --work w --level gptq:bits=3,group_size=64 --level dict:bits=3.3
    python tests/benchmarks/methods.py ... --blocks 5 15 25 --level ...     # these blocks only
    python tests/benchmarks/methods.py ... --decode --joint 2.3 2.8 3.3 4.3

Statistics of the inputs and of the outputs' gradients are made once per work folder. Prints per
level the stored bits per weight of the layers that have it, their mean relative output error on
text that is held out, the KL that they are expected to add, the KL from the dense model (none with
--windows 0), and the CPU seconds that making them took.

--decode: also the microseconds that all layers of the last block take for one token in bfloat16,
runtime auto, by turns with the dense layers.
--joint: also the knapsack's choice among all levels per layer at these stored bits, by the KL that
each is expected to add, how often it takes which level, and the KL of the plan.
--share: also low rank at this share of each layer's parameters, and in how many layers a level's
error on the text that is held out is smaller.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_evopress.calibration.data import tokenize_file
from hf_evopress.calibration.input_moments import load_stats
from hf_evopress.calibration.output_moments import kfac_loss, load_moments
from hf_evopress.jobs.bench import best
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import calibrated
from hf_evopress.loading.layers import CompressedLinear
from hf_evopress.methods.base import Shape, State
from hf_evopress.methods.compose import compress_stacked, cost_bits, decompress, normalize
from hf_evopress.plans.level import Level
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.scoring.evaluate import compare_many
from hf_evopress.search import knapsack
from hf_evopress.search.space import SearchSpace


class Made:
    """The weights of one level, by layer what they cost, and the layers of the last block."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.layers: list[nn.Linear] = []
        self.errors: dict[str, float] = {}
        self.costs: dict[str, int] = {}
        self.losses: dict[str, float] = {}
        self.seconds = 0.0

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return sum(self.costs.values()) / sum(W.numel() for W in self.weights.values())

    @property
    def error(self) -> float:
        """The layers' mean relative output error on text that is held out."""
        return fmean(self.errors.values())

    @property
    def nats(self) -> float:
        """The KL that all are expected to add."""
        return sum(self.losses.values())


def make(level_of: Callable[[Shape], Level], dense: Any, work: str, blocks: Sequence[int]) -> Made:
    """Return the layers of some blocks at their levels, those of one level that share an input
    made together."""
    made = Made()
    for number in blocks:
        stats, G = load_stats(work, number), load_moments(work, number)
        inputs: dict[tuple[int, Level], list[str]] = {}
        for name in stats:
            level = level_of(tuple(dense.get_submodule(name).weight.shape))
            inputs.setdefault((id(stats[name]), level), []).append(name)
        for (_, level), names in inputs.items():
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
                made.losses[name] = kfac_loss(d, known.hessian(), G[name])
                made.errors[name] = float(((d @ H) * d).sum() / ((W @ H) * W).sum())
                made.weights[name] = made.weights[name].bfloat16()
                made.costs[name] = cost_bits(level, shape)
                if number == blocks[-1]:
                    made.layers.append(_layer(level, state, shape))
    return made


def _layer(level: Level, state: State, shape: Shape) -> nn.Linear:
    layer = CompressedLinear.from_state(level, state, None, shape, dtype=torch.bfloat16)
    layer.prepare("auto")
    return layer


def for_all(level: str) -> Callable[[Shape], Level]:
    """Return what gives every layer the same level."""
    found = normalize(level)
    return lambda shape: found


def low_rank(shape: Shape, share: float) -> Level:
    """Return low rank, in 16 bits, of a share of the weight's parameters."""
    return normalize(f"lowrank:rank={round(share * shape[0] * shape[1] / sum(shape))}")


def decoded(rows: Mapping[str, Made], dense: Any, repeats: int) -> dict[str, float]:
    """Return the seconds of all layers of the last block for one token, dense and by level."""
    names = list(next(iter(rows.values())).weights)[-len(next(iter(rows.values())).layers) :]
    layers: dict[str, list[Any]] = {
        "dense": [copy.deepcopy(dense.get_submodule(name)).bfloat16() for name in names],
        **{name: made.layers for name, made in rows.items()},
    }
    x = {
        n: torch.randn(1, n, dtype=torch.bfloat16) for n in {m.in_features for m in layers["dense"]}
    }

    def run(some: list[Any]) -> Callable[[], object]:
        return lambda: [layer(x[layer.in_features]) for layer in some]

    slow = best({name: run(some) for name, some in layers.items()}, 2)
    fast = {n: run(layers[n]) for n, t in slow.items() if t < 50 * slow["dense"]}
    return {**slow, **best(fast, repeats)}


def chosen(rows: Mapping[str, Made], bits: float) -> Made:
    """Return the layers of the least expected KL at so many stored bits, each at any level."""
    first = next(iter(rows.values()))
    sizes = {name: W.numel() for name, W in first.weights.items()}
    offered = {name: [(level, made.costs[name]) for level, made in rows.items()] for name in sizes}
    space = SearchSpace.build(sizes, offered)
    table = [
        [rows[str(option.level)].losses[gene.units[0]] for option in gene.options]
        for gene in space.genes
    ]
    found = knapsack.solve(space, table, int(bits * sum(sizes.values())))
    plan, picked = space.levels(found.genome), Made()
    for name, level in plan.items():
        made = rows[str(level)]
        picked.weights[name] = made.weights[name]
        picked.costs[name], picked.losses[name] = made.costs[name], made.losses[name]
    counts = Counter(map(str, plan.values())).most_common()
    alone = min((m.nats, name) for name, m in rows.items() if m.bits <= bits)
    print(
        f"joint {bits}: predicted KL {picked.nats:.4f}, of the best one level {alone[0]:.4f} "
        f"({alone[1]}): " + ", ".join(f"{n} x {level}" for level, n in counts),
        flush=True,
    )
    return picked


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
                "search": words.search,
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
    levels = [str(normalize(text)) for text in words.level]
    makers = {level: for_all(level) for level in levels}
    if words.share:
        makers["low rank"] = partial(low_rank, share=words.share)
    for name, level_of in makers.items():
        rows[name] = made = make(level_of, dense, words.work, blocks)
        print(
            f"{name}: {made.bits:.3f} bits, held-out error "
            f"{made.error:.5f}, predicted KL {made.nats:.4f}, "
            f"{made.seconds:.0f} CPU s",
            flush=True,
        )
    for name, made in rows.items() if words.share else ():
        smaller = sum(e < rows["low rank"].errors[layer] for layer, e in made.errors.items())
        print(f"{name}: smaller error than low rank in {smaller} of {len(made.errors)} layers")
    times = decoded(rows, dense, words.repeats) if words.decode else {}
    for name, seconds in times.items():
        print(f"{name}: {1e6 * seconds:.0f} us, {times['dense'] / seconds:.2f}x", flush=True)
    for made in rows.values():
        made.layers.clear()
    menu = {level: rows[level] for level in levels}
    joint = {f"joint {bits}": chosen(menu, bits) for bits in words.joint}
    if not words.windows:
        return
    functions = {
        name: lambda ids, made=made: logits(rival, made.weights, ids)
        for name, made in {**rows, **joint}.items()
    }
    reports = compare_many(functions, dense, tokens, window=words.window, max_windows=words.windows)
    print("| level | stored bits | held-out error | predicted KL | KL (nats) | CPU s | us | |")
    print("|---|---|---|---|---|---|---|---|")
    for name, made in {**rows, **joint}.items():
        report = reports[name]
        error = f"{made.error:.4f}" if made.errors else ""
        speed = " | "
        if name in times:
            speed = f"{1e6 * times[name]:.0f} | {times['dense'] / times[name]:.2f}x"
        print(
            f"| {name} | {made.bits:.3f} | {error} | {made.nats:.3f} "
            f"| {report.kl_nats:.4f} ± {report.kl_standard_error:.4f} | {made.seconds:.0f} "
            f"| {speed} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--test", required=True, help="evaluation text")
    parser.add_argument("--work", default="demo/methods.work")
    parser.add_argument("--level", action="extend", nargs="+", required=True)
    parser.add_argument("--blocks", type=int, nargs="+")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--calibration", type=int, default=56)
    parser.add_argument("--search", type=int, default=4, help="as the work folder has it")
    parser.add_argument("--sensitivity-tokens", type=int, default=40960)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--joint", type=float, nargs="+", default=[])
    parser.add_argument("--share", type=float, help="of the parameters, of low rank")
    parser.add_argument("--threads", type=int, default=1)
    main(parser.parse_args())
