from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_evopress.loading.stitch import compress_model
from hf_evopress.models.ends import find_ends
from hf_evopress.models.size import model_size, stored_bytes
from hf_evopress.plans.plan import Plan

Factory = Callable[..., nn.Module]


def test_a_dense_model_takes_the_bits_of_its_dtype(tiny_model: Factory) -> None:
    size = model_size(tiny_model("llama").to(torch.bfloat16))
    assert size.bits_per_weight == 16
    assert size.bits_per_weight_with_embeddings == 16


def test_units_and_others_are_all_parameters(tiny_model: Factory) -> None:
    model = tiny_model("opt")
    size = model_size(model)
    assert size.unit_weights + size.other_weights == sum(p.numel() for p in model.parameters())


def test_tied_embeddings_count_once(tiny_model: Factory) -> None:
    tied = model_size(tiny_model("llama", tie_word_embeddings=True))
    untied = model_size(tiny_model("llama", tie_word_embeddings=False))
    assert untied.other_weights - tied.other_weights == 256 * 64
    assert untied.bits_per_weight == tied.bits_per_weight


def test_weights_of_dropped_blocks_still_count_as_weights(tiny_model: Factory) -> None:
    model = tiny_model("llama")
    whole = model_size(model)
    gone = {"model.layers.9.mlp.up_proj": (64, 128)}
    size = model_size(model, shapes=gone)
    assert size.unit_bits == whole.unit_bits
    assert size.unit_weights == whole.unit_weights + 64 * 128


def test_stored_bytes_are_those_on_disk(tiny_model: Factory, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert stored_bytes(tmp_path) == sum(len(f.read_bytes()) for f in files)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no .safetensors"):
        stored_bytes(tmp_path)


@pytest.mark.parametrize("is_tied", [True, False])
def test_packed_ends_count_the_weights_that_they_stand_for(
    tiny_model: Factory, is_tied: bool
) -> None:
    model = tiny_model("llama", tie_word_embeddings=is_tied)
    dense = model_size(model)
    ends = [unit.name for unit in find_ends(model)]
    compress_model(model, Plan(dict.fromkeys(ends, "rtn:bits=3,group_size=32")), None)
    size = model_size(model)
    assert size.other_weights == dense.other_weights
    assert size.bits_per_weight_with_embeddings < dense.bits_per_weight_with_embeddings
