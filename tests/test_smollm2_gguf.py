"""SmolLM2-135M-Instruct as a GGUF file in llama.cpp (`make demo-model` fetches the model)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_evopress.export.gguf import FILE, GGUFExport
from hf_evopress.methods import compose
from hf_evopress.models.ends import find_ends
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan

from .llama_cpp import LlamaCpp, complete, serve

CACHE = Path(__file__).parent.parent / ".cache"
MODEL, TEXT = CACHE / "SmolLM2-135M-Instruct", Path(__file__).parent / "data" / "botchan.txt"
N_TOKENS = 256

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not MODEL.is_dir(), reason="no model: run `make demo-model` first"),
]
pytest.importorskip("xllamacpp", reason="an extra: hf-evopress[gguf]")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """The model at types that ggml makes fast, one per width of rows; its tokenizer; the file."""
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    units = find_units(model) + find_ends(model)
    kinds = {u.name: "q6_k" if u.shape[1] % 256 == 0 else "q5_0" for u in units}
    kinds["model.embed_tokens"] = "q8_0"
    plan = Plan(
        {name: f"gguf:type={kind},feedback=false" for name, kind in kinds.items()},
        shapes={u.name: u.shape for u in units},
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    )

    def states(unit: str, level: Any) -> Any:
        if unit not in kept:
            kept[unit] = compose.compress(level, weights[unit], None)
        return kept[unit]

    weights = {u.name: model.get_submodule(u.name).weight.detach().clone() for u in units}
    kept: dict[str, Any] = {}
    out = tmp_path_factory.mktemp("gguf") / "out"
    GGUFExport().save(model, plan, states, out, tokenizer=tokenizer)
    return model, tokenizer, out / FILE


@torch.no_grad()
def test_llama_cpp_has_our_tokens_and_perplexity(made: tuple[Any, Any, Path]) -> None:
    model, tokenizer, path = made
    text = TEXT.read_text(encoding="utf-8")[2000:4000]
    ids = tokenizer(text).input_ids
    llama = LlamaCpp(path, n_context=N_TOKENS)
    assert llama.tokenize(text) == ids
    ids = ids[:N_TOKENS]
    theirs = llama.logits(ids).log_softmax(-1)
    llama.close()
    ours = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    # what llama.cpp multiplies by weights of these types is rounded to 8 bits
    assert float((ours.exp() * (ours - theirs)).sum(-1).mean()) < 0.01
    target = torch.tensor(ids[1:])[:, None]
    perplexity = [math.exp(-float(x[:-1].gather(1, target).mean())) for x in (ours, theirs)]
    assert perplexity[1] == pytest.approx(perplexity[0], rel=0.02)


def test_its_server_writes_our_greedy_text(made: tuple[Any, Any, Path]) -> None:
    model, tokenizer, path = made
    server = serve(path)
    for prompt in ("The capital of France is", "Water boils at a temperature of"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        ours = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        assert complete(server, prompt, 16) == tokenizer.decode(ours, skip_special_tokens=True)
