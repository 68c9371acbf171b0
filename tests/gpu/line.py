"""The whole line on one device: time and peak of each step, in a table.

python -m tests.gpu.line --device cuda --size 1B
python -m tests.gpu.line --device sim --size tiny
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_evopress.base.devices import find_device, peak_bytes, reset_peak, using
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.jobs.measure import unseen_tokens
from hf_evopress.jobs.pipeline import ship
from hf_evopress.jobs.plan_search import find_plan
from hf_evopress.recipes.recipe import Recipe

from ..conftest import byte_level_tokenizer, make_structured_text

SHAPES = {  # hidden size, heads, key and value heads, inner size, blocks, vocabulary
    "tiny": (64, 4, 2, 128, 3, 256),
    "1B": (2048, 32, 8, 5632, 24, 32000),
}


def make_model(folder: Path, size: str) -> Path:
    """Return `folder` with a random model, bfloat16, and a tokenizer of bytes."""
    hidden, heads, groups, inner, blocks, vocabulary = SHAPES[size]
    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def recipe(model: str, text: str, out: str, offload: str, is_tiny: bool) -> Recipe:
    """Return calibration, three levels, a search of two generations."""
    seq_len = 32 if is_tiny else 512
    return Recipe.from_dict(
        {
            "model": model,
            "out": out,
            "offload": offload,
            "budget": {"bits": 3.5},
            "levels": [f"gptq:bits={b},group_size=32" for b in (2, 3, 4)],
            "data": {
                "sources": [text],
                "seq_len": seq_len,
                "calibration": 8 if is_tiny else 32,
                "search": 8,
                "heldout": 2,
                "test": 4,
            },
            "search": {
                "sensitivity_tokens": 4 * seq_len,
                "settings": {"generations": 2, "tokens": [2 * seq_len, 4 * seq_len]},
            },
        }
    )


def run(words: Recipe, device: torch.device) -> list[tuple[str, float, float | None]]:
    """Return for each step its seconds and its peak in GB."""
    rows: list[tuple[str, float, float | None]] = []

    def timed(name: str, step: Callable[[], Any]) -> Any:
        reset_peak(device)
        start = time.perf_counter()
        made = step()
        peak = peak_bytes(device)
        rows.append((name, time.perf_counter() - start, None if peak is None else peak / 1e9))
        return made

    with using(device, offload=words.offload):
        job = Job(words)
        unseen, window = unseen_tokens(job, None, 2048)
        store = timed("calibrate, levels", lambda: build_levels(job))
        plan = timed("search", lambda: find_plan(job, store))
        on = (unseen, window, 2)
        result = timed("export, verify, reload, measure", lambda: ship(job, store, plan, on))
        model = AutoModelForCausalLM.from_pretrained(result.folder, device_map={"": str(device)})
        ids = AutoTokenizer.from_pretrained(result.folder)("the red", return_tensors="pt").input_ids
        timed("generate 16 tokens", lambda: model.generate(ids.to(device), max_new_tokens=16))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", choices=list(SHAPES), default="tiny")
    parser.add_argument("--model", help="a model in a folder, in place of a random one")
    parser.add_argument("--offload", default="auto", choices=["auto", "none", "cpu"])
    args = parser.parse_args()
    if args.device.startswith("sim"):
        from .. import second_device  # noqa: F401  registers it
    device = find_device(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        model = args.model or str(make_model(home / "dense", args.size))
        n = 900 if args.size == "tiny" and not args.model else 12000
        (home / "text.txt").write_text(make_structured_text(n, seed=5))
        is_tiny = args.size == "tiny" and args.model is None
        words = recipe(model, str(home / "text.txt"), str(home / "out"), args.offload, is_tiny)
        rows = run(words, device)
    name = args.model or f"random, {args.size}"
    print(f"\n| {name}, offload {args.offload}: step | s | peak on {device}, GB |\n|---|---|---|")
    for step, seconds, peak in rows:
        print(f"| {step} | {seconds:.1f} | {'-' if peak is None else f'{peak:.3f}'} |")


if __name__ == "__main__":
    main()
