"""Units are the linear weights inside decoder blocks, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    MambaConfig,
    MambaForCausalLM,
)

from hf_evopress.models.stream import check_streamable
from hf_evopress.models.units import Unit, find_blocks, find_units, linear_layers, unmatched

PER_BLOCK = {
    "llama": 7,
    "mistral": 7,
    "qwen3": 7,
    "gemma3_text": 7,
    "phi3": 4,
    "gpt_neox": 4,
    "opt": 6,
}


@pytest.mark.parametrize("arch", PER_BLOCK)
def test_every_block_has_its_linears(arch, tiny_model):
    model = tiny_model(arch)
    _, blocks = find_blocks(model)
    units = find_units(model)
    assert len(units) == PER_BLOCK[arch] * len(blocks)
    for unit in units:
        assert tuple(model.get_submodule(unit.name).weight.shape) == unit.shape


def test_units_come_in_module_order_with_their_block(tiny_model):
    units = find_units(tiny_model("llama"))
    assert units[0] == Unit("model.layers.0.self_attn.q_proj", (64, 64), 0)
    assert [u.block for u in units] == sorted(u.block for u in units)


def test_embeddings_and_head_are_no_units(tiny_model):
    names = {u.name for u in find_units(tiny_model("opt", word_embed_proj_dim=32))}
    assert not any("embed" in n or "lm_head" in n or "project" in n for n in names)


def test_skip_takes_glob_patterns(tiny_model):
    units = find_units(tiny_model("llama"), skip=["*.v_proj", "model.layers.0.*"])
    assert len(units) == 6 and all(u.block == 1 and "v_proj" not in u.name for u in units)


def test_skipping_everything_is_an_error(tiny_model):
    with pytest.raises(ValueError, match="leaves none of the 14 units"):
        find_units(tiny_model("llama"), skip=["*"])


def test_routers_are_no_units(tiny_model):
    model = tiny_model("llama", num_experts=4)
    model.model.layers[0].mlp.gate = nn.Linear(64, 4)
    assert not any(u.name.endswith(".gate") for u in find_units(model))


def test_a_gated_linear_that_is_no_router_stays_a_unit(tiny_model):
    model = tiny_model("llama")
    model.model.layers[0].mlp.gate = nn.Linear(64, 64)
    assert any(u.name.endswith("0.mlp.gate") for u in find_units(model))


def test_multihead_attention_and_convolutions_are_left_alone(tiny_model):
    model = tiny_model("llama")
    model.model.layers[0].extra = nn.MultiheadAttention(64, 4)
    model.model.layers[1].extra = nn.Conv1d(64, 64, 3)
    assert len(find_units(model)) == 14


def test_foreign_linear_subclasses_are_left_alone(tiny_model):
    class Foreign(nn.Linear):
        pass

    model = tiny_model("llama")
    model.model.layers[0].self_attn.q_proj = Foreign(64, 64)
    assert len(find_units(model)) == 13


def test_a_model_in_stock_form_is_refused_with_the_way_out():
    config = AutoConfig.for_model("gpt2", n_layer=2, n_embd=32, n_head=2, vocab_size=64)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn is a Conv1D.*make_plain"):
        find_units(model)


def test_encoder_decoders_are_refused():
    config = AutoConfig.for_model(
        "t5", num_layers=1, d_model=16, d_kv=8, d_ff=16, num_heads=2, vocab_size=32
    )
    from transformers import AutoModelForSeq2SeqLM

    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(ValueError, match="encoder-decoder"):
        find_blocks(model)


def test_a_model_without_linears_names_what_is_supported(tiny_model):
    model = tiny_model("llama")
    model.model.layers = nn.ModuleList(nn.Identity() for _ in range(2))
    with pytest.raises(ValueError, match="such as Llama"):
        find_units(model)


def test_a_module_without_config_is_refused():
    with pytest.raises(ValueError, match="no config"):
        find_blocks(nn.Linear(2, 2))


def test_an_indexer_of_sparse_attention_is_never_a_unit():
    config = AutoConfig.for_model("deepseek_v32", num_hidden_layers=2, first_k_dense_replace=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear]
    assert any(".indexer." in name for name in linears)
    assert not any(".indexer." in unit.name for unit in find_units(model))


def test_blocks_are_found_where_the_head_is_called_the_decoder():
    config = AutoConfig.for_model(
        "modernbert-decoder", num_hidden_layers=2, hidden_size=32, intermediate_size=32,
        num_attention_heads=2, vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert {unit.block for unit in find_units(model)} == {0, 1}


def test_a_layer_whose_weight_is_read_without_a_call_is_no_unit():
    config = MambaConfig(num_hidden_layers=2, hidden_size=32, state_size=8, vocab_size=64)
    model = MambaForCausalLM(config)
    names = {unit.name.rpartition(".")[2] for unit in find_units(model)}
    assert {name.rpartition(".")[2] for name in linear_layers(model)} == names
    assert names == {"in_proj", "x_proj", "out_proj"}


def test_a_router_by_another_name_is_no_unit():
    sizes = {"d_model": 32, "d_ff": 32, "d_kv": 16, "num_heads": 2, "num_experts": 4}
    config = AutoConfig.for_model(
        "switch_transformers", vocab_size=32, num_layers=2, num_sparse_encoder_layers=1, **sizes
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    assert any(name.endswith("router.classifier") for name, _ in model.named_modules())
    assert not any("router" in u.name for u in find_units(model))


def test_a_model_that_changes_its_weights_is_refused_with_the_way_out():
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
    config = AutoConfig.for_model("rwkv", vocab_size=32, context_length=32, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="set rescale_every to 0 in its config.json"):
        check_streamable(model)
    model.config.rescale_every = 0
    check_streamable(model)


def test_coefficients_that_a_model_clamps_are_no_units():
    kinds = ["sliding_attention", "full_attention"]
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    sizes |= {"intermediate_size": 32, "laurel_rank": 4, "hidden_size_per_layer_input": 8}
    config = AutoConfig.for_model(
        "gemma3n_text", vocab_size=32, vocab_size_per_layer_input=32, num_hidden_layers=2,
        layer_types=kinds, activation_sparsity_pattern=[0.0, 0.0], num_kv_shared_layers=0, **sizes,
    )  # fmt: skip
    names = [u.name for u in find_units(AutoModelForCausalLM.from_config(config))]
    assert names and not any("altup" in name for name in names)


def test_patterns_that_match_nothing_are_found(tiny_model):
    patterns = ["*.layers.0.*", "*.nope", "re:.*head", "lm_head"]
    assert unmatched(tiny_model("llama"), patterns) == ["*.nope"]
