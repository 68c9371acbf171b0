"""Three ways to multiply packed codes on a CPU: numba's loops, torch.compile's C++, PyTorch's int4.

    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python tests/benchmarks/vehicles.py --bits 2 3 4 8

One layer and one token, milliseconds, the best of --repeats turns. torch.compile gets the
formulas of `rtn`, unpacking and product, in two ways: with a matrix product, for which the weight
is written to memory first, and as a sum over each row, which can be one loop with the unpacking. It
needs a C++ compiler on the machine where the model runs; PyTorch's operator knows 4 bits alone.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_evopress.jobs.bench import best, machine, read_bandwidth
from hf_evopress.loading.layers import CompressedLinear
from hf_evopress.loading.runtimes import AUTO
from hf_evopress.methods import compose


def main() -> None:
    words = arguments()
    torch.manual_seed(0)
    n = words.size
    x = torch.randn(1, n, dtype=torch.bfloat16)
    print(f"{n} x {n}, {machine()}; memory reads {read_bandwidth() / 1e9:.1f} GB/s\n")
    print("| bits | dense | numba | C++, product | C++, sum | int4 | compiling C++, s |")
    print("|---|---|---|---|---|---|---|")
    W = torch.randn(n, n)
    for bits in words.bits:
        level = compose.normalize(f"rtn:bits={bits},group_size={words.group},clip=false")
        state = compose.compress(level, W, None)
        ((part, params, _),) = compose.parts(level)
        weight = partial(part.decompress, state, (n, n), **params)
        layer = partial(CompressedLinear.from_state, level, state, None, (n, n))

        def product(x: Tensor, weight: Any = weight) -> Tensor:
            return F.linear(x, weight(dtype=torch.bfloat16))

        def total(x: Tensor, weight: Any = weight) -> Tensor:
            return (weight(dtype=torch.float32) * x).sum(1)

        ways = {"dense": partial(F.linear, weight=W.bfloat16())}
        compiling: dict[str, float] = {}
        for name, made in (
            ("numba", prepared(layer(dtype=torch.bfloat16), AUTO)),
            ("C++, product", torch.compile(product, fullgraph=True, dynamic=False)),
            ("C++, sum", torch.compile(total, fullgraph=True, dynamic=False)),
            ("int4", prepared(layer(dtype=torch.bfloat16), "int4") if bits == 4 else None),
        ):
            if made is not None:
                start = time.perf_counter()
                with torch.no_grad():
                    made(x)
                compiling[name], ways[name] = time.perf_counter() - start, made
        with torch.no_grad():
            found = best({name: partial(way, x) for name, way in ways.items()}, words.repeats)
        row = [f"{1e3 * found[name]:.2f}" if name in found else "" for name in NAMES]
        waits = f"{compiling['C++, product']:.1f}"
        print("|", " | ".join([str(bits), *row, waits]), "|", flush=True)


NAMES = ("dense", "numba", "C++, product", "C++, sum", "int4")


def prepared(layer: CompressedLinear, runtime: str) -> CompressedLinear:
    layer.prepare(runtime)
    return layer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=20)
    return parser.parse_args()


if __name__ == "__main__":
    main()
