"""EXL3 tensors in exllamav3's own code: its C++ kernel for experts on CPUs, compiled as it is.

    git clone https://github.com/turboderp-org/exllamav3
    python tests/benchmarks/exl3.py exllamav3

The one part of exllamav3 that needs no GPU. It takes the codebook mul1 and computes W_down
relu(W_up x)^2; here from random codes as the exl3 export packs them, at each number of bits.
Printed is its difference from the product with our decoded weights: by its scalar path, which takes
values unrounded where kernels for GPUs round them to half precision, and with AVX2, which rounds
activations to 8 bits. Weights in other places would give a difference of about 1. Compiling takes
minutes and g++.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch

from hf_evopress.export.exl3_format.tensors import LEVEL, pack
from hf_evopress.methods import compose

KERNEL = "exllamav3/exllamav3_ext/cpu"
BINDING = """
#include <torch/extension.h>
#include "moe_mul1.h"
PYBIND11_MODULE(exl3cpu, m) {
  m.def("make_layer", &exl3_moe_cpu_make_layer);
  m.def("forward", [](int64_t layer, at::Tensor x, at::Tensor experts, at::Tensor weights,
                      at::Tensor out) {
    exl3_moe_cpu_forward(layer, x, experts, weights, out, 1);
  });
}
"""
RELU_SQUARED = 2  # its number of the activation without a gate
UP, DOWN = (384, 256), (256, 384)


def build(checkout: Path, folder: Path) -> Path:
    """Return the compiled module."""
    torch_folder = Path(torch.__file__).parent
    (folder / "binding.cpp").write_text(BINDING)
    includes = [checkout / KERNEL, torch_folder / "include", sysconfig.get_paths()["include"]]
    includes.append(torch_folder / "include/torch/csrc/api/include")
    module = folder / "exl3cpu.so"
    libraries = [f"-l{name}" for name in ("torch", "torch_cpu", "c10", "torch_python")]
    subprocess.run(
        [
            *("g++", "-shared", "-fPIC", "-O1", "-std=c++20", "-w"),
            *(f"-I{path}" for path in includes),
            *(str(folder / "binding.cpp"), str(checkout / KERNEL / "moe_mul1.cpp")),
            *("-o", str(module), f"-L{torch_folder / 'lib'}", *libraries),
            f"-Wl,-rpath,{torch_folder / 'lib'}",
        ],
        check=True,
    )
    return module


def random_state(level: Any, shape: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    """Return a state of any codes: every one stands for some weight."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name, like in compose.empty(level, shape, torch.float32).items():
        if like.dtype == torch.uint8:
            made[name] = torch.randint(256, like.shape, generator=g, dtype=torch.uint8)
        else:
            made[name] = (torch.rand(like.shape, generator=g) / 10 + 0.05).to(like.dtype)
    return made


def compare(module: Path) -> None:
    """Print the difference at each number of bits, in this process's instruction set."""
    spec = importlib.util.spec_from_file_location("exl3cpu", module)
    assert spec is not None and spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    for bits in range(1, 9):
        level = compose.normalize(LEVEL.format(bits=bits) + f",seed={bits}")
        up, down = random_state(level, UP, 1), random_state(level, DOWN, 2)
        packed = [pack(level, up, UP), pack(level, down, DOWN)]
        given = [[t[name]] for t in packed for name in ("trellis", "suh", "svh")]
        layer = theirs.make_layer([], [], [], *given, [], [], [], RELU_SQUARED, 0.0, 0)
        x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).half()
        out = torch.zeros(3, 256)
        theirs.forward(layer, x, torch.zeros(3, 1).long(), torch.ones(3, 1).half(), out)
        U, D = (
            compose.decompress(level, state, shape, torch.float32)
            for state, shape in ((up, UP), (down, DOWN))
        )
        wanted = torch.relu(x.float() @ U.T).square() @ D.T
        difference = float((out - wanted).norm() / wanted.norm())
        print(f"{os.environ['EXL3_MOE_CPU_MAX_ISA']}, {bits} bits: {difference:.4f}", flush=True)
    os._exit(0)  # its threads wait for more work


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="of exllamav3's repository")
    parser.add_argument("--module", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.module:
        compare(words.module)
    with tempfile.TemporaryDirectory() as folder:
        module = build(words.checkout, Path(folder))
        for isa in ("scalar", "avx2"):  # chosen when it is loaded
            again = [sys.executable, __file__, str(words.checkout), "--module", str(module)]
            subprocess.run(again, check=True, env=os.environ | {"EXL3_MOE_CPU_MAX_ISA": isa})


if __name__ == "__main__":
    main()
