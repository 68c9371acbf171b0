"""What transformers and PEFT count as parameters of a compressed model are weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_evopress.loading.config import EvoPressConfig
from hf_evopress.loading.counting import count_in_transformers
from hf_evopress.plans.plan import Plan


@pytest.fixture(scope="module")
def pair(
    tiny_model: Callable[..., nn.Module], write_model: Any, tmp_path_factory: Any
) -> tuple[Any, Any]:
    """A dense model and the same one with packed layers, loaded."""
    dense: Any = tiny_model("llama")
    levels = ("rtn:bits=3,group_size=32", "rtn:bits=4,group_size=32")
    folder: Path = write_model(tmp_path_factory.mktemp("counting"), dense, *levels)
    return dense, AutoModelForCausalLM.from_pretrained(folder / "small")


def test_num_parameters_is_that_of_the_dense_model(pair: tuple[Any, Any]) -> None:
    dense, packed = pair
    assert sum(p.numel() for p in packed.parameters()) < 0.8 * dense.num_parameters()
    for options in ({}, {"exclude_embeddings": True}):
        assert packed.num_parameters(**options) == dense.num_parameters(**options)
    count_in_transformers()
    assert packed.num_parameters() == dense.num_parameters()


def test_a_head_tied_to_a_packed_embedding_is_counted_once(
    tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    dense: Any = tiny_model("llama", tie_word_embeddings=True)
    dense.save_pretrained(tmp_path)
    config = EvoPressConfig(Plan({"model.embed_tokens": "rtn:bits=8,group_size=64"}))
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    for options in ({}, {"exclude_embeddings": True}):
        assert packed.num_parameters(**options) == dense.num_parameters(**options)


def test_the_trainable_share_of_peft_is_of_weights(pair: tuple[Any, Any]) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    counts = [get_peft_model(copy.deepcopy(m), config).get_nb_trainable_parameters() for m in pair]
    assert counts[0] == counts[1]
