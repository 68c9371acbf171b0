"""Dropped sub-blocks through save, load, generate, dequantize, and a search's evaluator."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_evopress.export.evopress import EvoPressExport
from hf_evopress.loading.config import EvoPressConfig
from hf_evopress.methods import compose
from hf_evopress.models.dropped import (
    DroppedAttention,
    DroppedMLP,
    dropped_modules,
    replace_dropped,
)
from hf_evopress.models.units import find_units
from hf_evopress.plans.level import Level
from hf_evopress.plans.plan import Plan
from hf_evopress.scoring.evaluator import Evaluator
from hf_evopress.scoring.fitness.kl import KL
from hf_evopress.store.level_store import LevelStore, Source

IDS = torch.arange(3, 19).view(2, 8)
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.1.mlp"
UP = "model.layers.0.mlp.up_proj"
RTN = "rtn:bits=4,group_size=32"
TinyModel = Callable[..., Any]

PLANS = {
    "attention of layer 0": {ATTENTION: "drop"},
    "an mlp": {MLP: "drop"},
    "a whole block": {ATTENTION: "drop", "model.layers.0.mlp": "drop"},
    "a mixture": {ATTENTION: "drop", MLP: "drop", UP: RTN},
}


def export(model: Any, levels: dict[str, str], folder: Path) -> Path:
    def states(unit: str, level: Level) -> dict[str, torch.Tensor]:
        return compose.compress(level, model.get_submodule(unit).weight.detach(), None)

    return EvoPressExport().save(model, Plan(levels), states, folder)


def load(folder: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **how)


def generate(model: Any, **how: Any) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=8, pad_token_id=0, **how)


@pytest.mark.parametrize("which", list(PLANS))
def test_a_saved_model_loads_and_generates_the_same(
    which: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    export(model, PLANS[which], tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert torch.equal(generate(loaded), generate(model))
    assert torch.equal(generate(loaded, num_beams=2), generate(model, num_beams=2))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(IDS).logits, model(IDS).logits)


def test_dequantize_gives_a_stock_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    export(model, PLANS["a mixture"], tmp_path / "out")
    for loaded in (
        load(tmp_path / "out").dequantize(),
        load(tmp_path / "out", quantization_config=EvoPressConfig(dequantize=True)),
    ):
        assert not dropped_modules(loaded)
        assert loaded.state_dict().keys() == tiny_model("llama").state_dict().keys()
        loaded.save_pretrained(tmp_path / "dense")
        assert torch.allclose(load(tmp_path / "dense")(IDS).logits, model(IDS).logits, atol=1e-5)


def test_a_plan_that_only_drops_fails_safe_without_the_plugin(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    export(tiny_model("llama"), PLANS["an mlp"], tmp_path / "out")
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})"
    )
    off = {**os.environ, "HF_EVOPRESS_AUTOLOAD": "0"}  # as where the plugin is not installed
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=off)
    assert run.returncode != 0
    assert "size mismatch" in run.stderr.lower()


def test_a_dense_checkpoint_is_pruned_while_it_loads(tiny_model: TinyModel, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    config = EvoPressConfig(Plan(PLANS["a mixture"]))
    loaded = load(tmp_path / "dense", quantization_config=config)
    expected = tiny_model("llama")
    export(expected, PLANS["a mixture"], tmp_path / "out")
    assert [type(m) for m in dropped_modules(loaded).values()] == [DroppedAttention, DroppedMLP]
    assert torch.equal(loaded(IDS).logits, expected(IDS).logits)


def test_a_plan_for_another_model_names_what_it_cannot_drop(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    tiny_model("opt").save_pretrained(tmp_path / "dense")
    config = EvoPressConfig(Plan({ATTENTION: "drop"}))
    with pytest.raises(ValueError, match="drops model.layers.0.self_attn, which is no"):
        load(tmp_path / "dense", quantization_config=config)


def test_the_evaluator_scores_drops_as_the_shipped_model(
    tiny_model: TinyModel, text_tokens: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    units = find_units(model)
    source = Source({"model": "tiny"}, lambda block: {})
    menu = {unit.name: [compose.normalize(RTN)] for unit in units}
    store = LevelStore.build(tmp_path / "store", model, units, menu, source)
    evaluator = Evaluator(model, store, text_tokens(4, 16), KL())
    plans = [
        {u: Level.parse(v) for u, v in levels.items()} for levels in (*PLANS.values(), {UP: RTN})
    ]
    losses = [sum(each) for each in evaluator.losses(plans, [0, 1, 2])]
    assert len(set(losses)) == len(plans) and min(losses) > 0
    shipped = tiny_model("llama")
    replace_dropped(shipped, plans[2])
    ids = text_tokens(4, 16)[:1]
    assert torch.equal(evaluator.logits(plans[2], ids), shipped(ids).logits)
    assert torch.equal(evaluator.logits({}, ids), model(ids).logits)  # whole again
