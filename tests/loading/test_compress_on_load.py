"""The user's own from_pretrained(dense, quantization_config=EvoPressConfig(plan=...))."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_evopress.loading.config import EvoPressConfig
from hf_evopress.loading.layers import compressed_linears
from hf_evopress.plans.plan import Plan

TinyModel = Callable[..., nn.Module]

UP = "model.layers.1.mlp.up_proj"
ON_LOAD, WITH_DATA = "rtn:bits=4,group_size=32", "gptq:bits=3,group_size=32"


@pytest.fixture
def text(structured_text: Any, tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(structured_text(60))
    return str(path)


@pytest.mark.parametrize("level", [ON_LOAD, WITH_DATA])
def test_a_headless_model_is_compressed(
    tiny_model: TinyModel, byte_tokenizer: Any, tmp_path: Path, text: str, level: str
) -> None:
    tiny_model().model.save_pretrained(tmp_path / "headless")
    byte_tokenizer.save_pretrained(tmp_path / "headless")
    config = EvoPressConfig(Plan({UP: level}), data=text, n_sequences=4, seq_len=32)
    made = AutoModel.from_pretrained(tmp_path / "headless", quantization_config=config)
    assert [*compressed_linears(made)] == [UP.removeprefix("model.")]
    made.save_pretrained(tmp_path / "small")
    ids = torch.arange(20)[None]
    again = AutoModel.from_pretrained(tmp_path / "small")
    assert torch.equal(again(ids).last_hidden_state, made(ids).last_hidden_state)


@pytest.mark.parametrize("level", [ON_LOAD, WITH_DATA])
@pytest.mark.parametrize("where", [UP, "model.layers.0.input_layernorm"])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_a_weight_that_is_not_a_number_is_named(
    tiny_model: TinyModel,
    byte_tokenizer: Any,
    tmp_path: Path,
    text: str,
    level: str,
    where: str,
    value: float,
) -> None:
    model: Any = tiny_model()
    with torch.no_grad():
        model.get_submodule(where).weight.view(-1)[5] = value
    model.save_pretrained(tmp_path / "dense")
    byte_tokenizer.save_pretrained(tmp_path / "dense")
    config = EvoPressConfig(Plan({UP: level}), data=text, n_sequences=4, seq_len=32)
    with pytest.raises(ValueError, match=rf"NaN or infinity in {where}\.weight.*download it again"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)


OTHERS: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 32, "hidden_size": 64, "vocab_size": 64, "num_attention_heads": 2},
    "swinv2": {"image_size": 32, "embed_dim": 16, "depths": [1], "num_heads": [2]},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_plan_of_ones_own_is_for_models_that_no_command_searches_too(
    kind: str, tmp_path: Path
) -> None:
    """Albert has no list of its blocks; Swin v2 casts to the dtype of a first parameter."""
    config = AutoConfig.for_model(kind, **OTHERS[kind])
    torch.manual_seed(0)
    dense = AutoModel.from_config(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    linears = [n for n, m in dense.named_modules() if type(m) is nn.Linear]
    plan = Plan(dict.fromkeys(linears, "rtn:bits=8,group_size=-1"))
    made = AutoModel.from_pretrained(
        tmp_path / "dense", quantization_config=EvoPressConfig(plan)
    ).eval()
    assert [*compressed_linears(made)] == linears
    made.save_pretrained(tmp_path / "small")
    again = AutoModel.from_pretrained(tmp_path / "small").eval()
    x = torch.arange(20)[None] if kind == "albert" else torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected, found = dense(x).last_hidden_state, made(x).last_hidden_state
        assert torch.allclose(found, expected, atol=0.05 * float(expected.abs().max()))
        assert torch.equal(again(x).last_hidden_state, found)


@pytest.mark.parametrize("level", [ON_LOAD, WITH_DATA])
def test_the_plan_of_the_result_names_its_own_model_and_no_figures_of_another(
    tiny_model: TinyModel, write_model: Any, tmp_path: Path, text: str, level: str
) -> None:
    dense = write_model(tmp_path, tiny_model()) / "dense"
    results = {"kl_nats": 0.1, "refined": {"mode": "best", "before": 0.2, "after": 0.1}}
    plan = Plan({UP: level}, base_model="me/other", revision="v1", results=results)
    config = EvoPressConfig(plan, data=text, n_sequences=4, seq_len=32)
    made = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    made.save_pretrained(tmp_path / "small")
    own = Plan.from_pretrained(tmp_path / "small")
    assert (own.base_model, own.revision, own.results) == (str(dense), None, {})
    assert own.levels == plan.levels
