"""What is said of a plan that vLLM will not take."""

from __future__ import annotations

from hf_evopress.export.vllm_limits import vllm_obstacles
from hf_evopress.plans.plan import Plan

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")


def plan(columns: int = 64, **changed: int) -> Plan:
    bits = {f"model.layers.{i}.{part}": 4 for i in (0, 1) for part in PARTS}
    for unit in bits:
        bits[unit] = changed.get(unit.rpartition(".")[2], 4)
    levels = {u: f"rtn:bits={b},group_size=32,symmetric=true" for u, b in bits.items()}
    return Plan(levels, dict.fromkeys(bits, (64, columns)))


def test_four_bits_throughout_are_taken() -> None:
    assert vllm_obstacles(plan()) == []


def test_eight_bits_are_not_for_cpus() -> None:
    (said,) = vllm_obstacles(plan(gate_proj=8, up_proj=8))
    assert said == "vLLM on a CPU takes 4 bits only, and 4 layers are at 8; on a GPU both"


def test_other_widths_have_no_kernel() -> None:
    (said,) = vllm_obstacles(plan(gate_proj=3, up_proj=3))
    assert "no kernels for 3 bits" in said


def test_levels_that_differ_in_a_fused_layer_are_named_with_the_way_out() -> None:
    said = vllm_obstacles(plan(v_proj=8))
    assert "model.layers.0.self_attn.q_proj/k_proj/v_proj" in said[0]
    assert "(2 such layers)" in said[0] and "--tie q_proj,k_proj,v_proj" in said[0]


def test_a_part_that_is_left_dense_is_another_level() -> None:
    levels = {"m.gate_proj": "rtn:bits=4,group_size=32,symmetric=true", "m.up_proj": "dense"}
    assert "m.gate_proj/up_proj" in vllm_obstacles(Plan(levels))[0]


def test_odd_sizes_are_not_for_cpus() -> None:
    (said,) = vllm_obstacles(plan(columns=80))
    assert "multiples of 32" in said and "64 x 80" in said
