"""How long GPTQ takes on a CPU by its compiled loops, beside the same by operations of PyTorch.

    OMP_NUM_THREADS=1 python tests/benchmarks/rounding.py --shapes 1536x576 576x1536 1024x4096

A random weight per shape, moments of random inputs and gradients; each way by turns, the best of
--repeats. The factor of the inputs' moments, which all levels of a layer share, is there. Last:
the layer's error, tr(D H D^T) / tr(W H W^T), of each.
"""

from __future__ import annotations

import argparse
import time

import torch

from hf_evopress.methods import compose
from hf_evopress.methods.maths import rounding_loops
from hf_evopress.methods.maths.linalg import Stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["1536x576", "576x1536", "1024x4096"])
    parser.add_argument("--levels", nargs="+", default=["gptq:bits=3,group_size=64"])
    parser.add_argument("--repeats", type=int, default=3)
    said = parser.parse_args()
    served = rounding_loops.serves
    print("| level | shape | moments of | compiled, s | PyTorch, s | | errors |")
    print("|---|---|---|---|---|---|---|")
    for text in said.levels:
        level = compose.normalize(text)
        for shape in said.shapes:
            rows, inputs = map(int, shape.split("x"))
            torch.manual_seed(0)
            W, mixed = torch.randn(rows, inputs), torch.randn(inputs, inputs)
            H, G = (
                moment(torch.randn(4 * inputs, inputs) @ mixed),
                moment(torch.randn(4 * rows, rows)),
            )
            for known, outputs in (("inputs", ()), ("both", (G,))):
                seconds: dict[str, float] = {}
                errors: dict[str, float] = {}
                stats = Stats(H, outputs=outputs)
                for turn in range(said.repeats + 1):  # the first compiles
                    for way, serves in (("compiled", served), ("PyTorch", lambda W: False)):
                        rounding_loops.serves = serves
                        start = time.perf_counter()
                        state = compose.compress(level, W, stats)
                        took = time.perf_counter() - start
                        if turn:
                            seconds[way] = min(took, seconds.get(way, took))
                        D = W - compose.decompress(level, state, (rows, inputs), torch.float32)
                        errors[way] = float((D @ H * D).sum() / (W @ H * W).sum())
                rounding_loops.serves = served
                one, other = seconds["compiled"], seconds["PyTorch"]
                print(
                    f"| `{text}` | {shape} | {known} | {one:.2f} | {other:.2f} "
                    f"| {other / one:.1f}x | {errors['compiled']:.5f}, {errors['PyTorch']:.5f} |",
                    flush=True,
                )


def moment(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


if __name__ == "__main__":
    main()
