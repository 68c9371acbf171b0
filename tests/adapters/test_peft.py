"""LoRA over compressed layers through PEFT's public functions: the same numbers as dense."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_evopress.adapters.peft_layers import lora_layer_class, register_with_peft
from hf_evopress.loading.layers import CompressedLinear, compressed_linears
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan

LEVELS = {
    "q_proj": "rtn:bits=4,group_size=32",
    "k_proj": "rtn:bits=3,group_size=32 + lowrank:rank=4,metric=plain",
    "v_proj": "rtn:bits=8,group_size=-1",
    "o_proj": "lowrank:rank=16,metric=plain",
    "up_proj": "rtn:bits=5,group_size=32",
    "down_proj": "zero",
}


@pytest.fixture(scope="module")
def packed(tiny_model: Any, text_tokens: Any) -> Any:
    """A tiny model with a level of every kind, made through the plan of a user."""
    model = tiny_model("llama")
    levels = {u.name: LEVELS.get(u.name.rpartition(".")[2], "dense") for u in find_units(model)}
    plan = Plan(levels, shapes={u.name: u.shape for u in find_units(model)})
    compress_model(model, plan, text_tokens(2, 32))
    attach(model, plan)
    return model


@pytest.fixture
def model(packed: Any) -> Any:
    return copy.deepcopy(packed)


@pytest.fixture
def ids(text_tokens: Any) -> torch.Tensor:
    return text_tokens(2, 24, seed=5)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def adapted(model: Any, *, seed: int = 3, **options: Any) -> Any:
    """Return `model` with a LoRA adapter whose B is not zero."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    made = get_peft_model(model, LoraConfig(**settings))
    fill(made, seed)
    return made.eval()


def fill(model: Any, seed: int, name: str = "default") -> None:
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in sorted(model.named_parameters()):
        if f".{name}." in f"{key}." and ("lora_A" in key or "lora_B" in key):
            tensor.data = 0.05 * torch.randn(tensor.shape, generator=generator)


def dense_copy(model: Any) -> Any:
    return copy.deepcopy(model).dequantize()


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ["q_proj", "down_proj"]}],
    ids=["lora", "rslora", "dora", "some"],
)
def test_an_adapter_gives_what_stock_peft_gives_on_the_dequantized_model(
    model: Any, ids: torch.Tensor, options: dict[str, Any]
) -> None:
    dense = dense_copy(model)
    over_packed = adapted(model, **options)
    kept = over_packed.peft_config["default"].exclude_modules
    over_dense = adapted(dense, **options, exclude_modules=kept)
    assert any(isinstance(m, lora_layer_class()) for m in over_packed.modules())
    assert not any(isinstance(m, lora_layer_class()) for m in over_dense.modules())
    assert torch.allclose(logits(over_packed, ids), logits(over_dense, ids), atol=2e-5)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_merging_keeps_the_logits_and_unmerging_is_exact_to_the_bit(
    model: Any, ids: torch.Tensor, dora: bool, safe: bool
) -> None:
    # stock PEFT unmerges dense layers, such as gate_proj here, up to rounding only
    made = adapted(model, use_dora=dora, target_modules=list(LEVELS))
    before = logits(made, ids)
    packed = {n: m for n, m in made.named_modules() if isinstance(m, CompressedLinear)}
    made.merge_adapter(safe_merge=safe)
    assert torch.allclose(logits(made, ids), before, atol=1e-4)
    made.unmerge_adapter()
    after = {n: m for n, m in made.named_modules() if isinstance(m, CompressedLinear)}
    assert all(after[n] is layer for n, layer in packed.items())
    assert torch.equal(logits(made, ids), before)


def test_merge_and_unload_gives_dense_layers_with_the_adapter_in_them(
    model: Any, ids: torch.Tensor
) -> None:
    plain = logits(model, ids)
    made = adapted(model)
    before = logits(made, ids)
    merged = made.merge_and_unload()
    assert not compressed_linears(merged)
    assert torch.allclose(logits(merged, ids), before, atol=1e-4)
    assert not torch.allclose(before, plain, atol=1e-2)


def test_a_merged_model_saves_and_reloads_with_merged_layers_dense(
    model: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    made = adapted(model, target_modules=["q_proj"]).merge_and_unload()
    before = logits(made, ids)
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), before)
    levels = loaded.hf_quantizer.quantization_config.plan
    assert str(levels["model.layers.0.self_attn.q_proj"]) == "dense"
    assert str(levels["model.layers.0.mlp.up_proj"]) == LEVELS["up_proj"]


def test_a_head_stays_tied_to_a_packed_embedding_when_an_adapter_is_merged(
    tiny_model: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    plan = Plan({"model.embed_tokens": "rtn:bits=4,group_size=32"})
    compress_model(model, plan, None)
    attach(model, plan)
    merged = adapted(model, target_modules=["q_proj"]).merge_and_unload()
    assert merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(merged, ids))


def test_a_wrapped_model_is_not_saved_as_a_base_model(model: Any, tmp_path: Path) -> None:
    made = adapted(model)
    with pytest.raises(ValueError, match="wrapped by adapters.*merge_and_unload"):
        made.base_model.model.save_pretrained(tmp_path)


def test_unload_gives_the_packed_model_back(model: Any, ids: torch.Tensor) -> None:
    before = logits(model, ids)
    back = adapted(model).unload()
    assert torch.equal(logits(back, ids), before)
    assert compressed_linears(back)


def test_dora_leaves_out_layers_that_store_nothing(
    model: Any, ids: torch.Tensor, caplog: Any
) -> None:
    with caplog.at_level("WARNING"):
        made = adapted(model, use_dora=True)
    assert "leaves out 2 layers" in caplog.text
    assert not any("down_proj.lora_A" in n for n, _ in made.named_parameters())
    assert bool(logits(made, ids).isfinite().all())


def test_a_start_that_changes_the_base_weight_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"'pissa' changes the base weight.*hf-evopress adapt"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "mica"])
def test_other_starts_leave_the_logits_as_they_were(
    model: Any, ids: torch.Tensor, start: str
) -> None:
    before = logits(model, ids)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=start)
    made = get_peft_model(model, config)
    if start != "orthogonal":  # its A B is zero only for an even split of rows
        assert torch.allclose(logits(made, ids), before, atol=1e-6)
    assert any(isinstance(m, lora_layer_class()) for m in made.modules())


def test_a_failed_merge_leaves_the_layer_packed(model: Any) -> None:
    made = adapted(model, target_modules=["q_proj"])
    for name, tensor in made.named_parameters():
        if "lora_B" in name:
            tensor.data[0, 0] = float("nan")
    n = len(compressed_linears(made))
    with pytest.raises(ValueError, match="NaN"):
        made.merge_adapter(safe_merge=True)
    assert len(compressed_linears(made)) == n


def test_two_adapters_work_alone_together_and_combined(model: Any, ids: torch.Tensor) -> None:
    made = adapted(model, target_modules=["q_proj", "up_proj"], seed=1)
    made.add_adapter("task", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    fill(made, 2, "task")
    made.base_model.set_adapter(["default", "task"])
    together = logits(made, ids)
    made.add_weighted_adapter(["default", "task"], [1.0, 1.0], "both", combination_type="cat")
    made.set_adapter("both")
    assert torch.allclose(logits(made, ids), together, atol=2e-5)
    made.base_model.set_adapter(["default", "task"])
    made.merge_adapter()
    assert torch.allclose(logits(made, ids), together, atol=1e-4)
    made.unmerge_adapter()
    assert torch.equal(logits(made, ids), together)


def test_two_dora_adapters_merge_on_top_of_each_other(model: Any, ids: torch.Tensor) -> None:
    dense = dense_copy(model)
    results = []
    for each in (model, dense):
        options = {"target_modules": ["q_proj", "up_proj"], "use_dora": True}
        made = adapted(each, seed=1, **options)
        made.add_adapter("two", LoraConfig(r=2, **options))
        fill(made, 2, "two")
        made.base_model.set_adapter(["default", "two"])
        made.merge_adapter()
        results.append(logits(made, ids))
    assert torch.allclose(*results, atol=2e-5)


def test_an_adapter_is_hot_swapped(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    from peft.utils.hotswap import hotswap_adapter

    for seed in (1, 2):
        adapted(copy.deepcopy(model), seed=seed).save_pretrained(tmp_path / str(seed))
    one = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "1").eval()
    two = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "2").eval()
    hotswap_adapter(one, str(tmp_path / "2"), adapter_name="default")
    assert torch.equal(logits(one, ids), logits(two, ids))


def test_wrapping_computes_no_dense_weight(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    stock = CompressedLinear.weight

    def counted(self: Any) -> torch.Tensor:
        looks.append(1)
        return stock.fget(self)  # type: ignore[attr-defined]

    monkeypatch.setattr(CompressedLinear, "weight", property(counted))
    get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert not looks


def test_registering_again_changes_nothing() -> None:
    from peft.tuners.lora.model import LoraModel

    before = LoraModel._create_new_module
    register_with_peft()
    assert LoraModel._create_new_module is before


FRESH = """
import sys, torch, hf_evopress
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:4]
ids = torch.arange(24).view(2, 12)
def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits
direct = AutoModelForCausalLM.from_pretrained(adapter)
loaded = AutoModelForCausalLM.from_pretrained(base)
loaded.load_adapter(adapter)
from peft import AutoPeftModelForCausalLM, PeftModel
wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
auto = AutoPeftModelForCausalLM.from_pretrained(adapter)
results = [logits(m) for m in (direct, loaded, wrapped, auto)]
results.append(logits(wrapped.merge_and_unload()))
from safetensors.torch import save_file
save_file({str(i): r for i, r in enumerate(results)}, out)
"""


@pytest.mark.slow
def test_adapters_load_in_a_fresh_process_by_every_way(model: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base, adapter, out = (str(tmp_path / n) for n in ("base", "adapter", "out.safetensors"))
    model.save_pretrained(base)
    model.config._name_or_path = model.name_or_path = base
    made = adapted(model)
    made.save_pretrained(adapter)
    made.peft_config["default"].base_model_name_or_path = base
    made.save_pretrained(adapter)
    expected = logits(made, torch.arange(24).view(2, 12))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", FRESH, base, adapter, out],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = load_file(out)
    assert all(torch.equal(found[str(i)], expected) for i in range(4))
    assert torch.allclose(found["4"], expected, atol=1e-4)


def configs() -> dict[str, Any]:
    """Return one config of each kind of adapter, over layers of all kinds."""
    import peft

    on = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    return {
        "ia3": peft.IA3Config(**on, feedforward_modules=["down_proj"], init_ia3_weights=False),
        "loha": peft.LoHaConfig(**on, init_weights=False),
        "lokr": peft.LoKrConfig(**on, init_weights=False),
        "vera": peft.VeraConfig(target_modules=["q_proj"], init_weights=False),
        "oft": peft.OFTConfig(**on, oft_block_size=8, init_weights=False),
        "hra": peft.HRAConfig(**on),
        "fourierft": peft.FourierFTConfig(**on, n_frequency=10, init_weights=False),
        "adalora": peft.AdaLoraConfig(**on, total_step=10),
        "randlora": peft.RandLoraConfig(**on, init_weights=False),
        "shira": peft.ShiraConfig(**on, r=4, init_weights=False),
    }


@pytest.mark.parametrize("kind", list(configs()))
def test_every_kind_of_adapter_gives_what_it_gives_over_dense_layers(
    kind: str, model: Any, ids: torch.Tensor
) -> None:
    logits = []
    for base in (copy.deepcopy(model), copy.deepcopy(model).dequantize()):
        torch.manual_seed(0)
        made = get_peft_model(base, configs()[kind]).eval()
        with torch.no_grad():
            logits.append(made(ids).logits)
    assert torch.allclose(*logits, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(logits[0], model(ids).logits, atol=1e-3) or kind in QUIET
    if kind not in QUIET:
        packed = get_peft_model(copy.deepcopy(model), configs()[kind])
        with pytest.raises(RuntimeError, match="dequantize"):
            packed.merge_and_unload()


QUIET = ("hra", "adalora")  # they start as nothing


@pytest.mark.parametrize("first", ["all-linear", ["q_proj", "up_proj"]])
def test_a_second_adapter_finds_all_linear_layers(model: Any, first: Any) -> None:
    made = get_peft_model(model, LoraConfig(target_modules=first, task_type="CAUSAL_LM"))
    made.add_adapter("two", LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    targets = {
        name.removesuffix(".lora_A.two").removeprefix("base_model.model.")
        for name, module in made.named_modules()
        if name.endswith(".lora_A.two")
    }
    assert targets == {unit.name for unit in find_units(made.unload())}
