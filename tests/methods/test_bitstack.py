"""Stacks of sign blocks: prefixes are levels, and every block lowers the error."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hf_evopress.methods import compose
from hf_evopress.methods.bitstack import prefix
from hf_evopress.methods.maths.linalg import Stats

SHAPE = (48, 64)


def make() -> tuple[Tensor, Stats]:
    g = torch.Generator().manual_seed(0)
    X = torch.randn(300, 64, generator=g) * torch.logspace(0, -2, 64)
    return torch.randn(SHAPE, generator=g), Stats(X.T @ X / 300, n_tokens=300)


def weight(level: str, W: Tensor, stats: Stats | None) -> Tensor:
    known = compose.normalize(level)
    state = compose.compress(known, W, stats)
    return compose.decompress(known, state, tuple(W.shape), torch.float32)


def loss(d: Tensor, stats: Stats) -> float:
    return float(((d @ stats.gram) * d).sum())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_shorter_stack_is_the_beginning_of_a_longer_one() -> None:
    W, stats = make()
    longest = compose.compress(compose.normalize("bitstack:blocks=5,rank=2"), W, stats)
    for blocks in (1, 2, 4, 5):
        level = compose.normalize(f"bitstack:blocks={blocks},rank=2")
        assert same(compose.compress(level, W, stats), prefix(longest, blocks))


def test_levels_made_together_are_prefixes_of_one_stack() -> None:
    W, stats = make()
    levels = [compose.normalize(f"bitstack:blocks={n}") for n in (3, 1, 2)]
    (longest,), *others = compose.compress_many(levels, [W], stats)
    for level, (state,) in zip(levels[1:], others, strict=True):
        assert same(state, prefix(longest, level.terms[0].kwargs["blocks"]))


def test_every_block_lowers_the_error() -> None:
    W, stats = make()
    errors = [loss(W - weight(f"bitstack:blocks={n}", W, stats), stats) for n in range(1, 7)]
    assert all(more < less for less, more in pairwise([loss(W, stats), *errors]))


def test_inputs_that_are_large_get_the_smaller_errors() -> None:
    W, stats = make()
    scaled, plain = (
        loss(W - weight(f"bitstack:blocks=3{tail}", W, stats), stats)
        for tail in ("", ",scaled=false")
    )
    assert scaled < 0.9 * plain


def test_one_block_of_full_rank_is_the_weight() -> None:
    W, _ = make()
    got = weight("bitstack:blocks=1,rank=48,scaled=false", W, None)
    assert torch.allclose(got, W, atol=5e-3)


@pytest.mark.parametrize("rank", [1, 4])
def test_a_block_costs_a_bit_per_weight_and_its_factors(rank: int) -> None:
    costs = [
        compose.cost_bits(compose.normalize(f"bitstack:blocks={n},rank={rank}"), SHAPE)
        for n in (1, 2, 3)
    ]
    assert costs[1] - costs[0] == costs[2] - costs[1] == 48 * 64 + 16 * rank * (48 + 64)
    assert costs[0] - (costs[1] - costs[0]) == 16 * 64


def test_inputs_that_are_never_on_do_no_harm() -> None:
    W, stats = make()
    stats.gram[5] = stats.gram[:, 5] = 0
    assert torch.isfinite(weight("bitstack:blocks=3", W, stats)).all()


def test_parameters_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="sink means nothing with scaled=false"):
        compose.normalize("bitstack:blocks=2,scaled=false,sink=0.5")
    with pytest.raises(ValueError, match="has at most rank 8, got rank=9"):
        compose.check_shape(compose.normalize("bitstack:blocks=2,rank=9"), (8, 16))
