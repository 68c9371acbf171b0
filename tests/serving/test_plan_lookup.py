"""Units of a plan by the names of a server's modules."""

from __future__ import annotations

import pytest

from hf_evopress.plans.level import Level
from hf_evopress.plans.plan import Plan
from hf_evopress.serving.plan_lookup import Member, PlanLookup

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
WHOLE = {"qkv_proj": ["qkv_proj"]}  # as in Phi-3
FOUR, THREE = "rtn:bits=4,group_size=32", "rtn:bits=3,group_size=32"
ATTENTION = "model.layers.0.self_attn"


def lookup(levels: dict[str, str], shapes: dict[str, tuple[int, int]] | None = None) -> PlanLookup:
    return PlanLookup(Plan(levels, shapes or {}))


def test_a_fused_layer_has_a_member_per_part_at_its_own_level() -> None:
    units = lookup({f"{ATTENTION}.q_proj": FOUR, f"{ATTENTION}.v_proj": THREE})
    found = units.members(f"{ATTENTION}.qkv_proj", [64, 32, 32], 64, FUSED)
    assert found == [
        Member(f"{ATTENTION}.q_proj", Level.parse(FOUR), (64, 64)),
        Member(f"{ATTENTION}.k_proj", Level.parse("dense"), (32, 64)),
        Member(f"{ATTENTION}.v_proj", Level.parse(THREE), (32, 64)),
    ]


def test_a_layer_that_is_fused_in_the_checkpoint_too_is_one_member() -> None:
    units = lookup({f"{ATTENTION}.qkv_proj": FOUR})
    (found,) = units.members(f"{ATTENTION}.qkv_proj", [64, 32, 32], 64, WHOLE)
    assert found.shape == (128, 64)


def test_a_layer_in_parts_here_and_whole_in_the_checkpoint_is_refused() -> None:
    units = lookup({"blocks.0.query_key_value": FOUR})
    with pytest.raises(ValueError, match="has 3 parts here and 1 in the checkpoint"):
        units.members("blocks.0.query_key_value", [64, 64, 64], 64, {})


def test_dense_layers_have_no_members() -> None:
    units = lookup({"model.layers.0.mlp.up_proj": "dense", "model.layers.0.mlp.down_proj": FOUR})
    assert units.members("model.layers.0.mlp.gate_up_proj", [128, 128], 64, FUSED) == []
    assert units.members("model.layers.1.mlp.down_proj", [64], 128, FUSED) == []


def test_a_weight_of_another_size_is_refused() -> None:
    units = lookup(
        {"model.layers.0.mlp.down_proj": FOUR}, {"model.layers.0.mlp.down_proj": (64, 128)}
    )
    with pytest.raises(ValueError, match="64 x 128 in the plan and 64 x 64 here"):
        units.members("model.layers.0.mlp.down_proj", [64], 64, FUSED)


def test_an_embedding_without_a_name_is_found_by_its_shape() -> None:
    shapes = {"model.embed_tokens": (256, 64), "lm_head": (256, 64)}
    units = lookup({"model.embed_tokens": FOUR, "lm_head": THREE}, shapes)
    embedding, head = units.end("", (256, 64)), units.end("lm_head", (256, 64))
    assert embedding is not None and embedding.unit == "model.embed_tokens"
    assert head is not None and str(head.level) == THREE
    assert units.end("", (128, 64)) is None and units.end("model.other", (256, 64)) is None


def test_a_square_weight_of_a_block_is_no_embedding() -> None:
    units = lookup({"model.layers.0.mlp.up_proj": FOUR}, {"model.layers.0.mlp.up_proj": (256, 64)})
    assert units.end("", (256, 64)) is None


def test_everything_inside_a_dropped_sub_block_is_dropped() -> None:
    units = lookup({ATTENTION: "drop", "model.layers.0.mlp.up_proj": FOUR})
    assert units.is_dropped(f"{ATTENTION}.qkv_proj") and units.is_dropped(ATTENTION)
    assert not units.is_dropped("model.layers.0.mlp.gate_up_proj")


def test_units_go_by_the_names_of_the_server_and_are_reported_by_their_own() -> None:
    units = lookup({f"model.language_model.layers.0.mlp.experts.{i}.up_proj": FOUR for i in (0, 1)})
    units.rename(lambda name: name.replace("model.language_model", "language_model.model"))
    found = units.packed_inside("language_model.model.layers.0.mlp.experts")
    assert found == [f"model.language_model.layers.0.mlp.experts.{i}.up_proj" for i in (0, 1)]
    assert units.packed_inside("model.language_model") == []


def test_checksums_by_names_in_the_files_are_found_by_those_of_the_plan() -> None:
    def new_name(name: str) -> str:
        return name.replace("model.language_model", "language_model.model")

    unit = "model.language_model.layers.0.mlp.up_proj"
    units = lookup({unit: FOUR})
    units.rename(new_name)
    for written in (unit, "language_model.model.layers.0.mlp.up_proj"):
        made = {f"{written}.codes": "0123abcd", "vision.0.weight": "89abcdef"}
        found = units.by_unit(made, new_name)
        assert found == {f"{unit}.codes": "0123abcd", "vision.0.weight": "89abcdef"}
