"""Codes and gates in several processes: each sees other text, and all of them move alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

WORKER = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, TrainingArguments
from hf_evopress import PVTuning, StructuredPruning
from hf_evopress.refine.distillation import Sequences
from hf_evopress.training.trainer import DistillationTrainer

home, what = sys.argv[1:]
load = AutoModelForCausalLM.from_pretrained
dense = load(f"{home}/dense", dtype=torch.float32)
tokens = torch.load(f"{home}/tokens.pt", weights_only=True)
callbacks, optimizers = [], (None, None)
if what == "codes":
    model = load(f"{home}/small", dtype=torch.float32)
    optimizers = (PVTuning(model, every=2), None)
else:
    torch.manual_seed(0)
    model = get_peft_model(load(f"{home}/dense", dtype=torch.float32),
                           LoraConfig(r=4, target_modules="all-linear"))
    callbacks = [StructuredPruning(channels=96, end=8)]
args = TrainingArguments(output_dir=f"{home}/{what}", max_steps=6, per_device_train_batch_size=2,
                         learning_rate=1e-3, report_to="none", save_strategy="no", seed=3,
                         disable_tqdm=True, use_cpu=True, ddp_backend="gloo",
                         ddp_find_unused_parameters=False)
DistillationTrainer(model, args, train_dataset=Sequences(tokens), teacher=dense,
                    callbacks=callbacks, optimizers=optimizers).train()
found = {n: p.detach().contiguous() for n, p in model.named_parameters()}
for callback in callbacks:
    found |= callback.gates["channels"].state()
save_file(found, f"{home}/{what}-{args.process_index}-of-{args.world_size}.safetensors")
"""


@pytest.fixture(scope="module")
def folder(home: Path, write_model: Any, trained_llama: Any, text_tokens: Any) -> Path:
    write_model(home, trained_llama, "rtn:bits=2,group_size=32")
    torch.save(text_tokens(32, 48), home / "tokens.pt")
    (home / "worker.py").write_text(WORKER)
    return home


@pytest.mark.slow
@pytest.mark.parametrize(("what", "moving"), [("codes", ".codes"), ("gates", "log_alpha")])
def test_processes_that_see_other_text_move_alike(folder: Path, what: str, moving: str) -> None:
    ended: dict[int, list[dict[str, Tensor]]] = {}
    for world in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        run = subprocess.run(
            [sys.executable, *launcher, str(folder / "worker.py"), str(folder), what],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        ended[world] = [
            load_file(folder / f"{what}-{rank}-of-{world}.safetensors") for rank in range(world)
        ]
    (alone,), (first, second) = ended[1], ended[2]
    names = [name for name in first if name.endswith(moving)]
    assert names and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    # the second process's text has counted
    assert any(not torch.equal(first[name], alone[name]) for name in names)
