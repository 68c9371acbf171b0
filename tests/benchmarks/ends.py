"""KL of a model whose embedding (and head, where tied) alone is compressed, beside the predicted.

    python tests/benchmarks/ends.py .cache/SmolLM2-135M-Instruct --data calibration.txt \
        --test wiki.test.raw --level rtn:bits=4,group_size=64 gptq:bits=4,group_size=64

Levels and predictions are made from the same few sequences that go backwards; a job makes levels
from the head's inputs over all calibration text (`--calibration` sequences here do so too).
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_evopress.calibration.data import tokenize_file
from hf_evopress.calibration.end_moments import load_ends
from hf_evopress.calibration.input_moments import calibrate
from hf_evopress.calibration.output_moments import output_moments
from hf_evopress.methods import compose
from hf_evopress.models.ends import find_ends
from hf_evopress.scoring.evaluate import compare


@torch.no_grad()
def main() -> None:
    words = arguments()
    tokenizer = AutoTokenizer.from_pretrained(words.model)
    dense, model = (AutoModelForCausalLM.from_pretrained(words.model).float() for _ in "ab")
    tokens = tokenize_file(words.data, tokenizer)
    n = len(tokens) // words.seq_len
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    tokens = tokens[: n * words.seq_len].view(n, -1)[order]
    test, units = tokenize_file(words.test, tokenizer), find_ends(model)
    with tempfile.TemporaryDirectory() as folder:
        if words.calibration:
            calibrate(model, tokens[: words.calibration], folder, units=units)
        output_moments(model, tokens[: words.backward], folder, units=units, counted=tokens[:56])
        ends = load_ends(folder, units)
    print("| unit | level | MB | KL (nats) | predicted | as head | as embedding |")
    print("|---|---|---|---|---|---|---|")
    for unit in units:
        known, weight = ends[unit.name], model.get_submodule(unit.name).weight
        own = weight.clone()
        for word in words.level:
            level = compose.normalize(word)
            state = compose.compress(level, own, known.stats())
            weight.copy_(compose.decompress(level, state, unit.shape, torch.float32))
            report = compare(model, dense, test, window=2048, max_windows=words.windows)
            parts = [f(own - weight) for f in (known.loss, known.head_loss, known.embedding_loss)]
            told = " | ".join(f"{value:.5f}" for value in (report.kl_nats, *parts))
            size = compose.cost_bits(level, unit.shape) / 8e6
            print(f"| {unit.name} | {word} | {size:.1f} | {told} |", flush=True)
        weight.copy_(own)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--test", required=True, help="evaluation text")
    parser.add_argument("--level", nargs="+", required=True)
    parser.add_argument("--backward", type=int, default=6, help="sequences")
    parser.add_argument("--calibration", type=int, default=0, help="sequences")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
