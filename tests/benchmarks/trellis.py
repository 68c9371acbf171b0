"""Trellis codes: speed and error on Gaussian numbers, error of a layer, KL of a model's levels.

    python tests/benchmarks/trellis.py gaussian --state-bits 8 10 12 --bits 2 3 4
    python tests/benchmarks/trellis.py decode
    python tests/benchmarks/trellis.py block .cache/SmolLM2-135M-Instruct --work w --blocks 5 15 \
        --level trellis:bits=2 --level trellis:bits=2,rotation=none
    python tests/benchmarks/trellis.py model .cache/SmolLM2-135M-Instruct \
        --data calibration.txt --test wiki.test.raw --windows 4 --work w \
        --level trellis:bits=3,state_bits=10 --level trellis:bits=3,state_bits=10,feedback=inputs

`gaussian` prints million weights per CPU second, the mean squared error on N(0, 1), free
and tail-biting, and the bound 2^(-2 bits). `decode` prints milliseconds to compute a weight.
`model` makes one store of all levels and compares them, each on every unit, on the same windows.
`block` makes levels of some blocks from the statistics that `model` left in its work folder, and
prints the loss that they add, on the calibration text and on what is held out, and the seconds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_evopress.base.devices import wait_for
from hf_evopress.calibration.data import tokenize_file
from hf_evopress.calibration.input_moments import load_stats
from hf_evopress.calibration.output_moments import kfac_loss, load_moments
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.methods.compose import (
    compress,
    compress_stacked,
    cost_bits,
    decompress,
    normalize,
)
from hf_evopress.methods.maths.codebook import codebook, spread
from hf_evopress.methods.maths.trellis_rounding import GAIN
from hf_evopress.methods.maths.viterbi import encode
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.scoring.evaluate import compare_many


def gaussian(words: argparse.Namespace) -> None:
    torch.set_num_threads(words.threads)
    device = torch.device(words.device)
    x = torch.randn(words.tiles, 256, generator=torch.Generator().manual_seed(0)).to(device)
    unit = "CPU second" if device.type == "cpu" else "second"
    print(f"| bits | states | codebook | Mw per {unit} | mse | tail-biting Mw | mse | bound |")
    print("|---|---|---|---|---|---|---|---|")
    for bits in words.bits:
        for state_bits in words.state_bits:
            if state_bits < bits:
                continue
            for name in words.codebooks:
                gain = (words.gain or GAIN[bits]) / spread(name, state_bits, bits)
                row = [f"{bits:g}", f"2^{state_bits}", name]
                for tail_biting in (False, True):
                    values = codebook(name, state_bits, bits, device)
                    encode(x[:8] / gain, values, bits, tail_biting=tail_biting)  # compiled
                    start = clock(device)
                    states = encode(x / gain, values, bits, tail_biting=tail_biting)
                    seconds = clock(device) - start
                    error = float((x - gain * values[states.long()]).square().mean())
                    row += [f"{x.numel() / seconds / 1e6:.2f}", f"{error:.5f}"]
                print("|", " | ".join([*row, f"{4.0**-bits:.5f}"]), "|", flush=True)


def clock(device: torch.device) -> float:
    """Return CPU seconds of all threads, of a card those on the wall once it is done."""
    if device.type == "cpu":
        return time.process_time()
    wait_for(device)
    return time.perf_counter()


def decode(words: argparse.Namespace) -> None:
    torch.set_num_threads(words.threads)
    for shape in ((576, 1536), (4096, 4096)):
        W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for text in words.level or ["trellis:bits=3,state_bits=8,feedback=none"]:
            level = normalize(text)
            state = compress(level, W, None)
            best = float("inf")
            for _ in range(5):
                start = time.perf_counter()
                decompress(level, state, shape, torch.bfloat16)
                best = min(best, time.perf_counter() - start)
            print(f"{shape} {level}: {1000 * best:.1f} ms", flush=True)


def block(words: argparse.Namespace) -> None:
    torch.set_num_threads(words.threads)
    dense = AutoModelForCausalLM.from_pretrained(words.model, dtype=torch.float32)
    print("| level | bits | predicted KL | relative error | on held-out text | CPU s |")
    print("|---|---|---|---|---|---|")
    for text in words.level:
        level = normalize(text)
        nats, errors, heldout, bits, n = 0.0, [], [], 0, 0
        start = time.process_time()
        for number in words.blocks:
            stats, G = load_stats(words.work, number), {}
            if (Path(words.work) / "moments" / f"block_{number:05d}.safetensors").is_file():
                G = load_moments(words.work, number)
            inputs: dict[int, list[str]] = {}
            for name in stats:
                inputs.setdefault(id(stats[name]), []).append(name)
            for names in inputs.values():
                Ws = [dense.get_submodule(name).weight.detach() for name in names]
                known = stats[names[0]]
                states = compress_stacked(level, Ws, known.with_outputs(map(G.get, names)))
                for name, W, state in zip(names, Ws, states, strict=True):
                    shape = (W.shape[0], W.shape[1])
                    d = W - decompress(level, state, shape, torch.float32)
                    nats += kfac_loss(d, known.hessian(), G[name]) if name in G else 0.0
                    errors.append(
                        float(((d @ known.gram) * d).sum() / ((W @ known.gram) * W).sum())
                    )
                    if (H := known.heldout) is not None:
                        heldout.append(float(((d @ H) * d).sum() / ((W @ H) * W).sum()))
                    bits, n = bits + cost_bits(level, shape), n + W.numel()
        seconds = time.process_time() - start
        means = [sum(x) / max(1, len(x)) for x in (errors, heldout)]
        print(
            f"| {level} | {bits / n:.3f} | {nats:.5f} | {means[0]:.5f} | {means[1]:.5f} "
            f"| {seconds:.1f} |",
            flush=True,
        )


def model(words: argparse.Namespace) -> None:
    recipe = Recipe.from_dict(
        {
            "model": words.model,
            "work": words.work,
            "budget": {"ratio": 1.0},
            "ends": "dense",
            "levels": words.level,
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
    job = Job(recipe)
    start = time.perf_counter(), time.process_time()
    store = build_levels(job)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    print(f"statistics and levels: {wall:.0f} s, {cpu:.0f} CPU s", flush=True)
    evaluator = job.evaluator(store)
    functions: dict[str, Any] = {}
    predicted = {}
    for text in words.level:
        level = normalize(text)
        levels = dict.fromkeys(store.units, level)
        functions[str(level)] = lambda ids, levels=levels: evaluator.logits(levels, ids)
        scores = [store.scores(unit, level) for unit in store.units]
        predicted[str(level)] = sum(s.get("sensitivity_nats", 0.0) for s in scores)
    tokens = tokenize_file(Path(words.test), job.tokenizer)
    reports = compare_many(
        functions, job.model, tokens, window=words.window, max_windows=words.windows
    )
    print("| level | stored bits | predicted KL | KL (nats) | perplexity |\n|---|---|---|---|---|")
    for name, report in reports.items():
        n = sum(u.shape[0] * u.shape[1] for u in store.units.values())
        bits = sum(store.cost_bits(unit, name) for unit in store.units) / n
        error = report.kl_standard_error
        spread = "" if error is None else f" ± {error:.4f}"  # None of one window
        print(
            f"| {name} | {bits:.3f} | {predicted[name]:.4f} | {report.kl_nats:.4f}{spread} | "
            f"{report.perplexity:.2f} |",
            flush=True,
        )
    print(f"dense perplexity {next(iter(reports.values())).dense_perplexity:.2f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("gaussian")
    one.add_argument("--bits", type=float, nargs="+", default=[2, 3, 4])
    one.add_argument("--state-bits", type=int, nargs="+", default=[8, 10, 12])
    one.add_argument("--codebooks", nargs="+", default=["strata"])
    one.add_argument("--tiles", type=int, default=512)
    one.add_argument("--gain", type=float)
    one.add_argument("--device", default="cpu")
    two = parts.add_parser("decode")
    two.add_argument("--level", action="extend", nargs="+")
    four = parts.add_parser("block")
    four.add_argument("model")
    four.add_argument("--work", default="demo/trellis.work")
    four.add_argument("--blocks", type=int, nargs="+", default=[5, 15])
    four.add_argument("--level", action="extend", nargs="+", required=True)
    for part in (one, two, four):
        part.add_argument("--threads", type=int, default=1)
    three = parts.add_parser("model")
    three.add_argument("model")
    three.add_argument("--data", required=True, help="calibration text")
    three.add_argument("--test", required=True, help="evaluation text")
    three.add_argument("--work", default="demo/trellis.work")
    three.add_argument("--level", action="extend", nargs="+", required=True)
    three.add_argument("--seq-len", type=int, default=1024)
    three.add_argument("--calibration", type=int, default=56)
    three.add_argument("--sensitivity-tokens", type=int, default=40960)
    three.add_argument("--window", type=int, default=2048)
    three.add_argument("--windows", type=int, default=4)
    return parser.parse_args()


if __name__ == "__main__":
    words = arguments()
    parts = {"gaussian": gaussian, "decode": decode, "block": block, "model": model}
    parts[words.part](words)
