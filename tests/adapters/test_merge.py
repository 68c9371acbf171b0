"""Merging an adapter back into packed levels keeps plan and size, and most of the adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_evopress.adapters.eora import eora
from hf_evopress.adapters.folder import Adapter, load_adapter, read_adapter, write_adapter
from hf_evopress.adapters.merge import merge_adapter
from hf_evopress.calibration.input_moments import calibrate
from hf_evopress.loading.layers import compressed_linears
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan
from hf_evopress.scoring.fitness.kl import KL


def packed(model: Any, tokens: Tensor, level: str, **others: str) -> Any:
    model = copy.deepcopy(model)
    units = find_units(model)
    levels = {u.name: others.get(u.name.rpartition(".")[2], level) for u in units}
    plan = Plan(levels, shapes={u.name: u.shape for u in units}, results={"kl": 1.0})
    compress_model(model, plan, tokens)
    attach(model, plan)
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def kl(dense: Any, model: Any, ids: Tensor) -> float:
    fitness, total = KL(top_k=0), 0.0
    for row in ids:
        p, q = logits(dense, row[None])[0], logits(model, row[None])[0]
        total += fitness.loss(q, row, fitness.targets(p, row))
    return total / len(ids)


def random_adapter(model: Any, *, size: float = 0.1) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for unit in find_units(model):
        A = torch.randn(4, unit.shape[1], generator=generator)
        factors[unit.name] = (A, size * torch.randn(unit.shape[0], 4, generator=generator))
    return Adapter(factors)


@pytest.fixture
def tokens(text_tokens: Any) -> Tensor:
    return text_tokens(12, 48)


@pytest.mark.parametrize(
    "level",
    ["rtn:bits=8,group_size=32", "gptq:bits=8,group_size=32", "trellis:bits=7,state_bits=10"],
)
def test_at_many_bits_merging_keeps_the_adapted_model(
    trained_llama: Any, tokens: Tensor, level: str, tmp_path: Path
) -> None:
    model = packed(trained_llama, tokens, level)
    adapter = random_adapter(model, size=0.02)
    write_adapter(tmp_path / "adapter", adapter.factors)
    beside = load_adapter(copy.deepcopy(model), tmp_path / "adapter")
    lost = kl(beside, model, tokens[:2])
    merged = merge_adapter(model, adapter, tokens)
    assert kl(beside, merged, tokens[:2]) < 0.02 * lost
    assert {str(m.level) for m in compressed_linears(merged).values()} == {level}
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded, tokens[:1]), logits(merged, tokens[:1]))
    assert not loaded.hf_quantizer.quantization_config.plan.results


def test_layers_without_factors_keep_their_tensors(trained_llama: Any, tokens: Tensor) -> None:
    model = packed(trained_llama, tokens, "gptq:bits=3,group_size=32")
    name = "model.layers.1.mlp.up_proj"
    factors = {name: random_adapter(model).factors[name]}
    before = {n: m.codes.clone() for n, m in compressed_linears(model).items()}
    merge_adapter(model, Adapter(factors), tokens)
    changed = [
        n for n, m in compressed_linears(model).items() if not torch.equal(m.codes, before[n])
    ]
    assert changed == [name]


def test_merged_layers_compute_as_the_model_did(trained_llama: Any, tokens: Tensor) -> None:
    model = packed(trained_llama, tokens, "rtn:bits=8,group_size=32")
    model.hf_quantizer.quantization_config.runtime = "auto"
    merge_adapter(model, random_adapter(model), tokens)
    assert all(m.computes_by_kernel for m in compressed_linears(model).values())


def test_dense_layers_get_the_adapter_added(trained_llama: Any, tokens: Tensor) -> None:
    model = packed(trained_llama, tokens, "dense", q_proj="rtn:bits=8,group_size=32")
    adapter = random_adapter(model)
    name = "model.layers.0.mlp.up_proj"
    before = model.get_submodule(name).weight.clone()
    merge_adapter(model, adapter)
    assert torch.allclose(model.get_submodule(name).weight, before + adapter.delta(name))


def test_stored_statistics_serve_as_well_as_text(
    trained_llama: Any, tokens: Tensor, tmp_path: Path
) -> None:
    calibrate(trained_llama, tokens, tmp_path)
    model = packed(trained_llama, tokens, "gptq:bits=4,group_size=32")
    write_adapter(tmp_path / "adapter", random_adapter(model, size=0.02).factors)
    adapter = read_adapter(tmp_path / "adapter")
    beside = load_adapter(copy.deepcopy(model), tmp_path / "adapter")
    merged = merge_adapter(model, adapter, stats=tmp_path)
    assert kl(beside, merged, tokens[:2]) < 0.1


def test_merging_weighs_errors_by_what_outputs_feel(
    trained_llama: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = packed(trained_llama, tokens, "trellis:bits=3,state_bits=10")
    adapter = random_adapter(model, size=0.02)
    write_adapter(tmp_path / "adapter", adapter.factors)
    beside = load_adapter(copy.deepcopy(model), tmp_path / "adapter")
    merged = merge_adapter(copy.deepcopy(model), adapter, tokens)
    monkeypatch.setattr("hf_evopress.methods.compose.uses_outputs", lambda level: False)
    by_inputs = merge_adapter(model, adapter, tokens)
    assert kl(beside, merged, tokens[:4]) < 0.9 * kl(beside, by_inputs, tokens[:4])


def test_levels_with_and_without_calibration_are_merged_side_by_side(
    trained_llama: Any, tokens: Tensor
) -> None:
    model = packed(
        trained_llama, tokens, "gptq:bits=8,group_size=32",
        q_proj="rtn:bits=8,group_size=32,clip=false",
    )  # fmt: skip
    before = logits(model, tokens[:1])
    merged = merge_adapter(model, random_adapter(model, size=0.02), tokens)
    assert not torch.allclose(logits(merged, tokens[:1]), before, atol=1e-2)


def test_merging_eora_back_at_its_bits_is_measured_not_hidden(
    trained_llama: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model = packed(trained_llama, tokens, "rtn:bits=3,group_size=32,clip=false")
    eora(model, trained_llama, tokens, tmp_path, rank=8)
    beside = load_adapter(copy.deepcopy(model), tmp_path)
    merged = merge_adapter(copy.deepcopy(model), read_adapter(tmp_path), tokens)
    with_adapter, without = (kl(trained_llama, m, tokens[:4]) for m in (beside, model))
    assert with_adapter < without
    assert kl(trained_llama, merged, tokens[:4]) > with_adapter


def test_what_cannot_be_merged_says_why(
    trained_llama: Any, tokens: Tensor, tiny_model: Any
) -> None:
    model = packed(trained_llama, tokens, "gptq:bits=4,group_size=32")
    with pytest.raises(ValueError, match="needs calibration data to be made again.*--data"):
        merge_adapter(copy.deepcopy(model), random_adapter(model))
    with pytest.raises(ValueError, match="does not fit this model"):
        merge_adapter(model, random_adapter(tiny_model(num_hidden_layers=5)), tokens)
    zero = packed(trained_llama, tokens, "dense", down_proj="zero")
    with pytest.raises(ValueError, match="down_proj stores nothing.*merge --exact"):
        merge_adapter(zero, random_adapter(zero), tokens)


def test_a_dropped_block_is_nothing_to_merge_into(trained_llama: Any, tokens: Tensor) -> None:
    model = copy.deepcopy(trained_llama)
    adapter = random_adapter(model)
    units = find_units(model)
    kept = {u.name: "rtn:bits=4,group_size=32" for u in units if "layers.1.mlp" not in u.name}
    shapes = {u.name: u.shape for u in units if u.name in kept}
    plan = Plan({**kept, "model.layers.1.mlp": "drop"}, shapes=shapes)
    compress_model(model, plan, tokens)
    attach(model, plan)
    with pytest.raises(ValueError, match=r"the plan drops model\.layers\.1\.mlp"):
        merge_adapter(model, adapter, tokens)
