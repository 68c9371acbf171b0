"""Checkpoints whose tensors have other names in the files than in the model: LLaVA and kin."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from hf_evopress.loading import ahead
from hf_evopress.loading.config import EvoPressConfig
from hf_evopress.loading.layers import compressed_linears
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
TEXT = {**SIZES, "model_type": "llama", "vocab_size": 64, "intermediate_size": 64}
VISION = {**SIZES, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
CODES = "language_model.model.layers.0.mlp.down_proj.codes"  # in the file
OLD = "model.language_model.layers.0.mlp.down_proj.codes"  # in the model


def make(kind: str) -> Any:
    vision = dict(VISION)
    if kind == "llava":
        vision["model_type"] = "clip_vision_model"
        more = {"image_token_index": 63}
    else:  # its patches are a convolution in the file, a product in the model
        vision |= {"embed_dim": 32, "depth": 1, "num_heads": 2}
        more = {"image_token_id": 63}
    torch.manual_seed(0)
    text = TEXT if kind == "llava" else {**TEXT, "model_type": "qwen2_vl_text"}
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **more)
    return AutoModelForImageTextToText.from_config(config)


def pack(model: Any, path: Path) -> Path:
    units = find_units(model)
    levels = {unit.name: "rtn:bits=4,group_size=16" for unit in units}
    plan = Plan(levels, shapes={unit.name: unit.shape for unit in units})
    compress_model(model, plan, None)
    attach(model, plan)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(make("llava"), tmp_path_factory.mktemp("llava"))


def checksums(folder: Path) -> dict[str, str]:
    config = json.loads((folder / "config.json").read_text())
    return config["quantization_config"]["checksums"]  # type: ignore[no-any-return]


def changed(
    folder: Path, path: Path, change: Callable[[dict[str, Tensor]], Any], sums: dict[str, str]
) -> Path:
    """Return a copy of a checkpoint with other tensors and checksums."""
    shutil.copytree(folder, path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["checksums"] = sums
    (path / "config.json").write_text(json.dumps(config))
    return path


def by_module(folder: Path) -> dict[str, str]:
    """Return checksums by module names, as they were written before."""
    made = checksums(folder)
    return {
        name.replace("language_model.model.", "model.language_model."): value
        for name, value in made.items()
    }


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_every_tensor_that_is_written_has_a_checksum(kind: str, tmp_path: Path) -> None:
    path = pack(make(kind), tmp_path / "new")
    model = AutoModelForImageTextToText.from_pretrained(path)
    model.save_pretrained(tmp_path / "again")
    for where in (path, tmp_path / "again"):
        tensors = load_file(where / "model.safetensors")
        assert {n for n, t in tensors.items() if t.numel()} == set(checksums(where))
    assert checksums(path) == checksums(tmp_path / "again")


@pytest.mark.parametrize("sums", [checksums, by_module])
def test_a_flipped_bit_is_refused_by_name(
    sums: Callable[[Path], dict[str, str]], folder: Path, tmp_path: Path
) -> None:
    def flip(tensors: dict[str, Tensor]) -> None:
        tensors[CODES].view(torch.uint8).view(-1)[0] ^= 1

    assert OLD in by_module(folder) and CODES in checksums(folder)
    path = changed(folder, tmp_path / "same", lambda tensors: None, sums(folder))
    AutoModelForImageTextToText.from_pretrained(path)
    path = changed(folder, tmp_path / "bad", flip, sums(folder))
    with pytest.raises(ValueError, match=f"1 tensors differ from their checksum.*: {CODES} in"):
        AutoModelForImageTextToText.from_pretrained(path)


@pytest.mark.parametrize("sums", [checksums, by_module])
def test_a_lost_tensor_is_named_before_anything_is_loaded(
    sums: Callable[[Path], dict[str, str]], folder: Path, tmp_path: Path
) -> None:
    path = changed(folder, tmp_path / "bad", lambda tensors: tensors.pop(CODES), sums(folder))
    with pytest.raises(ValueError, match=f"lacks 1 tensors; .*: ({CODES}|{OLD})"):
        AutoModelForImageTextToText.from_pretrained(path)


def test_a_wrong_shape_is_our_error(folder: Path, tmp_path: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[CODES] = tensors[CODES][:-1].contiguous()

    path = changed(folder, tmp_path / "bad", cut, {})
    with pytest.raises(ValueError, match=f"1 packed tensors .* shape .*: {CODES} is"):
        AutoModelForImageTextToText.from_pretrained(path)


@pytest.mark.parametrize("kind", [AutoModelForImageTextToText, AutoModel])
def test_packed_tensors_are_read_ahead(
    kind: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    give = ahead._give
    monkeypatch.setattr(ahead, "_give", lambda *args: found.append(args[1]) or give(*args))
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert len(found) == sum(len(layer.state) for layer in compressed_linears(model).values()) > 0
    assert not info["missing_keys"]
    assert all("lm_head" in key for key in info["unexpected_keys"])


def test_module_names_in_the_file_are_as_good(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.save_pretrained(tmp_path / "plain", save_original_format=False)
    assert OLD in load_file(tmp_path / "plain" / "model.safetensors")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "plain")

    def flip(tensors: dict[str, Tensor]) -> None:
        tensors[OLD].view(torch.uint8).view(-1)[0] ^= 1

    path = changed(tmp_path / "plain", tmp_path / "bad", flip, checksums(tmp_path / "plain"))
    with pytest.raises(ValueError, match=f"1 tensors differ from their checksum.*: {OLD} in"):
        AutoModelForImageTextToText.from_pretrained(path)


@pytest.mark.parametrize("way", ["compressed in memory", "compressed while loading"])
def test_layers_that_are_one_weight_in_dense_files_are_packed_by_themselves(
    way: str, tmp_path: Path
) -> None:
    """Query, key and value of Nomic BERT are merged by transformers when it saves."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("nomic_bert", **SIZES, intermediate_size=32, vocab_size=64)
    made, ids = AutoModel.from_config(config).eval(), torch.arange(12)[None]
    made.save_pretrained(tmp_path / "dense")
    assert any("Wqkv" in name for name in load_file(tmp_path / "dense" / "model.safetensors"))
    if way == "compressed in memory":
        pack(made, tmp_path / "small")
    else:
        plan = Plan({unit.name: "rtn:bits=4,group_size=16" for unit in find_units(made)})
        made = AutoModel.from_pretrained(
            tmp_path / "dense", quantization_config=EvoPressConfig(plan)
        )
        made.save_pretrained(tmp_path / "small")
    again = AutoModel.from_pretrained(tmp_path / "small")
    assert torch.equal(again(ids).last_hidden_state, made(ids).last_hidden_state)
    assert checksums(tmp_path / "small").keys() >= {"encoder.layers.0.self_attn.q_proj.codes"}
    again.dequantize()
    again.save_pretrained(tmp_path / "stock")
    stock = AutoModel.from_pretrained(tmp_path / "stock")
    assert torch.allclose(stock(ids)[0], made(ids)[0], atol=1e-5)
