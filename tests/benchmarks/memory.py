"""Peak memory of each step against depth: what grows with the number of blocks, and how fast.

    python tests/benchmarks/memory.py --depths 4 8 16

Random Llamas that differ in depth only, made on the spot; each step in a process of its own,
which finds the files of the steps before. Calibration and sensitivities hold one block's moments
at a time, so that their slope is the weights'; the search adds nothing with depth but those and a
bounded cache of decompressed levels.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_evopress.calibration.input_moments import calibrate, load_stats
from hf_evopress.calibration.output_moments import load_moments, output_moments
from hf_evopress.methods.menu import menus
from hf_evopress.models.units import find_units
from hf_evopress.scoring.evaluator import Evaluator
from hf_evopress.scoring.fitness.kl import KL
from hf_evopress.store.level_store import LevelStore, Source

STEPS = ("load", "calibrate", "sensitivities", "store", "search round")
LEVELS = ["gptq:bits=2,group_size=64", "gptq:bits=4,group_size=64"]


def main() -> None:
    words = arguments()
    peaks: dict[int, dict[str, float]] = {}
    for depth in words.depths:
        with tempfile.TemporaryDirectory() as folder:
            measure("make", depth, Path(folder), words)
            peaks[depth] = {step: measure(step, depth, Path(folder), words) for step in STEPS}
    block = block_megabytes(words.width)
    print(f"\npeak resident memory in MB; one block's weights are {block:.1f} MB in float32\n")
    print("| step |" + "".join(f" {depth} blocks |" for depth in words.depths) + " MB per block |")
    print("|---|" + "---|" * (len(words.depths) + 1))
    low, high = words.depths[0], words.depths[-1]
    for step in STEPS:
        slope = (peaks[high][step] - peaks[low][step]) / (high - low)
        cells = "".join(f" {peaks[depth][step]:.0f} |" for depth in words.depths)
        print(f"| {step} |{cells} {slope:.1f} |")


def measure(step: str, depth: int, folder: Path, words: argparse.Namespace) -> float:
    """Return the peak memory in MB of a fresh process that does one step."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_evopress.jobs.pipeline"])  # imported once, for all
    answers: Any = context.Queue()
    process = context.Process(target=work, args=(step, depth, str(folder), words, answers))
    process.start()
    peak = answers.get(timeout=1200)
    process.join()
    return float(peak)


def work(step: str, depth: int, place: str, words: argparse.Namespace, answers: Any) -> None:
    torch.set_num_threads(1)
    folder = Path(place)
    if step == "make":
        torch.manual_seed(0)
        LlamaForCausalLM(config(depth, words.width)).save_pretrained(folder / "model")
        answers.put(0)
        return
    model = LlamaForCausalLM.from_pretrained(folder / "model").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 512, (words.sequences, words.seq_len), generator=generator)
    units = find_units(model)
    if step == "calibrate":
        calibrate(model, tokens, folder)
    elif step == "sensitivities":
        output_moments(model, tokens, folder)
    elif step == "store":
        offered = menus({unit.name: unit.shape for unit in units}, LEVELS)
        source = Source({}, lambda b: load_stats(folder, b), lambda b: load_moments(folder, b))
        LevelStore.build(folder / "store", model, units, offered, source)
    elif step == "search round":
        store = LevelStore(folder / "store")
        evaluator = Evaluator(model, store, tokens, KL(), cache_bytes=words.cache << 20)
        plans = [{u: store.levels(u)[i % 2] for i, u in enumerate(store.units, n)}
                 for n in range(2)]  # fmt: skip
        evaluator.losses(plans, range(len(tokens)))
    answers.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def config(depth: int, width: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    )


def block_megabytes(width: int) -> float:
    return 4 * (4 + 3 * 3) * width**2 / 2**20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--cache", type=int, default=32, help="of decompressed levels, in MiB")
    return parser.parse_args()


if __name__ == "__main__":
    main()
