"""Where the time of one token goes in a compressed model: kernels, Python around them, all else.

    OMP_NUM_THREADS=1 python tests/benchmarks/token_parts.py .cache/SmolLM2-135M-Instruct

CPU milliseconds of this thread, the least of --repeats; models and parts take turns. `others` is a
model whose linear layers return a constant.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from generate import load, plan_at, rounded
from torch import Tensor, nn

from hf_evopress.jobs.bench import START, decoder, machine
from hf_evopress.loading.kernels.cpu.compiled import compiled, scratch
from hf_evopress.loading.layers import CompressedLinear, prepare_layers
from hf_evopress.loading.replace import replace_linears


class Constant(nn.Module):
    """A layer that takes no time."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        sizes = (1, START)
        self.known = {n: torch.zeros(1, n, rows, dtype=torch.bfloat16) for n in sizes}

    def forward(self, x: Tensor) -> Tensor:
        return self.known[x.shape[1]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the dense model")
    parser.add_argument("--level", default="rtn:bits=3,group_size=64,clip=false")
    parser.add_argument("--repeats", type=int, default=40)
    words = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        parts = parts_of(words)
        found = {name: float("inf") for name in parts}
        for part in parts.values():
            part()
        for _ in range(words.repeats):
            for name, part in parts.items():
                start = time.thread_time()
                part()
                found[name] = min(found[name], time.thread_time() - start)
    print(f"{machine()}, {words.level}\n\n| | ms |\n|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {1e3 * seconds:.1f} |")


def parts_of(words: argparse.Namespace) -> dict[str, Callable[[], object]]:
    ids = torch.randint(1000, (1, START))
    dense, packed, others = (load(words.model) for _ in range(3))
    plan = plan_at(packed, words.level, "rtn:bits=8,group_size=64,clip=false")
    replace_linears(packed, plan, rounded(packed))
    prepare_layers(packed, "auto")
    for name, module in list(others.named_modules()):
        if isinstance(module, nn.Linear):
            others.set_submodule(name, Constant(module.out_features))
    layers = [m for m in packed.modules() if isinstance(m, CompressedLinear)]
    inputs = [torch.randn(1, 1, layer.in_features, dtype=torch.bfloat16) for layer in layers]
    return {
        "a token, dense": decoder(dense, ids),
        "a token, packed": decoder(packed, ids),
        "its linear layers": lambda: [f(x) for f, x in zip(layers, inputs, strict=True)],
        "their kernels alone": kernels_of(layers, inputs),
        "a token, others": decoder(others, ids),
    }


def kernels_of(layers: list[Any], inputs: list[Tensor]) -> Callable[[], None]:
    """Return a function that calls the compiled product of each layer, and nothing else."""
    given = []
    for layer, x in zip(layers, inputs, strict=True):
        layer(x)
        layer(x)  # the short way is made once kernels are known to work
        y = torch.empty(layer.out_features, dtype=x.dtype)
        address = layer._direct.addresses[x.dtype]
        given.append((address, x.data_ptr(), y.data_ptr(), 1, 1, y))
    room, multiply = scratch(10**7), compiled().multiply

    def run() -> None:
        for *own, _ in given:
            multiply(*own, room)

    return run


if __name__ == "__main__":
    main()
