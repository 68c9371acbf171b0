"""Packed tensors that are read before the rest are those that transformers would have loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from hf_evopress.loading import ahead
from hf_evopress.loading.layers import compressed_linears
from hf_evopress.loading.packed import PackedWeight
from hf_evopress.loading.unexpected import patterns_of

from .test_quantizer import compress, make_plan, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable) -> Path:
    dense = tiny_model("llama", tie_word_embeddings=True)
    return save(compress(dense, make_plan(dense)), tmp_path_factory.mktemp("packed"))


def loaded(folder: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    if kind is AutoModelForCausalLM:
        assert not info["unexpected_keys"]
    return model


def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by the names of what is read ahead."""
    found: list[str] = []
    give = ahead._give

    def noted(layer: PackedWeight, name: str, tensor: torch.Tensor) -> bool:
        found.append(name)
        return give(layer, name, tensor)

    monkeypatch.setattr(ahead, "_give", noted)
    return found


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_the_one_that_the_loop_loads(
    folder: Path, kind: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = read(monkeypatch)
    model = loaded(folder, kind, dtype=dtype)
    assert len(names) == sum(len(layer.state) for layer in compressed_linears(model).values()) > 0
    monkeypatch.setattr(ahead, "_stays_here", lambda device_map: False)
    other = loaded(folder, kind, dtype=dtype)
    state, wanted = model.state_dict(), other.state_dict()
    assert list(state) == list(wanted)
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    assert not any(
        p.requires_grad for m in compressed_linears(model).values() for p in m.state.values()
    )


def test_models_that_are_spread_over_devices_are_left_to_the_loop(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = read(monkeypatch)
    loaded(folder, device_map={"": "cpu"})
    assert names
    names.clear()
    assert ahead._stays_here(None) and not ahead._stays_here({"": "cpu", "lm_head": "disk"})
    assert not ahead._stays_here("auto") and not ahead._stays_here({"": 0})


def test_names_that_differ_in_a_number_are_one_expression() -> None:
    keys = ["layers.0.up.weight", "layers.11.up.weight", "h.3.fc1.codes", "notice", "layers.2.mlp."]
    patterns = patterns_of(keys)
    assert len(patterns) == 4
    whole = re.compile("|".join(rf"({pattern})" for pattern in patterns))
    assert all(whole.search(f"model.{key}") and whole.search(key) for key in keys[:4])
    assert whole.search("model.layers.2.mlp.up.weight")
    for other in (
        "layers.1.up.weight",
        "layers.0.up.weights",
        "layers.0.up",
        "xlayers.0.up.weight",
    ):
        assert not whole.search(other)
