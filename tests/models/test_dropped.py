"""Dropped sub-blocks against the exact reference: the same model with zero output weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaModel, StaticCache

from hf_evopress.models.dropped import (
    DroppedAttention,
    DroppedMLP,
    dropped_forward,
    dropped_modules,
    dropped_units,
    replace_dropped,
    restore_zero,
    sentinel_keys,
)
from hf_evopress.models.stream import BlockStream
from hf_evopress.models.sub_blocks import find_sub_blocks
from hf_evopress.plans.level import DROP, Level
from tests.conftest import ARCHITECTURES

OUTPUTS = ("o_proj", "out_proj", "dense", "down_proj", "dense_4h_to_h")
IDS = torch.arange(3, 19).view(2, 8)

# transformers 5.24 renamed it; older ones know the other name only
CACHE = "cache" if "cache" in signature(LlamaModel.forward).parameters else "past_key_values"

every_arch = pytest.mark.parametrize("arch", ARCHITECTURES)
TinyModel = Callable[..., Any]


def pair(tiny_model: TinyModel, arch: str, dropped: list[int]) -> tuple[Any, Any]:
    """Return the model with the given sub-blocks dropped, and with them made zero instead."""
    model, reference = tiny_model(arch), tiny_model(arch)
    names = [find_sub_blocks(model)[i].name for i in dropped]
    replace_dropped(model, dict.fromkeys(names, DROP))
    for name in names:
        for path, module in reference.get_submodule(name).named_modules():
            if path in OUTPUTS:
                module.weight.data.zero_()
                if module.bias is not None:
                    module.bias.data.zero_()
    return model, reference


def generate(model: Any, **how: Any) -> Tensor:
    torch.manual_seed(0)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0  # one prompt is shorter
    return model.generate(IDS, attention_mask=mask, max_new_tokens=8, pad_token_id=0, **how)


@every_arch
def test_logits_are_those_of_zero_weights(arch: str, tiny_model: TinyModel) -> None:
    for dropped in ([0], [1], [0, 1]):
        model, reference = pair(tiny_model, arch, dropped)
        assert torch.equal(model(IDS).logits, reference(IDS).logits)
        assert not torch.equal(model(IDS).logits, tiny_model(arch)(IDS).logits)


@every_arch
def test_greedy_generation_from_the_cache(arch: str, tiny_model: TinyModel) -> None:
    for dropped in ([0], [0, 1]):
        model, reference = pair(tiny_model, arch, dropped)
        assert torch.equal(generate(model), generate(reference))
        assert torch.equal(generate(model), generate(model, use_cache=False))


HOW: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "static cache and beams": {
        "cache_implementation": "static",
        "num_beams": 2,
        "disable_compile": True,
    },
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("how", list(HOW))
def test_every_way_to_generate(how: str, tiny_model: TinyModel) -> None:
    for arch in ("llama", "gemma3_text"):
        model, reference = pair(tiny_model, arch, [0, 3])
        assert torch.equal(generate(model, **HOW[how]), generate(reference, **HOW[how]))


def test_prompt_lookup_generation(tiny_model: TinyModel) -> None:
    model, reference = pair(tiny_model, "llama", [0, 1])
    how = {"max_new_tokens": 8, "prompt_lookup_num_tokens": 3, "pad_token_id": 0}
    ids = IDS[:1].repeat(1, 3)
    assert torch.equal(model.generate(ids, **how), reference.generate(ids, **how))


def test_a_cache_allocated_in_full_before_the_first_call(tiny_model: TinyModel) -> None:
    model, reference = pair(tiny_model, "llama", [0])
    logits = []
    for each in (model, reference):
        cache = StaticCache(config=each.config, max_cache_len=16)
        cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
        each(IDS[:, :5], **{CACHE: cache})
        logits.append(each(IDS[:, 5:], **{CACHE: cache}).logits)
    assert torch.allclose(*logits, atol=1e-6)


def test_the_cache_of_a_dropped_attention_holds_one_number_per_token(
    tiny_model: TinyModel,
) -> None:
    model, _ = pair(tiny_model, "llama", [0])
    cache = DynamicCache(config=model.config)
    model(IDS, **{CACHE: cache})
    assert cache.get_seq_length() == 8
    assert cache.layers[0].keys.numel() == IDS.numel()


def test_gradients_flow_past_with_and_without_checkpointing(tiny_model: TinyModel) -> None:
    grads = []
    for checkpointing in (False, True):
        model, _ = pair(tiny_model, "llama", [0, 3])
        if checkpointing:
            enable = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            getattr(model, enable[not hasattr(model, enable[0])])()
        model.train()(IDS, labels=IDS).loss.backward()
        grads.append(model.model.embed_tokens.weight.grad)
        assert model.model.layers[0].mlp.up_proj.weight.grad.any()
    assert torch.allclose(*grads, atol=1e-7)


def test_stand_ins_hold_no_tensor_and_keep_what_parents_read(tiny_model: TinyModel) -> None:
    model, _ = pair(tiny_model, "llama", [2, 3])
    stubs = dropped_modules(model)
    assert [type(stub) for stub in stubs.values()] == [DroppedAttention, DroppedMLP]
    assert not [key for name in stubs for key in model.state_dict() if key.startswith(name)]
    assert model.model.layers[1].self_attn.layer_idx == 1
    assert model.model.layers[1].self_attn.config is model.config
    copy.deepcopy(model)


def test_output_attentions_leave_the_dropped_one_out(tiny_model: TinyModel) -> None:
    model, _ = pair(tiny_model, "llama", [0])
    model.set_attn_implementation("eager")
    assert len(model(IDS, output_attentions=True).attentions) == 1


@every_arch
def test_a_patched_forward_equals_the_stand_in(arch: str, tiny_model: TinyModel) -> None:
    model, reference = tiny_model(arch), pair(tiny_model, arch, [0, 1])[1]
    for sub in find_sub_blocks(model)[:2]:
        model.get_submodule(sub.name).forward = dropped_forward(model, sub)
    stream = BlockStream(model)
    hidden = stream.embed(IDS)
    assert torch.equal(stream.run_from(0, IDS, hidden), reference(IDS).logits)


@every_arch
def test_restored_modules_are_real_and_zero(arch: str, tiny_model: TinyModel) -> None:
    model, reference = pair(tiny_model, arch, [0, 1])
    paths = restore_zero(model.bfloat16())
    assert len(paths) == 2 and not dropped_modules(model)
    assert model.state_dict().keys() == reference.state_dict().keys()
    assert torch.equal(model(IDS).logits, reference.bfloat16()(IDS).logits)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_sentinel_is_a_weight_the_dense_model_has(tiny_model: TinyModel) -> None:
    model, reference = pair(tiny_model, "llama", [0, 1])
    assert len(sentinel_keys(model)) == 2
    assert set(sentinel_keys(model)) <= reference.state_dict().keys() - model.state_dict().keys()


def test_names_with_and_without_the_base_prefix_are_found(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    assert replace_dropped(model.model, {"model.layers.0.mlp": DROP}) == ["layers.0.mlp"]
    assert replace_dropped(model, {"layers.1.mlp": DROP}) == ["model.layers.1.mlp"]
    assert replace_dropped(model, {"layers.1.mlp": DROP}) == ["model.layers.1.mlp"]  # once more


def test_a_name_that_is_no_sub_block_is_an_error(tiny_model: TinyModel) -> None:
    with pytest.raises(ValueError, match=r"no attention or MLP .* did you mean .*0\.self_attn"):
        replace_dropped(tiny_model("llama"), {"model.layers.0.self_atn": DROP})
    with pytest.raises(ValueError, match="no attention or MLP sub-block"):
        replace_dropped(tiny_model("opt"), {"model.decoder.layers.0.fc1": DROP})


def test_a_level_inside_a_dropped_sub_block_is_an_error() -> None:
    levels = {"a.mlp": DROP, "a.mlp.up_proj": Level.parse("rtn:bits=4,group_size=64")}
    with pytest.raises(ValueError, match=r"drops a\.mlp and gives a level to a\.mlp\.up_proj"):
        dropped_units(levels)


def test_a_model_that_passes_the_residual_through_its_sub_blocks(tiny_model: TinyModel) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0)
    model = BloomForCausalLM(config).eval()
    reference = copy.deepcopy(model)
    names = [sub.name for sub in find_sub_blocks(model)][:2]
    replace_dropped(model, dict.fromkeys(names, DROP))
    for path in ("self_attention.dense", "mlp.dense_4h_to_h"):
        module = reference.transformer.h[0].get_submodule(path)
        module.weight.data.zero_()
        module.bias.data.zero_()
    assert torch.equal(model(IDS).logits, reference(IDS).logits)
    assert torch.equal(generate(model), generate(reference))
