"""`drop` is a level of sub-blocks only."""

from __future__ import annotations

import pytest

from hf_evopress.methods import compose
from hf_evopress.methods.menu import menus


def test_drop_is_refused_for_a_linear_weight_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"whole sub-blocks .* use zero"):
        menus({"model.layers.0.mlp.up_proj": (8, 16)}, ["drop"])


def test_nothing_may_follow_a_drop() -> None:
    with pytest.raises(ValueError, match="leaves no error"):
        compose.normalize("drop + lowrank:rank=2")


def test_drop_costs_nothing() -> None:
    assert compose.cost_bits(compose.normalize("drop"), (8, 16)) == 0
