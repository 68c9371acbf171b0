from __future__ import annotations

import re

import pytest

from hf_evopress.plans.plan import Plan
from hf_evopress.sharing.report import (
    bits_line,
    ends_line,
    grid,
    heat_map,
    level_table,
    nominal_bits,
    results_table,
)

SHAPES = {"self_attn.q_proj": (64, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128)}


def make_plan(n_blocks: int = 3, **changed: str) -> Plan:
    levels, shapes = {}, {}
    for block in range(n_blocks):
        for kind, shape in SHAPES.items():
            unit = f"model.layers.{block}.{kind}"
            levels[unit] = f"rtn:bits={2 + block},group_size=64"
            shapes[unit] = shape
    return Plan({**levels, **changed}, shapes=shapes)


def test_rows_are_blocks_and_columns_are_kinds() -> None:
    shown = grid(make_plan(12))
    assert shown.blocks == tuple(range(12))
    assert shown.kinds == ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    assert shown.labels == ("q", "up", "down")
    assert shown.cells[11, "mlp.up_proj"] == 13


def test_means_are_over_weights() -> None:
    plan = make_plan(1)
    bits = dict(zip(plan, (2.0, 3.0, 8.0), strict=True))  # down, up, q in sorted order
    shown = grid(plan, bits)
    assert shown.mean == pytest.approx((2 * 2.0 + 2 * 3.0 + 8.0) / 5)
    assert shown.row_means == (shown.mean,)
    assert shown.column_means == (8.0, 3.0, 2.0)


def test_given_bits_win_over_the_bits_a_level_names() -> None:
    plan = make_plan(1)
    assert set(grid(plan, dict.fromkeys(plan, 3.25)).cells.values()) == {3.25}
    assert set(grid(plan).cells.values()) == {2.0}


def test_a_dropped_sub_block_is_zero_for_all_inside() -> None:
    shown = grid(make_plan(2, **{"model.layers.1.mlp": "drop", "model.layers.0.mlp": "dense"}))
    assert shown.cells[1, "mlp.up_proj"] == 0
    assert shown.cells[1, "self_attn.q_proj"] == 3
    assert shown.cells[0, "mlp.up_proj"] == 2
    assert "mlp" not in shown.kinds


def test_a_plan_of_dropped_blocks_alone_shows_them() -> None:
    plan = Plan({"model.layers.0.mlp": "drop", "model.layers.1.self_attn": "drop"})
    assert grid(plan).cells == {(0, "mlp"): 0.0, (1, "self_attn"): 0.0}


def test_experts_share_a_cell() -> None:
    units = {f"model.layers.0.mlp.experts.{e}.up_proj": f"rtn:bits={2 + e}" for e in range(3)}
    assert grid(Plan(units)).cells == {(0, "mlp.experts.*.up_proj"): 3.0}


def test_kinds_with_one_last_name_keep_their_paths() -> None:
    plan = Plan({"h.0.self_attn.dense": "rtn:bits=2", "h.0.mlp.dense": "rtn:bits=3"})
    assert grid(plan).labels == ("self_attn.dense", "mlp.dense")


@pytest.mark.parametrize(
    "level, bits",
    [
        ("dense", 16),
        ("drop", 0),
        ("zero", 0),
        ("gptq:bits=3,group_size=64", 3),
        ("sparsegpt:sparsity=0.5", 8),
        ("sparsegpt:sparsity=0.5,bits=4", 2),
        ("sparsegpt:pattern=1:4,bits=4", 1),
        ("lowrank:rank=8", 4),
        ("rtn:bits=3 + lowrank:rank=2", 4),
    ],
)
def test_nominal_bits_are_what_the_level_says(level: str, bits: float) -> None:
    unit = "model.layers.0.up_proj"
    assert nominal_bits(Plan({unit: level}, shapes={unit: (64, 64)})) == {unit: bits}


def test_the_terminal_map_has_a_line_per_block_and_all_values() -> None:
    lines = heat_map(make_plan(), color=False).splitlines()
    assert lines[0].split() == ["block", "q", "up", "down", "mean"]
    assert [line.split() for line in lines[1:4]] == [
        [str(b), *[f"{2 + b:.1f}"] * 3, f"{2 + b:.2f}"] for b in range(3)
    ]
    assert lines[4].split() == ["mean", "3.00", "3.00", "3.00", "3.00"]


def test_colour_changes_nothing_but_colour() -> None:
    plan = make_plan()
    painted = heat_map(plan)
    assert painted != heat_map(plan, color=False)
    assert re.sub(r"\x1b\[[\d;]*m", "", painted) == heat_map(plan, color=False)


def test_the_ends_of_the_scale_are_dark_and_light() -> None:
    painted = heat_map(make_plan())
    assert "\x1b[97;48;2;0;34;78m" in painted
    assert "\x1b[30;48;2;254;232;56m" in painted


def test_a_uniform_plan_can_be_shown() -> None:
    assert "2.0" in heat_map(make_plan(1), color=False)


def test_the_level_table_counts_units_and_weights() -> None:
    plan = make_plan(1, **{"model.layers.0.self_attn.q_proj": "rtn:bits=8,group_size=64"})
    header, low, high = level_table(plan).splitlines()
    assert header.split() == ["level", "units", "weights", "bits", "where"]
    assert low.split()[:4] == ["rtn:bits=2,group_size=64", "2", "80.0%", "2.00"]
    assert high.split() == ["rtn:bits=8,group_size=64", "1", "20.0%", "8.00", "q", "1"]


def test_results_align_and_show_what_is_absent() -> None:
    table = results_table([{"model": "dense", "KL": None}, {"model": "small", "KL": 0.479}])
    assert table.splitlines() == ["model     KL", "dense      -", "small  0.479"]


def test_missing_and_impossible_bits_are_refused() -> None:
    plan = make_plan(1)
    with pytest.raises(ValueError, match="missing for model.layers.0"):
        grid(plan, {})
    with pytest.raises(ValueError, match="-1.0 bits"):
        grid(plan, dict.fromkeys(plan, -1.0))


def test_a_unit_without_a_block_number_is_refused() -> None:
    with pytest.raises(ValueError, match="'lm_head' has no block number"):
        grid(Plan({"lm_head": "rtn:bits=4"}))


def test_an_empty_table_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        results_table([])


def test_stored_and_named_bits_stand_side_by_side() -> None:
    plan = make_plan()
    assert "stored" not in bits_line(plan)
    told = plan.replace(budget={"bits_per_weight": 3.2997})
    assert bits_line(told).startswith("bits per weight: 3.300 stored, all counted; ")
    assert f"{grid(plan).mean:.3f} named by the levels" in bits_line(told)


def test_embedding_and_head_stand_below_the_blocks() -> None:
    plan = make_plan(2)
    levels = {**plan.levels, "model.embed_tokens": "rtn:bits=5,group_size=64"}
    shapes = {**plan.shapes, "model.embed_tokens": (256, 64)}
    budget = {"ends_bytes": {"model.embed_tokens": 12_000, "lm_head": 32_768}}
    whole = Plan(levels, shapes, budget=budget)
    assert grid(whole) == grid(plan), "they are in no cell"
    assert heat_map(whole, color=False).splitlines()[-1] == "model.embed_tokens 5.00"
    assert "embed_tokens 1" in level_table(whole)
    told = "model.embed_tokens 0.0 MB (rtn:bits=5,group_size=64), lm_head 0.0 MB (dense)"
    assert ends_line(whole) == f"Outside the decoder: {told}."
    assert ends_line(plan) == ""
