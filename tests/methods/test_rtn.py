"""Rounding: what is stored, and how far off it may be."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from hf_evopress.methods import compose
from hf_evopress.methods.maths import codes

W = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))


def state_and_weight(level, weight=W, dtype=torch.float32):
    level = compose.normalize(level)
    state = compose.compress(level, weight, None)
    return state, compose.decompress(level, state, tuple(weight.shape), dtype)


@pytest.mark.parametrize("group_size, groups", [(32, 3), (48, 2), (96, 1), (-1, 1)])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_a_weight_costs_its_bits_and_a_share_of_scale_and_zero(bits, group_size, groups):
    level = compose.normalize(f"rtn:bits={bits},group_size={group_size}")
    size = 96 // groups
    assert compose.cost_bits(level, (24, 96)) / (24 * 96) == bits + (16 + bits) / size


@pytest.mark.parametrize("shape", [(5, 40), (3, 24), (1, 8), (7, 20)])
def test_ragged_shapes_cost_the_bytes_that_are_stored(shape):
    for text in ("rtn:bits=3,group_size=4", "rtn:bits=5,group_size=-1,symmetric=true"):
        level, weight = compose.normalize(text), torch.randn(shape)
        state, _ = state_and_weight(text, weight)
        stored = sum(8 * v.numel() * v.element_size() for v in state.values())
        assert compose.cost_bits(level, shape) == stored


def test_symmetric_levels_store_no_zero_points():
    assert state_and_weight("rtn:bits=4,group_size=32,symmetric=true")[0].keys() == {
        "codes",
        "scales",
    }


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_scales_are_stored_in_the_dtype_of_the_level(name):
    state, _ = state_and_weight(f"rtn:bits=4,group_size=32,scales={name}")
    assert state["scales"].dtype == getattr(torch, name)


def test_every_bit_halves_the_error():
    errors = [
        float((state_and_weight(f"rtn:bits={b},group_size=32")[1] - W).norm())
        for b in (2, 3, 4, 5, 6, 7, 8)
    ]
    for coarse, fine in pairwise(errors):
        assert 0.35 < fine / coarse < 0.65


def test_a_weight_on_its_own_grid_comes_back_exactly():
    q = torch.randint(0, 8, (6, 32), generator=torch.Generator().manual_seed(1)).float()
    q[:, 0], q[:, 1] = 0, 7
    weight = (q - 3) * 0.25
    assert torch.equal(state_and_weight("rtn:bits=3,group_size=32", weight)[1], weight)


def test_groups_do_not_touch_each_other():
    changed = W.clone()
    changed[:, :32] *= 100
    _, before = state_and_weight("rtn:bits=3,group_size=32")
    _, after = state_and_weight("rtn:bits=3,group_size=32", changed)
    assert torch.equal(before[:, 32:], after[:, 32:])


@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_tiles_and_the_whole_weight_decompress_alike(monkeypatch, symmetric):
    level = f"rtn:bits=3,group_size=32,symmetric={symmetric}"
    _, whole = state_and_weight(level, dtype=torch.bfloat16)
    monkeypatch.setattr(codes, "TILE", 7 * 96)
    _, tiles = state_and_weight(level, dtype=torch.bfloat16)
    assert torch.equal(whole, tiles)


def test_a_traced_layer_decompresses_alike():
    level = compose.normalize("rtn:bits=3,group_size=32")
    state, weight = state_and_weight("rtn:bits=3,group_size=32")

    class Layer(torch.nn.Module):
        def forward(self, codes, scales, zeros):
            state = {"codes": codes, "scales": scales, "zeros": zeros}
            return compose.decompress(level, state, (24, 96), torch.float32)

    program = torch.export.export(Layer(), (state["codes"], state["scales"], state["zeros"]))
    assert torch.equal(program.module()(*state.values()), weight)
