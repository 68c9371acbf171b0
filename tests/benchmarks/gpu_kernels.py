"""Microseconds of single layers on a GPU, packed and dense, by turns, in CUDA graphs and without.

    python tests/benchmarks/gpu_kernels.py
    python tests/benchmarks/gpu_kernels.py --levels trellis:bits=3,codebook=mcg --tokens 1 16
    python tests/benchmarks/gpu_kernels.py --device cpu --shapes 256x256 --tokens 1 --megabytes 1

Each figure is of one call among calls of many copies of a layer, as many as make --megabytes, so
that weights come from memory and not from a cache. Graphs are what `generate` with a static cache
and torch.compile replay; without them the time of launching counts. A processor has no graphs.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from decode import any_state
from torch import Tensor, nn

from hf_evopress.base.devices import find_device, using
from hf_evopress.jobs.bench import best, machine, read_bandwidth, read_bytes
from hf_evopress.loading.layers import CompressedLinear
from hf_evopress.methods import compose

LEVELS = [
    *(f"rtn:bits={bits},group_size=64" for bits in (2, 3, 4, 8)),
    "magnitude:pattern=2:4",
    "rtn:bits=3,group_size=64 + lowrank:rank=32,metric=plain",
    *(f"trellis:bits={bits},codebook=weyl,scales=channels" for bits in (2, 2.5, 3, 4)),
    "trellis:bits=3,codebook=mcg,scales=channels",
    "trellis:bits=3,scales=channels",
]


def main() -> None:
    words = arguments()
    torch.manual_seed(0)
    with using(words.device):
        print(f"{machine()}; memory reads {read_bandwidth() / 1e9:.0f} GB/s\n")
        print("| layer | level | tokens | dense, us | packed, us | to dense | GB/s | no graph |")
        print("|---|---|---|---|---|---|---|---|")
        for text in words.shapes:
            rows, inputs = map(int, text.split("x"))
            for level in words.levels:
                for line in lines(level, (rows, inputs), words):
                    print(f"| {text} | `{level}` | {line} |", flush=True)


def lines(text: str, shape: tuple[int, int], words: argparse.Namespace) -> list[str]:
    """Return for each number of tokens what one call takes, dense and packed."""
    device, found = find_device(), []
    dense = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16, device=device)
    level = compose.normalize(text)
    state = {name: t.to(device) for name, t in any_state(level, shape).items()}
    packed = CompressedLinear.from_state(level, state, None, shape, dtype=torch.bfloat16)
    layers: dict[str, nn.Linear] = {"dense": dense, "packed": packed}
    copies = {n: copied(layer, words.megabytes) for n, layer in layers.items()}
    for tokens in words.tokens:
        x = torch.randn(tokens, shape[1], dtype=torch.bfloat16, device=device)
        calls = {name: partial(call_all, of, x) for name, of in copies.items()}
        with torch.inference_mode():
            eager = each(calls, copies, words.repeats)
            taken = eager
            if device.type == "cuda":
                taken = each({n: graph_of(c) for n, c in calls.items()}, copies, words.repeats)
        speed = read_bytes(packed) / taken["packed"] / 1e9
        found.append(
            f"{tokens} | {1e6 * taken['dense']:.1f} | {1e6 * taken['packed']:.1f} | "
            f"{taken['dense'] / taken['packed']:.2f}x | {speed:.0f} | "
            f"{eager['dense'] / eager['packed']:.2f}x"
        )
    return found


def copied(layer: nn.Linear, megabytes: int) -> list[nn.Linear]:
    """Return a layer and copies of it that hold so many bytes together."""
    found = [layer]
    while len(found) * read_bytes(layer) < 1e6 * megabytes:
        found.append(copy.deepcopy(layer))
    for one in found:
        if isinstance(one, CompressedLinear):
            one.prepare("auto")
    return found


def call_all(layers: Sequence[nn.Linear], x: Tensor) -> None:
    for layer in layers:
        layer(x)


def graph_of(call: Callable[[], None]) -> Callable[[], None]:
    """Return what replays the launches of a call."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def each(
    calls: dict[str, Callable[[], None]], copies: dict[str, list[nn.Linear]], repeats: int
) -> dict[str, float]:
    """Return the seconds of one layer's call, the best of the repeats."""
    return {name: s / len(copies[name]) for name, s in best(calls, repeats).items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--levels", nargs="+", default=LEVELS)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096", "4096x14336"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--megabytes", type=int, default=512, help="of all copies of a layer")
    parser.add_argument("--repeats", type=int, default=20)
    return parser.parse_args()


if __name__ == "__main__":
    main()
