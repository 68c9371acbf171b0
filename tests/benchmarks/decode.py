"""Tokens per second of the runtimes on a CPU against the dense model, in one process, by turns.

    python tests/benchmarks/decode.py --levels rtn:bits=3,group_size=128,clip=false \
        rtn:bits=4,group_size=128,clip=false

A random Llama in bfloat16 with layers of --hidden features (so that files need no Hub): time
does not depend on what the weights are. Decoding is one token at a time after a prompt, prefill
is the prompt at once; each figure is the best of --repeats. With --tokens, one layer alone at
several lengths, with --hidden inputs and as many outputs or --outputs. Trellis codes are random:
every walk is one.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_evopress.jobs.bench import (
    best,
    held_bytes,
    machine,
    read_bandwidth,
    read_bytes,
    timed,
)
from hf_evopress.loading.layers import CompressedLinear, prepare_layers
from hf_evopress.loading.replace import replace_linears
from hf_evopress.loading.runtimes import RUNTIMES
from hf_evopress.methods import compose
from hf_evopress.methods.base import State
from hf_evopress.models.units import find_units
from hf_evopress.plans.level import Level
from hf_evopress.plans.plan import Plan


def main() -> None:
    words = arguments()
    torch.manual_seed(0)
    if words.tokens:
        one_layer(words)
        return
    models = {"dense": make(words, None)}
    for level in words.levels:
        for runtime in words.runtimes:
            models[f"{level}, {runtime}"] = make(words, level, runtime)
    prefill, decoded = timed(models, (words.batch,), words.prompt, words.repeats)
    decode, threads = decoded[words.batch], torch.get_num_threads()
    print(f"hidden {words.hidden}, {words.layers} layers, {threads} threads, bfloat16,", end=" ")
    print(f"batch {words.batch}; memory reads {read_bandwidth() / 1e9:.1f} GB/s\n")
    print("| | MB held | tokens/s | to dense | GB/s | prefill tokens/s | to dense |")
    print("|---|---|---|---|---|---|---|")
    for name, model in models.items():
        print(
            f"| {name} | {held_bytes(model) / 1e6:.0f} | {words.batch / decode[name]:.2f} "
            f"| {decode['dense'] / decode[name]:.2f}x "
            f"| {read_bytes(model) / decode[name] / 1e9:.1f} "
            f"| {words.prompt / prefill[name]:.1f} | {prefill['dense'] / prefill[name]:.2f}x |"
        )


def make(words: argparse.Namespace, level: str | None, runtime: str = "packed") -> LlamaForCausalLM:
    """Return the model, dense or with `level` on every linear layer."""
    config = LlamaConfig(
        hidden_size=words.hidden,
        intermediate_size=words.hidden * 8 // 3 // 256 * 256,
        num_hidden_layers=words.layers,
        num_attention_heads=words.hidden // 128,
        num_key_value_heads=words.hidden // 512,
        vocab_size=1000,
    )
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    if level is not None:
        units = find_units(model)
        shapes = {unit.name: unit.shape for unit in units}
        plan = Plan(dict.fromkeys(shapes, level), shapes)

        def states(unit: str, level: Level) -> State:
            W = model.get_submodule(unit).weight.detach().float()
            return compose.compress(compose.normalize(level), W, None)

        replace_linears(model, plan, states)
        prepare_layers(model, runtime)
    return model


def one_layer(words: argparse.Namespace) -> None:
    """Print the time of one layer per runtime and number of tokens, and how fast it is read."""
    n, names = words.hidden, ["dense", *words.runtimes]
    shape = (words.outputs or n, n)
    print(f"{shape[0]} x {n}, {machine()}; memory reads {read_bandwidth() / 1e9:.1f} GB/s\n")
    print("| level | tokens | " + " | ".join(f"{name}, ms (GB/s)" for name in names) + " |")
    print("|---|---|" + "---|" * len(names))
    dense = nn.Linear(n, shape[0], bias=False, dtype=torch.bfloat16)
    for text in words.levels:
        level = compose.normalize(text)
        state = any_state(level, shape)
        layers: dict[str, nn.Linear] = {"dense": dense}
        for name in words.runtimes:
            layer = CompressedLinear.from_state(level, state, None, shape, dtype=torch.bfloat16)
            layer.prepare(name)
            layers[name] = layer
        for tokens in words.tokens:
            x = torch.randn(tokens, n, dtype=torch.bfloat16)
            found = best({name: partial(layer, x) for name, layer in layers.items()}, words.repeats)
            times = " | ".join(
                f"{1e3 * found[name]:.2f}, {found['dense'] / found[name]:.2f}x "
                f"({read_bytes(layer) / found[name] / 1e9:.1f})"
                for name, layer in layers.items()
            )
            print(f"| {text} | {tokens} | {times} |", flush=True)


def any_state(level: Level, shape: tuple[int, int]) -> State:
    """Return packed tensors of a random weight; looking for walks would take minutes."""
    if not str(level).startswith("trellis"):
        return compose.compress(level, torch.randn(shape), None)
    empty = compose.empty(level, shape, torch.bfloat16)
    scales = {name: torch.ones(x.shape, dtype=x.dtype) for name, x in empty.items()}
    return {**scales, "codes": torch.randint(256, empty["codes"].shape, dtype=torch.uint8)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--levels", nargs="+", default=["rtn:bits=3,group_size=128,clip=false"])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--outputs", type=int, help="of one layer alone")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths for one layer alone")
    return parser.parse_args()


if __name__ == "__main__":
    main()
