"""`show` names levels that weights cannot take, without importing the methods."""

from __future__ import annotations

import pytest

from hf_evopress.methods import compose
from hf_evopress.plans.plan import Plan
from hf_evopress.sharing.impossible import impossible_levels

UNIT = "model.layers.0.mlp.up_proj"
SHAPE = (24, 64)


@pytest.mark.parametrize("method", compose.methods(), ids=lambda method: method.name)
def test_what_a_method_takes_is_not_called_impossible(method: compose.Method) -> None:
    for level in method.examples:
        assert not impossible_levels(Plan({UNIT: level}, shapes={UNIT: SHAPE}))


@pytest.mark.parametrize(
    ("level", "why"),
    [
        ("rtn:bits=99,group_size=32", "up to 32 bits"),
        ("rtn:bits=3,group_size=48", "64 inputs of a weight of shape 24x64 are no multiple"),
        ("rtn:bits=3,group_size=32 + lowrank:rank=900", "at most rank 24"),
        ("wanda:sparsity=1.5", "from 0 to 1"),
        ("gtpq:bits=3", "did you mean 'gptq'"),
    ],
)
def test_levels_that_cannot_be_are_named(level: str, why: str) -> None:
    plan = Plan({UNIT: level, "model.layers.0.mlp.down_proj": "dense"}, shapes={UNIT: SHAPE})
    told = impossible_levels(plan)
    assert level in told and why in told and "dense" not in told
