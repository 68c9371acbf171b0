"""The bucketed KL is a true lower bound of the KL that sees leaks out of the top-k."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_evopress.scoring.fitness.kl import KL
from hf_evopress.scoring.fitness.perplexity import Perplexity

TOKENS = torch.zeros(300, dtype=torch.long)


def _logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(300, 50, generator=torch.Generator().manual_seed(seed))


def _full_kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float(
        F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum")
    ) / len(p)


def test_all_tokens_give_the_exact_kl() -> None:
    p, q = _logits(0), _logits(1)
    fitness = KL(top_k=0)
    assert fitness.loss(q, TOKENS, fitness.targets(p, TOKENS)) == pytest.approx(
        _full_kl(p, q), rel=1e-5
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 49), st.integers(0, 1000), st.floats(0.1, 8))
def test_any_top_k_is_a_lower_bound_between_zero_and_the_full_kl(
    k: int, seed: int, scale: float
) -> None:
    p, q = _logits(seed, scale), _logits(seed + 1, scale)
    fitness = KL(top_k=k)
    value = fitness.loss(q, TOKENS, fitness.targets(p, TOKENS))
    assert -1e-5 <= value <= _full_kl(p, q) * (1 + 1e-5) + 1e-5


def test_probability_that_leaks_out_of_the_top_k_is_seen() -> None:
    p = torch.zeros(300, 50)
    p[:, 0] = 10.0
    q = p.clone()
    q[:, 1:] += 5.0  # the same ranking and the same shape inside the top-1
    fitness = KL(top_k=1)
    assert fitness.loss(q, TOKENS, fitness.targets(p, TOKENS)) > 0.1


def test_the_dense_model_has_no_loss() -> None:
    p = _logits(3)
    fitness = KL(top_k=8)
    assert abs(fitness.loss(p, TOKENS, fitness.targets(p, TOKENS))) < 1e-6


def test_negative_top_k_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k=|top_k >= 0"):
        KL(top_k=-1)


def test_perplexity_is_the_cross_entropy_of_the_next_token() -> None:
    logits = _logits(4)
    tokens = torch.randint(0, 50, (300,), generator=torch.Generator().manual_seed(0))
    expected = float(F.cross_entropy(logits[:-1], tokens[1:]))
    assert Perplexity().loss(logits, tokens, {}) == pytest.approx(expected, rel=1e-5)


def _sampled_loss(p: torch.Tensor, q: torch.Tensor, columns: int) -> float:
    fitness = KL(top_k=10, columns=columns)
    targets = fitness.targets(p, TOKENS)
    kept, sampled = q.gather(-1, targets["ids"].long()), q[:, fitness.sample(q.shape[-1])]
    return fitness.share_at(kept, sampled, TOKENS, targets, slice(0, len(p)))


def test_all_columns_give_the_loss_of_the_whole_head() -> None:
    p, q = _logits(5), _logits(6)
    whole = KL(top_k=10)
    expected = whole.loss(q, TOKENS, whole.targets(p, TOKENS))
    assert _sampled_loss(p, q, 50) == pytest.approx(expected, rel=1e-5)


def test_some_columns_estimate_it_and_the_dense_model_has_no_loss() -> None:
    g = torch.Generator().manual_seed(7)
    p = 2 * torch.randn(300, 2000, generator=g)
    q = p + 0.3 * torch.randn(300, 2000, generator=g)
    whole = KL(top_k=10)
    expected = whole.loss(q, TOKENS, whole.targets(p, TOKENS))
    assert _sampled_loss(p, q, 200) == pytest.approx(expected, rel=0.2)
    assert abs(_sampled_loss(p, p, 200)) < 1e-5


def test_columns_need_a_top_k() -> None:
    with pytest.raises(ValueError, match="top_k > 0"):
        KL(top_k=0, columns=5)
