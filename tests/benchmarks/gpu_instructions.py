"""What the kernels in Triton do for each weight, counted in the machine code for an H100.

    python -m tests.benchmarks.gpu_instructions
    python -m tests.benchmarks.gpu_instructions --level trellis:bits=3,codebook=mcg --tokens 1 16

No GPU is needed, and nothing is timed: kernels are compiled as they are launched, disassembled, and
the instructions of the inner loop are divided by the weights that a thread has in it. From that
bounds follow: a processor of the card can begin four instructions of 32 threads in each cycle, but
only two that are logic, shifts or sums of whole numbers (CUDA C++ Programming Guide, throughput of
arithmetic instructions, 9.0). The other bound is what the memory brings. A kernel takes at least as
long as the longest of these; that it takes no longer than that only a card can show.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_evopress.loading.kernels.gpu import matrix as gpu_matrix
from hf_evopress.loading.kernels.gpu import turns as gpu_turns
from hf_evopress.loading.kernels.gpu.layer import triton_kernel_of
from hf_evopress.methods import compose
from tests.loading.compile_for_gpus import described

H100 = GPUTarget("cuda", 90, 32)
WHOLE = ("LOP3", "SHF", "PRMT", "SGXT", "LEA", "IADD", "VIADD", "ISETP", "SEL", "VIMNMX", "I2F")
WHOLE_AT_ONCE = 2
PROCESSORS, AT_ONCE, GIGAHERTZ, BANDWIDTH = 132, 4, 1.755, 3.35e12  # of the SXM card's data sheet
LEVELS = [
    *(f"rtn:bits={bits},group_size=64" for bits in (2, 3, 4, 8)),
    "rtn:bits=4,group_size=64,symmetric=true",
    *(f"trellis:bits={bits},codebook=weyl" for bits in (2, 2.5, 3, 4)),
    *(f"trellis:bits=3,codebook={book}" for book in ("mcg", "mul1", "strata")),
]


def main() -> None:
    words = arguments()
    shape = (words.rows, words.inputs)
    dense = 2 * shape[0] * shape[1] / BANDWIDTH
    print(f"{shape[0]} x {shape[1]}; the dense weight from memory: {1e6 * dense:.1f} us\n")
    print(
        "| level | tokens | instructions per weight | of whole numbers | these, us | bytes, us | "
        "launches |"
    )
    print("|---|---|---|---|---|---|---|")
    for text in words.level or LEVELS:
        for tokens in words.tokens:
            launches = launched(text, shape, tokens)
            n_bytes = compose.cost_bits(compose.normalize(text), shape) / 8
            known = [measured(*launch) for launch in launches]
            each, whole = next(found for found in known if found)
            begun = max(each, whole * AT_ONCE / WHOLE_AT_ONCE)
            cycles = begun * shape[0] * shape[1] / 32 / AT_ONCE / PROCESSORS
            print(
                f"| `{text}` | {tokens} | {each:.1f} | {whole:.1f} | "
                f"{cycles / GIGAHERTZ / 1e3:.1f} | "
                f"{1e6 * n_bytes / BANDWIDTH:.1f} | {len(launches)} |"
            )


def launched(text: str, shape: tuple[int, int], tokens: int) -> list[tuple[str, str, Any]]:
    """Return the kernels of a product, by family and name, with their arguments."""
    level, found = compose.normalize(text), list[tuple[str, str, Any]]()
    kernel = triton_kernel_of(level, shape)
    assert kernel is not None
    empty = compose.empty(level, shape, torch.float32)
    state = {n: torch.empty(t.shape, dtype=t.dtype, device="cpu") for n, t in empty.items()}
    setattr(kernel, "has_checked", lambda *way: True)  # noqa: B010
    for module in (gpu_matrix, gpu_turns):
        setattr(module, "launch", lambda *given: found.append((given[0], given[1], given[-1])))  # noqa: B010
    setattr(gpu_matrix, "needs_exact", lambda device: False)  # noqa: B010
    kernel.linear(torch.empty(tokens, shape[1], dtype=torch.bfloat16), state, None)
    return found


def measured(family: str, name: str, given: Any) -> tuple[float, float] | None:
    """Return a product's instructions per weight, and those of whole numbers; None of others."""
    if name != "product":
        return None
    kernel = getattr(import_module(f"hf_evopress.loading.kernels.gpu.triton_{family}"), name)
    made = triton.compile(ASTSource(kernel, *described(kernel, given)), target=H100)
    columns = (16 if family == "walks" else 8 * parts(given)) * given["BK"]
    weights = given["BN"] * columns / (32 * made.metadata.num_warps)
    loop = longest_loop(machine_code(made.asm["cubin"]))
    return len(loop) / weights, sum(what.startswith(WHOLE) for what in loop) / weights


def parts(given: Any) -> int:
    """Return how many parts of BK places a program of the family `codes` has at once."""
    is_fours = given["ONE"] and given["WHOLE"] and given["BITS"] < 8
    return int(given["PARTS"]) if is_fours else 1


def machine_code(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = Path(triton.__path__[0]) / "backends/nvidia/bin/nvdisasm"
        return subprocess.run([tool, "-c", path], check=True, capture_output=True, text=True).stdout


def longest_loop(code: str) -> list[str]:
    """Return the instructions of the longest loop: from a jump's target to the jump back."""
    places, instructions = dict[str, int](), list[tuple[str, str]]()
    for line in code.splitlines():
        if label := re.match(r"^\s*(\.L[\w_]+):", line):
            places[label[1]] = len(instructions)
        if one := re.match(r"\s*(?:/\*\w+\*/)?\s*(?:@!?\w+ )?([A-Z][A-Z0-9_.]+)\s*(.*);", line):
            instructions.append((one[1], one[2]))
    longest = list[str]()
    for i, (what, where) in enumerate(instructions):
        target = re.search(r"\.L[\w_]+", where) if what.startswith("BRA") else None
        first = places.get(target[0], i) if target else i
        if i - first >= len(longest):
            longest = [one for one, _ in instructions[first : i + 1]]
    return longest


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--level", action="extend", nargs="+")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=4096)
    return parser.parse_args()


if __name__ == "__main__":
    main()
