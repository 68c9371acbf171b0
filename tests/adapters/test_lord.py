"""Low-rank terms and LoRA adapters turn into each other without losing a bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_evopress.adapters.folder import load_adapter, read_adapter, write_adapter
from hf_evopress.adapters.lord import from_peft, to_peft
from hf_evopress.loading.layers import compressed_linears
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan

LEVELS = {
    "q_proj": "lowrank:rank=8,metric=plain",
    "k_proj": "lowrank:rank=4,factors=bfloat16,metric=plain",
    "up_proj": "rtn:bits=4,group_size=32 + lowrank:rank=3,metric=plain",
    "down_proj": "rtn:bits=4,group_size=32",
}


def packed(model: Any, tokens: Tensor, levels: dict[str, str] = LEVELS) -> Any:
    units = find_units(model)
    named = {u.name: levels.get(u.name.rpartition(".")[2], "dense") for u in units}
    plan = Plan(named, shapes={u.name: u.shape for u in units})
    compress_model(model, plan, tokens)
    attach(model, plan)
    return model


@pytest.fixture
def model(tiny_model: Any, text_tokens: Any) -> Any:
    return packed(tiny_model(), text_tokens(2, 16))


@pytest.fixture
def ids(text_tokens: Any) -> Tensor:
    return text_tokens(2, 16, seed=4)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def levels(model: Any) -> set[str]:
    return {str(layer.level) for layer in compressed_linears(model).values()}


def test_there_and_back_changes_no_bit_and_no_level(
    model: Any, ids: Tensor, tmp_path: Path
) -> None:
    before, states = logits(model, ids), copy.deepcopy(model.state_dict())
    plan = dict(model.config.quantization_config.plan)
    base = to_peft(model, tmp_path)
    assert levels(base) == {"zero", "rtn:bits=4,group_size=32"}
    back = from_peft(base, read_adapter(tmp_path))
    assert torch.equal(logits(back, ids), before)
    assert dict(back.config.quantization_config.plan) == plan
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in states.items())


def test_base_and_adapter_give_the_logits_of_the_whole(
    model: Any, ids: Tensor, tmp_path: Path
) -> None:
    before = logits(model, ids)
    base = to_peft(model, tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with_adapter = load_adapter(loaded, tmp_path / "adapter", is_trainable=True)
    assert torch.allclose(logits(with_adapter, ids), before, atol=1e-5)
    with_adapter(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for n, p in with_adapter.named_parameters() if "q_proj.lora_B" in n]
    assert grads and all(g is not None and bool(g.any()) for g in grads)


def test_a_layer_whose_level_was_low_rank_stores_nothing_but_the_adapter(
    model: Any, tmp_path: Path
) -> None:
    base = to_peft(model, tmp_path)
    layer = base.get_submodule("model.layers.0.self_attn.q_proj")
    assert sum(t.numel() for t in layer.state.values()) == 0


def test_smaller_ranks_are_slices(
    model: Any, tiny_model: Any, text_tokens: Any, ids: Tensor, tmp_path: Path
) -> None:
    base = to_peft(model, tmp_path)
    small = from_peft(base, read_adapter(tmp_path).sliced(2))
    two = {
        k: v.replace("rank=8", "rank=2").replace("rank=4,", "rank=2,") for k, v in LEVELS.items()
    }
    two["up_proj"] = two["up_proj"].replace("rank=3", "rank=2")
    direct = packed(tiny_model(), text_tokens(2, 16), two)
    assert torch.equal(logits(small, ids), logits(direct, ids))


def test_an_adapter_becomes_part_of_the_checkpoint(
    tiny_model: Any, text_tokens: Any, ids: Tensor, tmp_path: Path
) -> None:
    model = packed(tiny_model(), text_tokens(2, 16), {"up_proj": "rtn:bits=3,group_size=32"})
    name = "model.layers.1.mlp.up_proj"
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(5, 64, generator=generator).bfloat16()
    B = (0.1 * torch.randn(128, 5, generator=generator)).bfloat16()
    write_adapter(tmp_path / "adapter", {name: (A, B)})
    beside = load_adapter(copy.deepcopy(model), tmp_path / "adapter")
    whole = from_peft(model, read_adapter(tmp_path / "adapter"))
    whole.save_pretrained(tmp_path / "whole")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(loaded, ids), logits(whole, ids))
    assert torch.allclose(logits(loaded, ids), logits(beside, ids), atol=1e-5)
    expected = "rtn:bits=3,group_size=32 + lowrank:rank=5,factors=bfloat16"
    assert str(loaded.get_submodule(name).level) == expected


def test_levels_that_are_no_lora_are_refused(
    tiny_model: Any, text_tokens: Any, tmp_path: Path
) -> None:
    for level in ("lowrank:rank=4,factors=int8,metric=plain", "lowrank:rank=4,centred=true"):
        if "centred" in level:
            model = packed(
                tiny_model("opt"), text_tokens(2, 16), {"q_proj": f"{level},metric=plain"}
            )
        else:
            model = packed(tiny_model(), text_tokens(2, 16), {"q_proj": level})
        with pytest.raises(ValueError, match="two 16-bit factors.*factors=float16"):
            to_peft(model, tmp_path)
    model = packed(tiny_model(), text_tokens(2, 16), {"q_proj": "rtn:bits=4,group_size=32"})
    with pytest.raises(ValueError, match="nothing to take"):
        to_peft(model, tmp_path)


def test_adapters_that_are_no_term_are_refused(model: Any, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    factors = {name: (torch.randn(2, 128), torch.randn(64, 2))}
    write_adapter(tmp_path / "a", factors)
    with pytest.raises(ValueError, match=r"float32 at scaling 1.*without --exact"):
        from_peft(model, read_adapter(tmp_path / "a"))
    dense = "model.layers.0.mlp.gate_proj"
    write_adapter(tmp_path / "b", {dense: (torch.ones(2, 64).half(), torch.ones(128, 2).half())})
    with pytest.raises(ValueError, match="gate_proj is dense"):
        from_peft(model, read_adapter(tmp_path / "b"))
