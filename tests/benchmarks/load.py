"""Peak memory and time of from_pretrained, compressed against dense, each in a fresh process.

    python tests/benchmarks/load.py demo/smol-3.3bit .cache/SmolLM2-135M-Instruct

`imports` is a process that imports the same packages and loads nothing. The claim to check:
peak <= imports + checkpoint + one layer. A dense checkpoint is mapped into memory and read when it
is used first: so there is also the time until one token has been computed. --by-turns loads both in
this process, again and again, and prints the least CPU seconds of each: without imports and what is
made once per process. --cold has the files read from the disk again each time, where the system
lets go of them. --make HIDDEN LAYERS LEVEL writes both, a Llama of random
weights, and measures nothing:

    python tests/benchmarks/load.py packed dense --make 2048 16 rtn:bits=4,group_size=64
    python tests/benchmarks/load.py packed dense --cold
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hf_evopress.models.size import stored_bytes

CHILD = """
import json, resource, sys, time
import torch, hf_evopress
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
import safetensors.torch
start = time.perf_counter()
largest = 0
if sys.argv[1] != "-":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
    from hf_evopress.models.units import find_units
    largest = max(u.n_weights for u in find_units(model))
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
if sys.argv[1] != "-":
    with torch.inference_mode():
        model(torch.tensor([[1]]))
found = {"peak_bytes": peak, "seconds": seconds, "largest_layer_weights": largest}
print(json.dumps(found | {"first_token": time.perf_counter() - start}))
"""


def make(packed: str, dense: str, hidden: int, layers: int, level: str) -> None:
    """Write a random Llama to `dense` in bfloat16, and its layers at a level to `packed`."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from hf_evopress import EvoPressConfig, Plan
    from hf_evopress.models.units import find_units

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 256 * 256,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        vocab_size=32000,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    levels = {unit.name: level for unit in find_units(model) if not unit.is_end}
    model.save_pretrained(dense)
    del model
    how = EvoPressConfig(plan=Plan(levels))
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=how).save_pretrained(packed)


def let_go(model: str) -> None:
    """Have the system forget what it holds of a checkpoint's files."""
    for path in Path(model).glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(model: str, repeats: int, *, is_cold: bool = False) -> dict[str, Any]:
    """Return medians over fresh processes; peak memory in bytes."""
    runs = []
    for _ in range(repeats):
        if is_cold:
            let_go(model)
        out = subprocess.run(
            [sys.executable, "-c", CHILD, model], capture_output=True, text=True, check=True
        )
        runs.append(json.loads(out.stdout.splitlines()[-1]))
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def by_turns(names: list[str], repeats: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    seconds = dict.fromkeys(names, float("inf"))
    for _ in range(repeats):
        for name in names:
            start = time.process_time()
            AutoModelForCausalLM.from_pretrained(name, dtype="auto")
            seconds[name] = min(seconds[name], time.process_time() - start)
    print("| | CPU seconds |\n|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("compressed")
    parser.add_argument("dense")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--by-turns", action="store_true")
    parser.add_argument("--cold", action="store_true", help="files are read from the disk again")
    parser.add_argument("--make", nargs=3, metavar=("HIDDEN", "LAYERS", "LEVEL"))
    words = parser.parse_args()
    if words.make:
        hidden, layers, level = words.make
        make(words.compressed, words.dense, int(hidden), int(layers), level)
        return
    if words.by_turns:
        by_turns([words.compressed, words.dense], words.repeats)
        return
    imports = measure("-", words.repeats)
    print("| | checkpoint MB | peak MB above imports | seconds | to the first token |")
    print("|---|---|---|---|---|")
    found = {}
    for name in (words.compressed, words.dense):
        run = found[name] = measure(name, words.repeats, is_cold=words.cold)
        above = (run["peak_bytes"] - imports["peak_bytes"]) / 1e6
        size = stored_bytes(name) / 1e6
        times = f"{run['seconds']:.2f} | {run['first_token']:.2f}"
        print(f"| {name} | {size:.1f} | {above:.1f} | {times} |")
        print(f"|   one layer, bf16 | {2 * run['largest_layer_weights'] / 1e6:.1f} | | | |")
    packed, dense = found[words.compressed], found[words.dense]
    print(f"\nimports alone: {imports['peak_bytes'] / 1e6:.0f} MB")
    for what, key in (("load time", "seconds"), ("to the first token", "first_token")):
        print(f"{what}, compressed / dense: {packed[key] / dense[key]:.2f}")


if __name__ == "__main__":
    main()
