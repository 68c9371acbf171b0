"""Compile every kernel in Triton, as it is launched, for GPUs that need not be here.

python tests/loading/compile_for_gpus.py [cuda] [hip]    # without TRITON_INTERPRET; prints each
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_evopress.loading.kernels.gpu import experts as gpu_experts
from hf_evopress.loading.kernels.gpu import kinds as gpu
from hf_evopress.loading.kernels.gpu import lowrank as gpu_lowrank
from hf_evopress.loading.kernels.gpu import matrix as gpu_matrix
from hf_evopress.loading.kernels.gpu import turns as gpu_turns
from hf_evopress.loading.kernels.gpu.experts import Experts, can_group, grouped
from hf_evopress.loading.kernels.gpu.layer import TritonKernel, dense_kernel, triton_kernel_of
from hf_evopress.methods import compose
from hf_evopress.methods.maths import triton_viterbi, viterbi_gpu
from hf_evopress.methods.maths.linalg import Stats

KNOWN = {"cuda": GPUTarget("cuda", 80, 32), "hip": GPUTarget("hip", "gfx942", 64)}
TARGETS = list(KNOWN.values())
LEVELS = [
    "rtn:bits=3,group_size=64",
    "rows:bits=4,top_bits=7,top=0.2,group_size=128",
    "magnitude:sparsity=0.5",
    "magnitude:pattern=2:4,bits=4,group_size=32",
    "magnitude:sparsity=0.5 + lowrank:rank=8,factors=int8,metric=plain",
    "rtn:bits=8,group_size=24,symmetric=true + lowrank:rank=5,metric=plain",
    "trellis:bits=3,state_bits=8,feedback=none",
    "trellis:bits=5,state_bits=8,feedback=none,codebook=mul1",
    "trellis:bits=5,state_bits=9,feedback=none,codebook=mcg,order=mma,tail_biting=false",
    "trellis:bits=4,state_bits=8,feedback=none,codebook=weyl",
    "trellis:bits=2.5,state_bits=8,feedback=none,codebook=weyl",
    "trellis:bits=8,state_bits=12,feedback=none,tail_biting=false",
]
KINDS = {
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}
_seen: set[str] = set()


def compile_as_launched(
    family: str, name: str, grid: tuple[int, ...], device: torch.device, given: Mapping[str, Any]
) -> None:
    """Compile a kernel for all TARGETS with the types and constants that it is launched with."""
    module = import_module(f"hf_evopress.loading.kernels.gpu.triton_{family}")
    options = {"num_warps": given["num_warps"]} if "num_warps" in given else {}
    compile_for_all(family, name, getattr(module, name), given, options)


def compile_viterbi(
    name: str, grid: tuple[int, ...], given: Mapping[str, Any], *, num_warps: int
) -> None:
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    compile_for_all("viterbi", name, getattr(triton_viterbi, name), given, options)


def compile_for_all(
    family: str, name: str, kernel: Any, given: Mapping[str, Any], options: dict[str, Any]
) -> None:
    signature, constants, aligned = described(kernel, given)
    what = f"{family}.{name} {signature} {constants}"
    if what in _seen:
        return
    _seen.add(what)
    for target in TARGETS:
        source = ASTSource(kernel, signature, constants, aligned)
        made = triton.compile(source, target=target, options=options)
        if target.backend == "cuda" and family == "viterbi":  # sums as on every other device
            assert "fma." not in made.asm["ptx"]
        assert "cubin" in made.asm or "hsaco" in made.asm
        print(target.backend, target.arch, family, name, constants)


def described(kernel: Any, given: Mapping[str, Any]) -> tuple[dict[str, str], Any, Any]:
    """Return the types, the constants and what is known of each argument, as a launch has them."""
    signature, constants, aligned = {}, {}, {}
    unknown = given.keys() - inspect.signature(kernel.fn).parameters.keys() - {"num_warps"}
    assert not unknown, f"{kernel.fn.__name__} takes no {unknown}"  # the interpreter lets them pass
    for i, (key, parameter) in enumerate(inspect.signature(kernel.fn).parameters.items()):
        value = given[key]
        if isinstance(value, torch.Tensor):
            signature[key] = KINDS[value.dtype]
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif value is None or "constexpr" in str(parameter.annotation):
            # a dtype as a constant, as the launcher takes it
            value = (
                triton.language.constexpr(value) if hasattr(value, "primitive_bitwidth") else value
            )
            signature[key], constants[(i,)] = "constexpr", value
        elif isinstance(value, float):
            signature[key] = "fp32"
        else:
            signature[key] = "i32"
            if value % 16 == 0:
                aligned[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, aligned


def main() -> None:
    TARGETS[:] = [KNOWN[name] for name in sys.argv[1:] or KNOWN]
    for module in (gpu, gpu_matrix, gpu_experts, gpu_lowrank, gpu_turns):
        module.launch, module.needs_exact = compile_as_launched, lambda device: False
    viterbi_gpu.launch = compile_viterbi
    for bits, state_bits in ((2, 12), (2.5, 12), (3, 10), (8, 12), (4, 14)):
        values, x, past = torch.randn(2**state_bits), torch.randn(2, 256), torch.zeros(2)
        for start in (None, past):
            viterbi_gpu.nearest_walks_triton(x, values, bits, start, batch=2)
    TritonKernel.check = lambda *results: None  # nothing is computed
    torch.manual_seed(0)
    shape = (48, 384)
    for number, text in enumerate(LEVELS):
        level = compose.normalize(text)
        if "group_size=24" in text:
            shape = (48, 96)
        X = torch.randn(64, shape[1])
        stats = Stats(X.T @ X / len(X), None, X.mean(0), len(X))
        kernel, state = (
            triton_kernel_of(level, shape),
            compose.compress(level, torch.randn(shape), stats),
        )
        assert kernel is not None
        for tokens in (1, (3, 65)[number % 2]):
            x = torch.randn(tokens, shape[1], dtype=torch.bfloat16)
            kernel.linear(x, state, torch.randn(shape[0], dtype=torch.bfloat16))
        kernel.look_up(torch.tensor([1, 2]), state, torch.bfloat16)
        for tokens in (2, 99) if can_group(kernel) else ():
            x, expert = torch.randn(tokens, shape[1], dtype=torch.bfloat16), torch.arange(tokens)
            biases = [torch.randn(shape[0], dtype=torch.bfloat16)] * 2
            assert grouped(x, expert // 2, kernel, Experts([state, state], biases)) is not None
    dense = {"weight": torch.randn(shape, dtype=torch.bfloat16)}
    x, expert = torch.randn(2, shape[1], dtype=torch.bfloat16), torch.arange(2)
    assert grouped(x, expert, dense_kernel(shape, x.dtype), Experts([dense] * 2, [])) is not None


if __name__ == "__main__":
    main()
