"""Which sub-blocks a model has, and the genes they add to a search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_evopress.models.sub_blocks import droppable, find_sub_blocks
from hf_evopress.models.units import find_units
from hf_evopress.search.space import SearchSpace


@pytest.mark.parametrize(
    "arch, names",
    [
        ("llama", ["model.layers.0.self_attn", "model.layers.0.mlp"]),
        ("phi3", ["model.layers.0.self_attn", "model.layers.0.mlp"]),
        ("gemma3_text", ["model.layers.0.self_attn", "model.layers.0.mlp"]),
        ("gpt_neox", ["gpt_neox.layers.0.attention", "gpt_neox.layers.0.mlp"]),
        ("opt", ["model.decoder.layers.0.self_attn"]),  # its MLP is no module of its own
    ],
)
def test_attention_and_mlp_of_a_block_are_found(
    arch: str, names: list[str], tiny_model: Callable[..., Any]
) -> None:
    subs = find_sub_blocks(tiny_model(arch))
    assert [sub.name for sub in subs if sub.block == 0] == names
    assert {sub.kind for sub in subs} <= {"attention", "mlp"}


def test_units_inside_are_the_linears_of_the_sub_block(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    inside = [unit for sub in find_sub_blocks(model) for unit in sub.units]
    assert inside == [unit.name for unit in find_units(model)]


def on_meta(arch: str, **settings: Any) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(arch, **sizes, **ids, intermediate_size=32, **settings)
        )


def test_a_mixture_of_experts_is_an_mlp_that_returns_what_its_block_unpacks() -> None:
    for arch, n_outputs in (("qwen3_moe", 0), ("gpt_oss", 2)):
        mlps = [sub for sub in find_sub_blocks(on_meta(arch)) if sub.kind == "mlp"]
        assert [sub.n_outputs for sub in mlps] == [n_outputs, n_outputs]


def test_linear_attention_is_not_offered() -> None:
    model = on_meta("qwen3_next", layer_types=["linear_attention", "full_attention"])
    attention = [sub.name for sub in find_sub_blocks(model) if sub.kind == "attention"]
    assert attention == ["model.layers.1.self_attn"]


def test_genes_cost_nothing_dropped_and_the_rest_of_the_sub_block_kept(
    tiny_model: Callable[..., Any],
) -> None:
    model = tiny_model("qwen3").bfloat16()
    added = droppable(model, find_units(model, skip=["*.o_proj"]))
    o_proj, qk_norms = 64 * 64 * 16, 2 * 16 * 16
    assert added.options["model.layers.0.self_attn"] == [("drop", 0), ("dense", o_proj + qk_norms)]
    assert added.options["model.layers.0.mlp"] == [("drop", 0), ("dense", 0)]
    assert added.kept_bits == 2 * (o_proj + qk_norms)
    assert added.inside["model.layers.1.self_attn.q_proj"] == "model.layers.1.self_attn"
    assert "model.layers.1.self_attn.o_proj" not in added.inside


def test_first_and_last_blocks_can_be_kept_and_kinds_chosen(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    added = droppable(model, find_units(model), kinds=["mlp"], keep_first=1, keep_last=2)
    assert added.blocks == {"model.layers.1.mlp": 1}


def test_nothing_left_to_drop_is_an_error(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("opt")
    with pytest.raises(ValueError, match="no sub-block of OPTForCausalLM"):
        droppable(model, find_units(model), kinds=["mlp"])
    with pytest.raises(ValueError, match="not 'experts'"):
        droppable(model, find_units(model), kinds=["experts"])  # type: ignore[list-item]


def test_a_search_space_takes_the_genes_and_a_plan_leaves_kept_ones_out(
    tiny_model: Callable[..., Any],
) -> None:
    model = tiny_model("llama").bfloat16()
    units = find_units(model)
    added = droppable(model, units)
    menu = {unit.name: [("rtn:bits=4,group_size=32", 4 * unit.n_weights)] for unit in units}
    space = SearchSpace.build(
        {**{unit.name: unit.n_weights for unit in units}, **dict.fromkeys(added.options, 0)},
        {**menu, **added.options},
        inside=added.inside,
        blocks={**{unit.name: unit.block for unit in units}, **added.blocks},
    )
    levels = {**{unit.name: "rtn:bits=4,group_size=32" for unit in units}}
    dropped = "model.layers.1.mlp"
    levels = {u: v for u, v in levels.items() if not u.startswith(dropped)} | {dropped: "drop"}
    genome = space.genome(added.space_levels(levels))
    assert added.plan_levels(space.levels(genome)) == levels
    freed = sum(4 * unit.n_weights for unit in units if unit.name.startswith(dropped))
    whole = space.genome(added.space_levels({u.name: menu[u.name][0][0] for u in units}))
    assert space.cost(whole) - space.cost(genome) == freed
