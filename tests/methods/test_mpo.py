"""Sums of Kronecker products: exact where the weight is one, best in their own metric."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hf_evopress.methods import compose
from hf_evopress.methods.maths.linalg import Stats
from hf_evopress.methods.mpo import nearest_kronecker, rearranged, split

SHAPE = (24, 64)


def weight(level: str, W: Tensor, stats: Stats | None) -> Tensor:
    known = compose.normalize(level)
    state = compose.compress(known, W, stats)
    return compose.decompress(known, state, tuple(W.shape), torch.float32)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def positive(n: int, seed: int) -> Tensor:
    X = random(3 * n, n, seed=seed) * torch.logspace(0, -1, n)
    return X.T @ X / len(X)


def loss(d: Tensor, H: Tensor) -> float:
    return float(((d @ H) * d).sum())


@pytest.mark.parametrize("n, sides", [(576, (24, 24)), (1536, (32, 48)), (7, (1, 7)), (1, (1, 1))])
def test_a_side_is_split_where_its_halves_are_nearest(n: int, sides: tuple[int, int]) -> None:
    assert split(n) == sides


def test_a_kronecker_product_has_rank_one_when_rearranged() -> None:
    W = torch.kron(random(4, 8), random(6, 8, seed=1))
    assert torch.linalg.matrix_rank(rearranged(W)) == 1
    got = weight("mpo:bits=1,factors=float16,metric=plain", W, None)
    assert torch.allclose(got, W, atol=1e-2)


def test_the_plain_metric_is_the_truncated_svd_of_the_rearranged_weight() -> None:
    W = random(*SHAPE)
    level = compose.normalize("mpo:bits=4,factors=float16,metric=plain")
    terms = compose.empty(level, SHAPE, torch.float32)["P"].shape[0]
    S = torch.linalg.svdvals(rearranged(W))
    d = W - weight(str(level), W, None)
    assert float(d.square().sum()) == pytest.approx(float(S[terms:].square().sum()), rel=1e-3)


def test_all_terms_make_up_the_weight() -> None:
    W, stats = random(*SHAPE), Stats(positive(64, 1))
    for metric in ("kron", "plain"):
        got = weight(f"mpo:bits=32,factors=float16,metric={metric}", W, stats)
        assert torch.allclose(got, W, atol=2e-2)


def test_a_kronecker_product_is_its_own_nearest() -> None:
    A, B = positive(4, 1).double(), positive(6, 2).double()
    H1, H2 = nearest_kronecker(torch.kron(A, B), (4, 6))
    assert torch.allclose(torch.kron(H1, H2), torch.kron(A, B), rtol=1e-6)


def test_the_nearest_product_is_positive_and_near() -> None:
    H = (torch.kron(positive(4, 1), positive(6, 2)) + 0.1 * positive(24, 3)).double()
    H1, H2 = nearest_kronecker(H, (4, 6))
    assert torch.linalg.eigvalsh(H1).min() >= -1e-9 and torch.linalg.eigvalsh(H2).min() >= -1e-9
    # the best is the first singular vectors' pair of the rearranged H
    best = torch.linalg.svdvals(rearranged_square(H))[1:].norm()
    assert float((H - torch.kron(H1, H2)).norm()) == pytest.approx(float(best), rel=1e-6)


def rearranged_square(H: Tensor) -> Tensor:
    return H.view(4, 6, 4, 6).transpose(1, 2).reshape(16, 36)


@pytest.mark.parametrize("factors", ["float16", "int8", "int4"])
def test_the_metric_of_the_inputs_lowers_the_error_of_the_output(factors: str) -> None:
    W, H = random(*SHAPE), torch.kron(positive(8, 1), positive(8, 2))
    kron, plain = (
        loss(W - weight(f"mpo:bits=5,factors={factors},metric={metric}", W, Stats(H)), H)
        for metric in ("kron", "plain")
    )
    assert kron < 0.9 * plain


def test_more_bits_never_lose_more() -> None:
    W = random(*SHAPE)
    sizes = [
        float((W - weight(f"mpo:bits={b}", W, Stats(torch.eye(64)))).norm()) for b in (2, 4, 6)
    ]
    assert all(more < less for less, more in pairwise([float(W.norm()), *sizes]))


def test_parameters_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="sink means nothing with metric=plain"):
        compose.normalize("mpo:bits=2,metric=plain,sink=0.5")
    with pytest.raises(ValueError, match=r"hold no term .* one takes \d"):
        compose.check_shape(compose.normalize("mpo:bits=0.01"), (7, 11))
