"""Trellis levels in a model: packed, reloaded bit for bit, dequantized, and under an adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_evopress.calibration.input_moments import calibrate, load_stats
from hf_evopress.calibration.output_moments import load_moments, output_moments
from hf_evopress.loading.config import EvoPressConfig
from hf_evopress.loading.layers import CompressedLinear, compressed_linears
from hf_evopress.loading.stitch import compress_model
from hf_evopress.methods.compose import normalize
from hf_evopress.models.experts import split_experts
from hf_evopress.models.plain import make_plain
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan
from hf_evopress.store.level_store import LevelStore, Source

LEVELS = (
    "trellis:bits=3,state_bits=6,feedback=none",
    "trellis:bits=2,state_bits=6,feedback=none + lowrank:rank=4,metric=plain",
    "trellis:bits=3,state_bits=6,feedback=none,tail_biting=false",
    "trellis:bits=1.5,state_bits=6,feedback=none,codebook=weyl,scales=channels",
)
TOKENS = torch.arange(40).view(2, 20)


def plan_for(model: nn.Module) -> Plan:
    units = find_units(model)
    levels = {u.name: LEVELS[i % len(LEVELS)] for i, u in enumerate(units)}
    return Plan(levels, {u.name: u.shape for u in units})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


@pytest.fixture(params=["llama", "gpt2", "mixtral"])  # linears, Conv1D, fused experts
def packed(request: pytest.FixtureRequest, tiny_model: Callable[..., Any], tmp_path: Path) -> Any:
    model = tiny_model(request.param)
    model.save_pretrained(tmp_path / "dense")
    form = copy.deepcopy(model)
    make_plain(form)
    split_experts(form)
    return load(tmp_path / "dense", quantization_config=EvoPressConfig(plan_for(form)))


def test_a_model_comes_back_bit_for_bit_and_dequantizes(packed: Any, tmp_path: Path) -> None:
    levels = {str(layer.level) for layer in compressed_linears(packed).values()}
    assert len(levels) == len(LEVELS)
    packed.save_pretrained(tmp_path / "small")
    loaded = load(tmp_path / "small")
    assert torch.equal(logits(loaded), logits(packed))
    expected = logits(packed)
    stock = loaded.dequantize()
    assert not any(isinstance(m, CompressedLinear) for m in stock.modules())
    assert torch.allclose(logits(stock), expected, atol=1e-4)


def test_an_adapter_trains_on_top_and_comes_back(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=EvoPressConfig(plan_for(dense)))
    model.save_pretrained(tmp_path / "small")
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(4):
        loss = peft(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    peft.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(tmp_path / "small"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(peft.eval()))


def test_codes_of_another_shape_are_an_error_that_names_the_layer(
    tiny_model: Callable[..., Any],
) -> None:
    weight = tiny_model("llama").model.layers[0].mlp.up_proj.weight.detach()
    level = "trellis:bits=2,state_bits=6,feedback=none"
    state = {"codes": torch.zeros(7, 4, 64, dtype=torch.uint8), "scale": torch.ones(1)}
    with pytest.raises(
        ValueError, match=r"codes of level .*uint8 \(8, 4, 64\); got .*\(7, 4, 64\)"
    ):
        CompressedLinear.from_state(level, state, None, (weight.shape[0], weight.shape[1]))


def test_a_plan_applied_to_the_same_text_gives_what_the_store_holds(
    trained_llama: Any, text_tokens: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    """Sensitivities included: two-sided rounding is not lost on the way of a shared plan."""
    level, tokens = "trellis:bits=2,state_bits=6", text_tokens(8, 32)
    model = copy.deepcopy(trained_llama)
    units = find_units(model)[:7]
    plan = Plan({u.name: level for u in units}, {u.name: u.shape for u in units})
    calibrate(model, tokens, tmp_path, units=units)
    output_moments(model, tokens, tmp_path, units=units)
    source = Source(
        {}, lambda block: load_stats(tmp_path, block), lambda block: load_moments(tmp_path, block)
    )
    menus = {u.name: [normalize(level)] for u in units}
    store = LevelStore.build(tmp_path / "store", model, units, menus, source)
    compress_model(model, plan, tokens)
    layers = compressed_linears(model)
    for unit in units:
        codes, expected = layers[unit.name].codes, store.state(unit.name, level)["codes"]
        # weights are made one by one here and in step there: a tie may turn, and with it a walk
        assert (codes != expected).float().mean() < 0.05


def test_a_weight_that_is_not_finite_is_named(tiny_model: Callable[..., nn.Module]) -> None:
    model, unit = tiny_model("llama"), "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        model.get_submodule(unit).weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=rf"^{unit}: a weight of shape .* contains inf or NaN"):
        compress_model(model, Plan({unit: "trellis:bits=2.5,state_bits=6,feedback=none"}), None)
