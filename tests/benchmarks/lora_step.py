"""One step of LoRA training over a compressed model against one over the dense, by turns.

    OMP_NUM_THREADS=1 python tests/benchmarks/lora_step.py .cache/SmolLM2-135M-Instruct --blocks 4

Batch 4 x 512, bfloat16, rank 16 on all linear layers, AdamW: forward, backward and update, CPU
seconds, the best of --repeats. Gradient checkpointing is off. With --blocks only the first blocks
are there, and embedding and head: a step of 135 million weights takes minutes on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from generate import load, plan_at, rounded

from hf_evopress.jobs.bench import machine
from hf_evopress.loading.layers import prepare_layers
from hf_evopress.loading.replace import replace_linears


def main() -> None:
    words = arguments()
    names = {"dense bfloat16": None} | {level: level for level in words.levels}
    steps = {name: step_of(words, level) for name, level in names.items()}
    seconds = {name: float("inf") for name in names}
    for _ in range(words.repeats):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name] = min(seconds[name], time.process_time() - start)
    dense = seconds["dense bfloat16"]
    print(f"{machine()}; batch {words.batch} x {words.seq_len}\n")
    print("| | seconds per step | to dense |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} | {value / dense:.2f}x |")


def step_of(words: argparse.Namespace, level: str | None) -> Callable[[], None]:
    """Return a function that does one step of training."""
    from peft import LoraConfig, get_peft_model

    model: Any = load(words.model)
    if words.blocks:
        del model.model.layers[words.blocks :]
        model.config.num_hidden_layers = words.blocks
    if level is not None:
        plan = plan_at(model, level, "rtn:bits=8,group_size=64,clip=false")
        replace_linears(model, plan, rounded(model))
        prepare_layers(model, "auto")
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(1000, (words.batch, words.seq_len))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the dense model")
    parser.add_argument(
        "--levels",
        nargs="+",
        default=["rtn:bits=3,group_size=64,clip=false", "rtn:bits=4,group_size=64,clip=false"],
    )
    parser.add_argument("--blocks", type=int, help="of the model; default all")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
