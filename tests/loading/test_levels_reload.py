"""Levels that keep more than codes and scales come back from a checkpoint as they were saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_evopress.loading.layers import compressed_linears
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.methods import compose
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan

LEVELS = (
    "dict:bits=4",
    "dict:bits=12.8,atoms=float16,values=bfloat16,sweeps=1",
    "mpo:bits=4",
    "mpo:bits=8,factors=bfloat16,metric=kron",
    "bitstack:blocks=3",
    "bitstack:blocks=2,rank=4",
    "hadamard:bits=3",
    "hadamard:bits=2,block=16 + lowrank:rank=4",
)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("level", LEVELS)
def test_a_reloaded_model_has_the_logits_of_the_one_that_was_saved(
    tiny_model: Any, text_tokens: Any, tmp_path: Path, level: str, dtype: torch.dtype
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    tokens = text_tokens(4, 32)
    shapes = {unit.name: unit.shape for unit in find_units(dense)}
    model: Any = copy.deepcopy(dense)
    plan = Plan(dict.fromkeys(shapes, level), shapes)
    compress_model(model, plan, tokens)
    attach(model, plan)
    wanted = logits(model.eval(), tokens)
    model.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    assert loaded.dtype == dtype and torch.equal(logits(loaded, tokens), wanted)
    assert not torch.equal(wanted, logits(dense, tokens))
    layers = compressed_linears(loaded)
    assert layers.keys() == shapes.keys()
    for name, old in compressed_linears(model).items():
        new = layers[name]
        assert new.level == old.level and new.state.keys() == old.state.keys()
        assert all(torch.equal(t, new.state[key]) for key, t in old.state.items())
        bits = sum(8 * t.numel() * t.element_size() for t in new.state.values())
        assert bits == compose.cost_bits(new.level, shapes[name])
