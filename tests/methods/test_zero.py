"""The level that stores nothing."""

from __future__ import annotations

import torch

from hf_evopress.methods import compose

ZERO = compose.normalize("zero")


def test_zero_costs_nothing_and_answers_with_the_bias() -> None:
    state = compose.compress(ZERO, torch.randn(8, 16), None)
    assert compose.cost_bits(ZERO, (8, 16)) == 0 == sum(t.numel() for t in state.values())
    bias = torch.arange(8.0)
    x = torch.randn(2, 3, 16)
    run = compose.operator(ZERO, state, bias, (8, 16), torch.float32)
    assert torch.equal(run(x), bias.expand(2, 3, 8))
    assert not compose.operator(ZERO, state, None, (8, 16), torch.float32)(x).any()


def test_low_rank_after_zero_is_low_rank_of_the_weight() -> None:
    W = torch.randn(8, 16)
    alone, after = (compose.normalize(f"{p}lowrank:rank=3,metric=plain") for p in ("", "zero + "))
    weights = [
        compose.decompress(level, compose.compress(level, W, None), (8, 16), torch.float32)
        for level in (alone, after)
    ]
    assert torch.equal(*weights)
