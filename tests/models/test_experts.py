"""Mixtures of experts: split into linear layers, compressed, reloaded, and fused again."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_evopress.calibration.input_moments import calibrate, load_stats
from hf_evopress.calibration.output_moments import load_moments, output_moments
from hf_evopress.export.dense import DenseExport
from hf_evopress.export.evopress import EvoPressExport
from hf_evopress.loading.config import EvoPressConfig
from hf_evopress.loading.layers import compressed_linears
from hf_evopress.methods import compose
from hf_evopress.models.experts import (
    SplitExperts,
    fuse_experts,
    match_experts,
    others,
    split_experts,
    warn_of_experts,
)
from hf_evopress.models.units import find_units
from hf_evopress.plans.level import Level
from hf_evopress.plans.plan import Plan
from hf_evopress.refine.block_tuning import Tuning
from hf_evopress.refine.blockwise import Settings, refine
from hf_evopress.refine.states import read_notes
from hf_evopress.store.level_store import LevelStore, Source

from ..versions import is_older

ARCHITECTURES = ("mixtral", "qwen3_moe", "gpt_oss")  # the last: biases, transposed, gates woven in
TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tiny_model: Callable[..., nn.Module]) -> Any:
    model = tiny_model(request.param)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def plan_for(model: Any, level: str = "rtn:bits=4,group_size=32") -> Plan:
    units = find_units(model)
    levels = {u.name: level if "experts" in u.name else "dense" for u in units}
    levels[units[-1].name] = "dense"  # an expert among compressed ones
    return Plan(levels, {u.name: u.shape for u in units})


def states_of(model: Any) -> Callable[[str, Level], compose.State]:
    weights = {u.name: model.get_submodule(u.name).weight.detach() for u in find_units(model)}
    return lambda unit, level: compose.compress(level, weights[unit].float(), None)


def test_split_experts_are_units_and_answer_as_the_fused_ones(model: Any) -> None:
    model.set_experts_implementation("eager")
    before, n_fused = logits(model), len(find_units(model))
    paths = split_experts(model)
    assert len(paths) == 2 and all(path.endswith(".mlp.experts") for path in paths)
    assert torch.allclose(logits(model), before, atol=1e-6)
    names = [u.name for u in find_units(model)]
    assert len(names) == n_fused + 2 * 4 * 2
    assert {"model.layers.1.mlp.experts.3.down_proj", f"{paths[0]}.0.gate_up_proj"} <= {*names}
    assert split_experts(model) == []


SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "vocab_size": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
GROUPS = {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
KIN = {
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2},  # transposed
    "deepseek_v3": {**LATENT, **GROUPS, "q_lora_rank": 16},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
    "glm4_moe": GROUPS,
    "granitemoe": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
}


@pytest.mark.parametrize("arch", KIN)
def test_so_do_those_of_their_kin(arch: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(arch, **{**SMALL, **KIN[arch]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    model.set_experts_implementation("eager")
    before = logits(model)
    if arch == "aria_text" and is_older("transformers", "5.21"):
        pytest.skip("Aria's experts are no common class before transformers 5.21")
    assert split_experts(model)
    assert torch.allclose(logits(model), before, atol=1e-5)
    fuse_experts(model)
    assert torch.equal(logits(model), before)


def test_fusing_undoes_it(model: Any) -> None:
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    split_experts(model)
    fuse_experts(model)
    new = model.state_dict()
    assert list(new) == list(old) and all(torch.equal(new[name], old[name]) for name in old)


def test_a_copy_of_a_split_model_is_its_own(model: Any) -> None:
    split_experts(model)
    twin, before = copy.deepcopy(model), logits(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(model), before)


def test_gradients_reach_the_tokens_and_the_weights(model: Any) -> None:
    split_experts(model)
    model.requires_grad_(True)
    model(TOKENS, labels=TOKENS).loss.backward()
    seen = [p.grad for n, p in model.named_parameters() if "experts" in n and p.grad is not None]
    assert seen and all(bool(g.isfinite().all()) for g in seen)


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    """A checkpoint of the model with compressed experts."""
    split_experts(model)
    plan = plan_for(model)
    EvoPressExport().save(copy.deepcopy(model), plan, states_of(model), tmp_path / "packed")
    return tmp_path / "packed"


def test_compressed_experts_are_reloaded_and_generate(model: Any, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert len(compressed_linears(loaded)) == 2 * 4 * 2 - 1
    for name, layer in compressed_linears(loaded).items():
        model.get_submodule(name).weight.data = layer.weight.clone()
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    assert loaded.generate(TOKENS[:1], max_new_tokens=3, do_sample=False).shape == (1, 15)


def test_a_reloaded_model_is_saved_again_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    one, two = (f / "model.safetensors" for f in (folder, tmp_path / "again"))
    assert one.read_bytes() == two.read_bytes()


def test_dequantized_experts_are_a_stock_checkpoint(folder: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = logits(loaded)
    loaded.dequantize()
    assert not any(isinstance(m, SplitExperts) for m in loaded.modules())
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    loaded.save_pretrained(tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32)
    assert torch.allclose(logits(stock.eval()), expected, atol=1e-5)
    config = EvoPressConfig(dequantize=True)
    dense = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )
    assert torch.allclose(logits(dense.eval()), expected, atol=1e-5)


def test_a_model_of_packed_experts_is_exported(model: Any, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, expected = torch.arange(12)[None], logits(loaded)
    made = torch.export.export(loaded, (ids,), {"use_cache": False}, strict=False)
    with torch.no_grad():
        found = made.module()(ids, use_cache=False).logits
        wanted = loaded(ids, use_cache=False).logits
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(logits(loaded), expected, atol=1e-6)


def test_the_dense_export_is_a_stock_checkpoint(model: Any, folder: Path, tmp_path: Path) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    states = states_of(model)
    DenseExport().save(model, plan_for(model), states, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert torch.allclose(logits(dense.eval()), expected, atol=1e-5)


def test_a_dense_checkpoint_is_compressed_while_it_is_loaded(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    fuse_experts(model)
    model.save_pretrained(tmp_path / "dense")
    config = EvoPressConfig(plan=Plan.load(folder))
    made = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, quantization_config=config
    )
    assert torch.allclose(logits(made.eval()), expected, atol=1e-5)
    made.save_pretrained(tmp_path / "packed-again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed-again", dtype=torch.float32)
    assert torch.allclose(logits(again.eval()), expected, atol=1e-5)


def test_a_plan_without_experts_leaves_them_fused(model: Any, tmp_path: Path) -> None:
    split_experts(model)
    states, units = states_of(model), [u for u in find_units(model) if "experts" not in u.name]
    plan = Plan(dict.fromkeys((u.name for u in units), "rtn:bits=4,group_size=32"))
    EvoPressExport().save(model, plan, states, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert not any(isinstance(m, SplitExperts) for m in loaded.modules())
    split = copy.deepcopy(loaded)
    match_experts(split, Plan({"model.layers.0.mlp.experts.1.down_proj": "dense"}))
    assert sum(isinstance(m, SplitExperts) for m in split.modules()) == 2


def test_an_expert_that_no_token_went_to_takes_the_statistics_of_the_others(
    tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = tiny_model("qwen3_moe", num_experts=16)
    split_experts(model)
    units = find_units(model)
    calibrate(model, TOKENS[:1, :3], tmp_path)
    stats = load_stats(tmp_path, 0)
    mine = [n for n in stats if n.endswith("gate_up_proj")]
    lent = max(mine, key=lambda n: stats[n].n_tokens)
    assert len(mine) == 16 and stats[lent].n_tokens == 6  # three tokens, two experts each
    output_moments(model, TOKENS[:1, :3], tmp_path)
    G = load_moments(tmp_path, 0)
    assert {u.name for u in units if u.block == 0} == set(G)
    trace = {n: float(G[n].trace()) for n in mine}
    assert 0 < trace[lent] < max(trace.values())


def test_moments_of_an_expert_count_the_tokens_that_pass_it_by_as_zeros(
    tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = tiny_model("qwen3_moe")
    split_experts(model)
    calibrate(model, TOKENS, tmp_path)
    output_moments(model, TOKENS, tmp_path)
    G, stats = load_moments(tmp_path, 1), load_stats(tmp_path, 1)
    rows = {n: stats[n].n_tokens for n in G if n.endswith("down_proj")}
    assert sum(rows.values()) == 2 * TOKENS.numel()
    few, many = min(rows, key=rows.__getitem__), max(rows, key=rows.__getitem__)
    assert rows[few] < rows[many] and G[few].trace() < G[many].trace()


@pytest.mark.parametrize("mode", ["fast", "best"])
def test_experts_are_refined_also_where_tokens_pass_some_by(
    mode: str, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = tiny_model("qwen3_moe", num_experts=12).requires_grad_(False)
    split_experts(model)
    units, level = find_units(model), compose.normalize("rtn:bits=2,group_size=32")
    menus = {unit.name: [level] for unit in units}
    store = LevelStore.build(tmp_path / "store", model, units, menus, Source({}, lambda _: {}))
    settings = Settings(mode, tuning=Tuning(steps=4, batch=2, code_rate=0.005, zero_rate=0.03))
    plan = {unit.name: level for unit in units}
    made = refine(model, store, plan, TOKENS, TOKENS[:, :4], tmp_path / "r", settings=settings)
    notes = [read_notes(made.file(block)) for block in range(2)]
    assert all(min(n.values()) < n["before"] for n in notes)
    assert all(made.state(u, level).keys() == store.state(u, level).keys() for u in plan)


def test_others_are_the_same_layer_of_the_same_block() -> None:
    names = [f"l.{b}.experts.{e}.{n}" for b in (0, 1) for e in (0, 1, 2) for n in ("up", "down")]
    assert others("l.1.experts.0.up", names) == ["l.1.experts.1.up", "l.1.experts.2.up"]
    assert others("l.1.self_attn.q_proj", names) == []
    of_switch = [f"block.{b}.mlp.experts.expert_{e}.wi" for b in (0, 1) for e in (0, 1)]
    assert others(of_switch[0], of_switch) == [of_switch[1]]


def test_experts_of_another_form_are_named(
    tiny_model: Callable[..., nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("qwen3_moe")
    split_experts(model)
    with caplog.at_level(logging.WARNING):
        warn_of_experts(model)
        assert not caplog.text
        model.model.layers[0].mlp.extra = nn.Parameter(torch.zeros(4, 8, 8))
        warn_of_experts(model)
    assert "model.layers.0.mlp.extra" in caplog.text and "stay dense" in caplog.text
