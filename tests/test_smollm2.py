"""The whole line on a real model, SmolLM2-135M-Instruct (`make demo-model` fetches it)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_evopress
from hf_evopress import pipeline
from hf_evopress.recipe import Recipe
from hf_evopress.size import stored_bytes

CACHE = Path(__file__).parent.parent / ".cache"
MODEL, TEXT = CACHE / "SmolLM2-135M-Instruct", CACHE / "demo.txt"

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not MODEL.is_dir(), reason="no model: run `make demo-model` first"),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Result:
    home = tmp_path_factory.mktemp("smollm2")
    recipe = Recipe.from_dict(
        {
            "model": str(MODEL),
            "out": str(home / "out"),
            "budget": {"bits": 3.3},
            "levels": [f"gptq:bits={b},group_size=64" for b in (2, 3, 4, 5)],
            "data": {
                "sources": [str(TEXT)],
                "seq_len": 512,
                "calibration": 24,
                "search": 8,
                "heldout": 1,
                "test": 8,
            },
            "search": {
                "sensitivity_tokens": 3072,
                "settings": {"generations": 0, "tokens": [2048, 2048]},
            },
        }
    )
    return pipeline.compress(recipe, max_windows=6)


def test_the_searched_plan_is_no_worse_than_uniform_at_equal_bits_on_unseen_text(
    result: pipeline.Result,
) -> None:
    """With 12k calibration tokens and 3k test tokens; the benchmarks say by how much with more."""
    kl = {row.name.split()[0]: row.report.kl_nats for row in result.rows}
    bits = {row.name.split()[0]: row.bits_per_weight for row in result.rows}
    assert kl["searched"] is not None and kl["uniform"] is not None
    assert kl["searched"] < 1.05 * kl["uniform"] and kl["uniform"] < 0.45
    assert bits["searched"] <= 3.3 and bits["uniform"] == pytest.approx(3.297, abs=1e-3)


def test_the_folder_has_the_declared_size_and_reloads_packed(result: pipeline.Result) -> None:
    declared = result.plan.budget["checkpoint_bytes_at_most"]
    assert 0.99 * declared < stored_bytes(result.folder) <= declared
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    assert model.dtype == torch.bfloat16
    assert model.get_memory_footprint() < 1.01 * declared


def test_it_still_speaks_english(result: pipeline.Result) -> None:
    assert "Paris" in result.sample


def test_generation_and_chat_template_work_after_a_reload(result: pipeline.Result) -> None:
    assert hf_evopress.__version__
    model: Any = AutoModelForCausalLM.from_pretrained(result.folder)
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    messages = [{"role": "user", "content": "Say hello."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert out.shape[1] > ids["input_ids"].shape[1]
