"""A tuned level starts as the level it is, has gradients, and packs into the same tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_evopress.methods import compose
from hf_evopress.methods.base import State
from hf_evopress.plans.level import Level
from hf_evopress.refine.learned_rounding import TunedLevel

SHAPE = (24, 64)
LEVELS = (
    "rtn:bits=3,group_size=32",
    "rtn:bits=2,group_size=-1,symmetric=true",
    "rtn:bits=4,group_size=16,scales=bfloat16",
    "rtn:bits=2,group_size=32 + lowrank:rank=4,metric=plain",
    "rtn:bits=2,group_size=32 + lowrank:rank=4,metric=plain,factors=int8",
    "lowrank:rank=8,metric=plain",
    "magnitude:sparsity=0.5",
    "magnitude:pattern=2:4,bits=3,group_size=32",
    "magnitude:sparsity=0.4,bits=3,group_size=16",
)


def make(text: str) -> tuple[Level, State, Tensor]:
    W = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    level = compose.normalize(text)
    return level, compose.compress(level, W, None), W


@pytest.mark.parametrize("text", LEVELS)
def test_it_starts_as_the_weight_and_the_tensors_of_the_level(text: str) -> None:
    level, state, W = make(text)
    tuned = TunedLevel(level, state, SHAPE, W)
    assert torch.equal(tuned.weight(), compose.decompress(level, state, SHAPE, torch.float32))
    made = tuned.state()
    assert list(made) == list(state)
    assert all(torch.equal(made[k], state[k]) and made[k].dtype == state[k].dtype for k in state)


@pytest.mark.parametrize("text", LEVELS)
def test_steps_along_its_gradients_bring_it_closer_and_stay_in_the_format(text: str) -> None:
    level, state, W = make(text)
    tuned = TunedLevel(level, state, SHAPE, None)
    wish = W + 0.3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam([*tuned.latents(), *tuned.floats(), *tuned.moves()], lr=0.02)
    before = float((tuned.weight().detach() - wish).square().sum())
    for _ in range(40):
        (tuned.weight() - wish).square().sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        tuned.bound()
    made = tuned.state()
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == {
        k: (v.shape, v.dtype) for k, v in state.items()
    }
    # what is packed is what was tuned
    weight = compose.decompress(level, made, SHAPE, torch.float32)
    torch.testing.assert_close(weight, tuned.weight().detach(), atol=1e-6, rtol=1e-6)
    assert float((weight - wish).square().sum()) < before


def test_latents_lean_towards_the_weight_but_stay_at_their_codes() -> None:
    level, state, W = make(LEVELS[0])
    (with_weight,) = TunedLevel(level, state, SHAPE, W).latents()
    (without,) = TunedLevel(level, state, SHAPE, None).latents()
    assert torch.equal(with_weight.round(), without) and not torch.equal(with_weight, without)


def test_a_dense_weight_has_nothing_to_tune() -> None:
    level = compose.normalize("dense")
    state = compose.compress(level, torch.ones(SHAPE), None)
    tuned = TunedLevel(level, state, SHAPE, None)
    assert not [*tuned.latents(), *tuned.floats()]
