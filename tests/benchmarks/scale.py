"""What each step takes per block, for models of many sizes: a plan for hardware.

    python tests/benchmarks/scale.py --size 135M --size 1B --device cpu
    python tests/benchmarks/scale.py --size 70B --device cuda

Random weights in the shapes of published models, of one and of two blocks. The difference is what
a block takes; the rest, embeddings and head, is counted once. Figures for the whole depth are
computed from these and marked so; sizes that were not run are scaled by weights from the largest
that was, and marked so. Every step brings one block at a time to the device (offload: cpu).
"""

from __future__ import annotations

import argparse
import random
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_evopress.base.devices import find_device, peak_bytes, reset_peak
from hf_evopress.base.placement import Place, put, size_bytes
from hf_evopress.calibration.input_moments import calibrate, load_stats
from hf_evopress.calibration.output_moments import load_moments, output_moments
from hf_evopress.models.plain import make_plain
from hf_evopress.models.units import find_units
from hf_evopress.plans.level import Level
from hf_evopress.scoring.evaluator import Evaluator
from hf_evopress.scoring.fitness.kl import KL
from hf_evopress.store.level_store import LevelStore, Source

LEVELS = [Level.parse(f"gptq:bits={bits},group_size=64") for bits in (2, 3, 4)]
PLANS = 16  # candidates per generation
GENERATIONS = 20


@dataclass(frozen=True)
class Size:
    """The shapes of a published model."""

    like: str
    arch: str
    n_blocks: int
    shapes: dict[str, Any]

    def model(self, n_blocks: int) -> Any:
        """Return a model of some blocks with random weights in bfloat16."""
        words = {**self.shapes, "num_hidden_layers": n_blocks, "tie_word_embeddings": True}
        with torch.device("meta"):
            config = AutoConfig.for_model(self.arch, **words)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        make_plain(model)
        model = model.to_empty(device="cpu").eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
        rotary = model.model.rotary_emb  # buffers that to_empty left empty
        frequencies, rotary.attention_scaling = rotary.compute_default_rope_parameters(config)
        rotary.inv_freq = rotary.original_inv_freq = frequencies
        return model


def _llama(hidden: int, heads: int, groups: int, inner: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
    }


_EXPERTS = {"head_dim": 128, "num_experts": 160, "num_experts_per_tok": 8}
_EXPERTS |= {"moe_intermediate_size": 2560}
SIZES = {
    "tiny": Size("a test", "llama", 4, _llama(64, 4, 2, 128, 256)),
    "135M": Size("SmolLM2-135M", "llama", 30, _llama(576, 9, 3, 1536, 49152)),
    "1B": Size("Llama-3.2-1B", "llama", 16, _llama(2048, 32, 8, 8192, 128256)),
    "8B": Size("Llama-3.1-8B", "llama", 32, _llama(4096, 32, 8, 14336, 128256)),
    "70B": Size("Llama-3.1-70B", "llama", 80, _llama(8192, 64, 8, 28672, 128256)),
    "400B": Size("Qwen3-Coder-480B", "qwen3_moe", 62, _llama(6144, 96, 8, 8192, 151936) | _EXPERTS),
}


@dataclass
class Cost:
    """What a step took."""

    seconds: float = 0.0
    device_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0


def measure(
    model: Any, device: torch.device, tokens: torch.Tensor, n_search: int
) -> dict[str, Cost]:
    """Return what each step takes on a model; a generation on the first `n_search` sequences."""
    put(model, Place(device, torch.float32 if device.type == "cpu" else None, torch.device("cpu")))
    units = find_units(model)
    menus = {unit.name: LEVELS for unit in units}
    plans = [
        {unit.name: draw.choice(LEVELS) for unit in units}  # hardly ever alike: nothing is shared
        for draw in map(random.Random, range(PLANS))
    ]
    costs: dict[str, Cost] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = Source({}, lambda b: load_stats(folder, b), lambda b: load_moments(folder, b))
        build = lambda: LevelStore.build(folder / "store", model, units, menus, source)  # noqa: E731
        score = lambda: Evaluator(model, build(), tokens, KL())  # noqa: E731
        steps: dict[str, Callable[[], Any]] = {
            "calibrate": lambda: calibrate(model, tokens, folder),
            "sensitivities": lambda: output_moments(model, tokens[:6], folder),
            "levels": build,
            "generation": lambda: score().losses(plans, range(n_search)),
        }
        for name, step in steps.items():
            costs[name] = _cost(step, device, folder)
    return costs


def _cost(step: Callable[[], Any], device: torch.device, folder: Path) -> Cost:
    before = _disk(folder)
    reset_peak(device)
    start = time.perf_counter()
    made = step()
    if device.type != "cpu":
        torch.get_device_module(device.type).synchronize()
    seconds = time.perf_counter() - start
    del made
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Cost(seconds, peak_bytes(device) or 0, host, _disk(folder) - before)


def _disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def whole(one: Cost, two: Cost, n_blocks: int) -> Cost:
    """Return what `n_blocks` take: what one does, and the difference for each more."""
    more = n_blocks - 1
    return Cost(
        one.seconds + more * max(0.0, two.seconds - one.seconds),
        max(one.device_bytes, two.device_bytes),
        max(one.host_bytes, two.host_bytes),
        one.disk_bytes + more * (two.disk_bytes - one.disk_bytes),
    )


def weights(size: Size) -> int:
    """Return the weights of the whole model."""
    with torch.device("meta"):
        words = {**size.shapes, "num_hidden_layers": 1, "tie_word_embeddings": True}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(size.arch, **words))
    ends = model.get_input_embeddings().weight.numel()
    return ends + size.n_blocks * (size_bytes(model, torch.uint8) - ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", action="append", choices=list(SIZES), required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sequences", type=int, default=56)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--search", type=int, default=8, help="sequences each plan is scored on")
    args = parser.parse_args()
    device = find_device(args.device)
    torch.manual_seed(0)
    counts = f"{args.sequences} sequences of {args.seq_len} tokens, plans scored on {args.search}"
    print(f"{device}, {counts}, per step of one block\n")
    print("| size | step | s per block | device MB | host MB | disk MB per block |", flush=True)
    print("|---|---|---|---|---|---|")
    run: dict[str, dict[str, Cost]] = {}
    for name in args.size:
        size = SIZES[name]
        vocab = size.shapes["vocab_size"]
        tokens = torch.randint(vocab, (args.sequences, args.seq_len))
        one, two = (measure(size.model(n), device, tokens, args.search) for n in (1, 2))
        for step in two:
            seconds = two[step].seconds - one[step].seconds
            disk = two[step].disk_bytes - one[step].disk_bytes
            print(
                f"| {name} | {step} | {seconds:.2f} | {two[step].device_bytes / 1e6:.0f} "
                f"| {two[step].host_bytes / 1e6:.0f} | {disk / 1e6:.1f} |"
            )
        run[name] = {step: whole(one[step], two[step], size.n_blocks) for step in two}
    print(f"\nWhole models, computed; search of {GENERATIONS} generations of {PLANS} candidates\n")
    print("| size | like | from | card GB | host GB | disk GB | hours |")
    print("|---|---|---|---|---|---|---|")
    largest = max(run, key=lambda name: weights(SIZES[name]))
    for name in [*run, *(x for x in list(SIZES)[1:] if x not in run)]:
        print(_row(name, run.get(name), run[largest], weights(SIZES[largest])))


def _row(name: str, own: dict[str, Cost] | None, largest: dict[str, Cost], known: int) -> str:
    size, n = SIZES[name], weights(SIZES[name])
    costs, scale = (own, 1.0) if own is not None else (largest, n / known)
    seconds = sum(c.seconds * (GENERATIONS if s == "generation" else 1) for s, c in costs.items())
    disk = sum(c.disk_bytes for c in costs.values()) * scale / 1e9
    hours = seconds * scale / 3600
    if own is None:  # peaks do not grow with depth, so they are not scaled by weights
        return f"| {name} | {size.like} | scaled | not run | not run | {disk:.1f} | {hours:.1f} |"
    host = max(c.host_bytes for c in costs.values()) / 1e9 + 2 * n / 1e9  # with all its weights
    card = max(c.device_bytes for c in costs.values()) / 1e9
    held = f"{card:.2f}" if card else "-"
    said = "1 and 2 blocks"
    return f"| {name} | {size.like} | {said} | {held} | {host:.1f} | {disk:.1f} | {hours:.2f} |"


if __name__ == "__main__":
    main()
