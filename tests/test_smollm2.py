"""The whole line on a real model, SmolLM2-135M-Instruct (`make demo-model` fetches it)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_evopress
from hf_evopress.adapters.folder import load_adapter
from hf_evopress.adapters.repair import adapt
from hf_evopress.jobs import pipeline
from hf_evopress.models.size import stored_bytes
from hf_evopress.recipes.recipe import Recipe

CACHE = Path(__file__).parent.parent / ".cache"
MODEL, TEXT = CACHE / "SmolLM2-135M-Instruct", CACHE / "demo.txt"

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not MODEL.is_dir(), reason="no model: run `make demo-model` first"),
]


STOCK = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
dense, adapter, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
assert "hf_evopress" not in sys.modules
with torch.no_grad():
    logits = model(input_ids=torch.tensor([[int(i) for i in ids.split(",")]])).logits
save_file({"logits": logits.contiguous()}, out)
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Result:
    home = tmp_path_factory.mktemp("smollm2")
    recipe = Recipe.from_dict(
        {
            "model": str(MODEL),
            "out": str(home / "out"),
            "budget": {"bits": 3.3},
            "levels": [f"gptq:bits={b},group_size=64" for b in (2, 3, 4)],
            "skip": ["model.layers.?.*", "model.layers.1?.*"],  # ten blocks of thirty are left
            "data": {
                "sources": [str(TEXT)],
                "seq_len": 512,
                "calibration": 8,
                "search": 4,
                "heldout": 1,
                "test": 4,
            },
            "search": {
                "sensitivity_tokens": 2048,
                "settings": {"generations": 0, "tokens": [1024, 1024]},
            },
        }
    )
    return pipeline.compress(recipe, max_windows=2)


def test_the_searched_plan_is_no_worse_than_uniform_at_equal_bits_on_unseen_text(
    result: pipeline.Result,
) -> None:
    """With 4k calibration tokens and 1k test tokens; the benchmarks say by how much."""
    kl = {row.name.split()[0]: row.report.kl_nats for row in result.rows}
    bits = {row.name.split()[0]: row.bits_per_weight for row in result.rows}
    assert kl["searched"] is not None and kl["uniform"] is not None
    assert kl["searched"] < 1.05 * kl["uniform"] and kl["uniform"] < 0.2
    assert bits["searched"] <= 3.3 and bits["uniform"] == pytest.approx(3.297, abs=1e-3)


def test_the_folder_has_the_declared_size_and_reloads_packed(result: pipeline.Result) -> None:
    declared = result.plan.budget["checkpoint_bytes_at_most"]
    assert 0.99 * declared < stored_bytes(result.folder) <= declared
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    assert model.dtype == torch.bfloat16
    assert model.get_memory_footprint() < 1.01 * declared


def test_it_still_speaks_english(result: pipeline.Result) -> None:
    """Which sentence follows the prompt is a near tie that sums in another order can flip."""
    after = result.sample.partition("The capital of France is")[2]
    words = after.lower().replace(".", " ").replace(",", " ").split()
    assert len(words) >= 5 and "\ufffd" not in after
    common = {"the", "of", "is", "a", "an", "and", "to", "in", "be", "can", "that", "it", "as"}
    assert len(common & {*words}) >= 2, after


def test_generation_and_chat_template_work_after_a_reload(result: pipeline.Result) -> None:
    assert hf_evopress.__version__
    model: Any = AutoModelForCausalLM.from_pretrained(result.folder)
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    messages = [{"role": "user", "content": "Say hello."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert out.shape[1] > ids["input_ids"].shape[1]


def test_stock_peft_reads_an_adapter_of_ours_on_a_dense_copy(
    result: pipeline.Result, tmp_path: Path
) -> None:
    """In a process that never imports the package: the same logits as on the packed model."""
    eora = adapt(
        str(result.folder), tmp_path / "eora", data=[str(TEXT)], dense=str(MODEL), rank=8,
        n_sequences=2, seq_len=256,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32).eval()
    ids = list(range(100, 130))
    with torch.no_grad():
        plain = model(input_ids=torch.tensor([ids])).logits
        ours = load_adapter(model, eora)(input_ids=torch.tensor([ids])).logits
    dense: Any = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32)
    dense.dequantize().save_pretrained(tmp_path / "dense")
    where = [str(tmp_path / "dense"), str(eora), ",".join(map(str, ids)), str(tmp_path / "logits")]
    off = {**os.environ, "HF_EVOPRESS_AUTOLOAD": "0"}  # as where the plugin is not installed
    subprocess.run([sys.executable, "-c", STOCK, *where], check=True, cwd=tmp_path, env=off)
    stock = load_file(tmp_path / "logits")["logits"]
    torch.testing.assert_close(stock, ours, atol=1e-3, rtol=1e-3)
    assert float((plain - ours).abs().max()) > 0.1
