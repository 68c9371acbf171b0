"""The whole line on every tested architecture: fused projections, biases, post-norms, no tie."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_evopress.jobs import pipeline
from hf_evopress.recipes.recipe import Recipe

ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen3",
    "gemma3_text",
    "phi3",
    "gpt_neox",
    "opt",
    "gpt2",
    "falcon",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
)


def _recipe(home: Path) -> Recipe:
    return Recipe.from_dict(
        {
            "model": str(home / "dense"),
            "out": str(home / "out"),
            "budget": {"bits": 3.7},
            "levels": [f"gptq:bits={b},group_size=32" for b in (2, 3, 4)],
            "data": {
                "sources": [str(home / "text.txt")],
                "seq_len": 32,
                "calibration": 8,
                "search": 4,
                "heldout": 2,
                "test": 4,
            },
            "search": {"strategy": "knapsack", "sensitivity_tokens": 128},
        }
    )


def _home(folder: Path, model: nn.Module, tokenizer: Any, text: str) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder / "dense")  # type: ignore[operator]
    tokenizer.save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(text)
    return folder


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_model_is_compressed_reloaded_and_measured(
    arch: str,
    tmp_path: Path,
    tiny_model: Callable[..., nn.Module],
    byte_tokenizer: Any,
    structured_text: Callable[..., str],
) -> None:
    home = _home(tmp_path, tiny_model(arch), byte_tokenizer, structured_text(200))
    result = pipeline.compress(_recipe(home))  # raises if the reloaded logits differ in one bit
    assert 3.4 < result.plan.budget["bits_per_weight"] <= 3.7
    searched = next(row for row in result.rows if row.name == "searched")
    assert searched.report.kl_nats is not None and searched.report.kl_nats < 1


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(
    tmp_path: Path,
    tiny_model: Callable[..., nn.Module],
    byte_tokenizer: Any,
    structured_text: Callable[..., str],
) -> None:
    model = tiny_model("llama", num_hidden_layers=12)
    home = _home(tmp_path, model, byte_tokenizer, structured_text(200))
    recipe = _recipe(home)
    recipe.save(home / "recipe.yaml")
    command = [sys.executable, "-m", "hf_evopress", "run", str(home / "recipe.yaml")]
    straight = subprocess.run(
        [*command, f"out={home / 'straight'}"], capture_output=True, text=True
    )
    assert straight.returncode == 0, straight.stderr
    for pattern in ("out.work/stats/block_00002*", "out.work/store/unit_00003*"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(home.glob(pattern)):
            time.sleep(0.005)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    resumed = subprocess.run(command, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    files = [home / name / "model.safetensors" for name in ("out", "straight")]
    assert files[0].read_bytes() == files[1].read_bytes()
