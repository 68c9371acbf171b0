"""Plans as checkpoints of compressed-tensors, which need no hf_evopress where they are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_evopress.export.compressed_tensors import CompressedTensorsExport
from hf_evopress.methods import compose
from hf_evopress.models.experts import split_experts
from hf_evopress.models.units import find_units
from hf_evopress.plans.level import Level
from hf_evopress.plans.plan import Plan

from ..versions import needs_version

pytest.importorskip("compressed_tensors", reason="an extra: hf-evopress[compressed-tensors]")

IDS = torch.arange(3, 35).view(2, 16)
MIXED = (
    "rtn:bits=2,group_size=16,symmetric=true",
    "rtn:bits=3,group_size=32,symmetric=true",
    "rtn:bits=4,group_size=64,symmetric=true",
    "rtn:bits=5,group_size=32,scales=bfloat16,symmetric=true",
    "rtn:bits=8,group_size=-1,symmetric=true",
    "magnitude:sparsity=0.5,bits=4,group_size=32,symmetric=true",
    "dense",
)
ZEROS = ("rtn:bits=3,group_size=32", "dense")
TinyModel = Callable[..., Any]


class Made:
    """A plan, the states of its levels, and a model that computes by it."""

    def __init__(self, model: Any, levels: tuple[str, ...]) -> None:
        self.states: dict[str, Any] = {}
        units = find_units(model)
        self.plan = Plan({u.name: levels[i % len(levels)] for i, u in enumerate(units)})
        for unit in units:
            level, linear = self.plan[unit.name], model.get_submodule(unit.name)
            if level.is_dense:
                continue
            state = compose.compress(level, linear.weight.detach(), None)
            self.states[unit.name] = state
            linear.weight.data = compose.decompress(level, state, unit.shape, torch.float32)
        self.model = model

    def state(self, unit: str, level: Level) -> Any:
        return self.states[unit]


CASES = {"mixed": (MIXED, torch.float32), "zero points": (ZEROS, torch.float16)}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("arch", ["llama", "qwen3", "opt"])
def test_stock_transformers_loads_the_same_weights(
    arch: str, case: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    levels, dtype = CASES[case]
    made = Made(tiny_model(arch), levels)
    folder = CompressedTensorsExport().save(tiny_model(arch), made.plan, made.state, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        logits = loaded(IDS).logits  # compressed-tensors decompresses at the first forward
        if dtype == torch.float32:
            assert torch.equal(logits, made.model(IDS).logits)
    ours, theirs = (dict(m.named_parameters()) for m in (made.model, loaded))
    for unit, level in made.plan.items():
        W = theirs[f"{unit}.weight"]
        if not level.is_dense:
            state, shape = made.states[unit], (W.shape[0], W.shape[1])
            assert torch.equal(W, compose.decompress(level, state, shape, dtype)), unit
        else:
            assert torch.equal(W, ours[f"{unit}.weight"].to(dtype))


@needs_version("compressed-tensors", "0.18", "10 codes of 3 bits fill a word of 32")
def test_codes_take_no_more_bytes_than_packed_ones(tiny_model: TinyModel, tmp_path: Path) -> None:
    from safetensors import safe_open

    made = Made(tiny_model("llama"), ("rtn:bits=3,group_size=32",))
    folder = CompressedTensorsExport().save(
        tiny_model("llama"), made.plan, made.state, tmp_path / "x"
    )
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for unit, level in made.plan.items():
            sizes = {
                name: file.get_tensor(f"{unit}.weight_{name}").nbytes
                for name in ("packed", "scale", "zero_point")
            }
            ours = {name: tensor.nbytes for name, tensor in made.states[unit].items()}
            assert sizes["packed"] == ours["codes"]
            assert sizes["scale"] == ours["scales"]
            assert 8 * sum(sizes.values()) <= 1.02 * compose.cost_bits(level, _shape(made, unit))


def test_levels_without_codes_are_refused_by_name(tiny_model: TinyModel, tmp_path: Path) -> None:
    units = [u.name for u in find_units(tiny_model("llama"))]
    plan = Plan({units[0]: "lowrank:rank=8", units[1]: "rtn:bits=4,group_size=32"})
    with pytest.raises(ValueError, match=r"q_proj: level 'lowrank:rank=8' is not one term") as info:
        CompressedTensorsExport().save(tiny_model("llama"), plan, _none, tmp_path / "x")
    assert units[1] not in str(info.value)
    plan = Plan({"model.layers.0.mlp": "drop"})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp: it is dropped"):
        CompressedTensorsExport().save(tiny_model("llama"), plan, _none, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_zero_points_beside_other_levels_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    units = [u.name for u in find_units(tiny_model("llama"))]
    plan = Plan({units[0]: "rtn:bits=3,group_size=32", units[1]: "rtn:bits=4,group_size=32"})
    with pytest.raises(ValueError, match="several levels .*symmetric=true"):
        CompressedTensorsExport().save(tiny_model("llama"), plan, _none, tmp_path / "x")


def test_experts_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    split_experts(model)
    unit = next(u.name for u in find_units(model) if ".experts." in u.name)
    with pytest.raises(ValueError, match="it is an expert"):
        CompressedTensorsExport().save(
            model, Plan({unit: "rtn:bits=4,group_size=32"}), _none, tmp_path / "x"
        )


def _none(unit: str, level: Level) -> Any:
    raise AssertionError(f"{unit} should not have been asked for")


def _shape(made: Made, unit: str) -> tuple[int, int]:
    linear = made.model.get_submodule(unit)
    return (linear.out_features, linear.in_features)


def test_ends_are_written_dense_and_named(
    tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    level = compose.normalize("rtn:bits=4,group_size=64,symmetric=true")
    made = Made(tiny_model("llama", tie_word_embeddings=True), (str(level),))
    weight = made.model.get_input_embeddings().weight
    made.states["model.embed_tokens"] = state = compose.compress(level, weight.detach(), None)
    weight.data = compose.decompress(level, state, (256, 64), torch.float32)
    plan = Plan({**made.plan.levels, "model.embed_tokens": level})
    dense = tiny_model("llama", tie_word_embeddings=True)
    folder = CompressedTensorsExport().save(dense, plan, made.state, tmp_path / "x")
    assert "model.embed_tokens (rtn:bits=4,group_size=64,symmetric=true)" in caplog.text
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, made.model(IDS).logits)
