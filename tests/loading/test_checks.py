"""What a checkpoint has to bring, and what it need not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan

SIZES = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 0}
FFN = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
IDS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed Marian, whose position embeddings transformers leaves out of checkpoints."""
    config = AutoConfig.for_model("marian", vocab_size=64, **SIZES, **HEADS, **FFN, **IDS)
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config)
    units = find_units(model)
    levels = {unit.name: "rtn:bits=4,group_size=16" for unit in units}
    plan = Plan(levels, shapes={unit.name: unit.shape for unit in units})
    compress_model(model, plan, None)
    attach(model, plan)
    path = tmp_path_factory.mktemp("marian")
    model.save_pretrained(path)
    return path


def test_what_transformers_does_not_write_has_no_checksum(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    checksums = config["quantization_config"]["checksums"]
    assert not any("embed_positions" in name for name in checksums)
    assert AutoModelForSeq2SeqLM.from_pretrained(folder).model.encoder.embed_positions.weight.any()


def test_a_folder_whose_checksums_demand_it_loads(folder: Path) -> None:
    path = folder / "config.json"
    before = path.read_text()
    config = json.loads(before)
    name = "model.encoder.embed_positions.weight"
    config["quantization_config"]["checksums"][name] = "00000000"
    path.write_text(json.dumps(config))
    AutoModelForSeq2SeqLM.from_pretrained(folder)
    config["quantization_config"]["checksums"]["model.shared.weights"] = "00000000"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks 1 tensors; .*: model\.shared\.weights"):
        AutoModelForSeq2SeqLM.from_pretrained(folder)
    path.write_text(before)
