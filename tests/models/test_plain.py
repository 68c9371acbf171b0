"""The plain form of models whose matrices are not all nn.Linear, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_evopress import EvoPressConfig
from hf_evopress.loading.layers import CompressedLinear, compressed_linears
from hf_evopress.models.plain import make_plain, make_stock, match_plan, stock_linears
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan

IDS = torch.arange(3, 35).view(2, 16)
TinyModel = Callable[..., Any]
every_form = pytest.mark.parametrize("arch", ["gpt2", "falcon", "mixtral"])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def plain_plan(model: Any, level: str = "rtn:bits=4,group_size=32") -> Plan:
    make_plain(model)
    units = find_units(model)
    return Plan({u.name: level for u in units}, shapes={u.name: u.shape for u in units})


@every_form
def test_there_and_back_again_is_the_same_model(arch: str, tiny_model: TinyModel) -> None:
    model, before = tiny_model(arch), tiny_model(arch)
    make_plain(model)
    assert not stock_linears(model) and find_units(model)
    assert torch.allclose(logits(model), logits(before), atol=1e-6)
    assert make_stock(model) and not make_stock(model)
    kinds = [{n: type(m) for n, m in x.named_modules()} for x in (model, before)]
    assert kinds[0] == kinds[1]
    ours, theirs = model.state_dict(), before.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].is_contiguous() for k in ours)


def test_a_plan_says_which_form_is_needed(tiny_model: TinyModel) -> None:
    model = tiny_model("gpt2")
    match_plan(model, Plan({"transformer.h.0.mlp": "drop"}))
    assert stock_linears(model)
    for name in ("transformer.h.0.mlp.c_fc", "h.0.mlp.c_fc"):  # with the base's prefix, without
        match_plan(model, Plan({name: "rtn:bits=4,group_size=32"}))
        assert not stock_linears(model)
        match_plan(model, Plan({"transformer.h.0.mlp": "drop"}))
        assert stock_linears(model)


@pytest.mark.parametrize("arch", ["gpt2", "falcon"])
def test_packed_saved_reloaded_and_dequantized(
    arch: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    tiny_model(arch).save_pretrained(tmp_path / "dense")
    plan = plain_plan(tiny_model(arch))
    settings: dict[str, Any] = {"quantization_config": EvoPressConfig(plan), "dtype": torch.float32}
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **settings)
    assert compressed_linears(packed).keys() == plan.levels.keys()
    assert not torch.equal(logits(packed), logits(tiny_model(arch)))
    packed.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    assert torch.equal(logits(again), logits(packed))
    stock = again.dequantize()
    assert not any(isinstance(m, CompressedLinear) for m in stock.modules())
    stock.save_pretrained(tmp_path / "stock")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "stock", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert torch.allclose(logits(loaded), logits(packed), atol=1e-5)


def test_layers_without_a_level_and_dropped_blocks_survive_the_way_back(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    from hf_evopress.loading.quantizer import attach
    from hf_evopress.loading.stitch import compress_model

    model = tiny_model("gpt2")
    levels = {"transformer.h.0.mlp.c_fc": "rtn:bits=4,group_size=32", "transformer.h.1.mlp": "drop"}
    plan = Plan(levels)
    compress_model(model, plan, None)
    attach(model, plan)
    model.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    expected = logits(model)
    assert torch.equal(logits(again), expected)
    stock: nn.Module = again.dequantize()
    kinds = [{n: type(m) for n, m in x.named_modules()} for x in (stock, tiny_model("gpt2"))]
    assert kinds[0] == kinds[1]
    assert torch.allclose(logits(stock), expected, atol=1e-5)
