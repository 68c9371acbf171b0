"""RANDOMFOLD: places and signs are a formula, every value is used as often as any other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_evopress.methods.maths.folding import Unfolded, n_values, signed_mean, unfold, uses

from .test_hashing import by_hand

GOLDEN = 0x9E3779B9
SIZES = [(96, 96), (96, 48), (96, 40), (97, 13), (50, 1), (30, 29)]


def places_and_signs(n: int, m: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return f(p) (n,) int64 and g(p) (n,), by the formula of the module's docstring."""
    place, sign = [], []
    for p in range(n):
        k, j = divmod(p, m)
        offset = by_hand(by_hand(k + GOLDEN * (seed + 1))) % m if k else 0
        place.append((j + offset) % m)
        sign.append(1.0 if k == 0 else 1.0 - 2.0 * (by_hand(p + GOLDEN * (seed + 1)) >> 31))
    return torch.tensor(place), torch.tensor(sign)


@pytest.mark.parametrize("n, m", SIZES)
@pytest.mark.parametrize("seed", [0, 7])
def test_a_weight_is_its_formula(n: int, m: int, seed: int) -> None:
    psi = torch.randn(m)
    place, sign = places_and_signs(n, m, seed)
    assert torch.equal(unfold(psi, n, seed), sign * psi[place])


@pytest.mark.parametrize("n, m", SIZES)
def test_every_value_is_used_floor_or_ceil_times(n: int, m: int) -> None:
    place, _ = places_and_signs(n, m, 0)
    count = place.bincount(minlength=m)
    assert set(count.tolist()) <= {n // m, -(-n // m)}
    assert torch.equal(uses(n, m, 0), count.float())


@pytest.mark.parametrize("n, m", SIZES)
def test_values_are_the_signed_means_of_their_weights(n: int, m: int) -> None:
    W = torch.randn(n)
    place, sign = places_and_signs(n, m, 3)
    sums = torch.zeros(m, dtype=torch.float64).index_add_(0, place, (sign * W).double())
    assert torch.allclose(signed_mean(W, m, 3), sums / place.bincount(minlength=m))
    assert n > m or torch.equal(signed_mean(W, m, 3).float(), W)


@pytest.mark.parametrize("n, m", SIZES)
def test_values_of_an_unfolded_weight_are_those_that_it_was_made_of(n: int, m: int) -> None:
    psi = torch.randn(m)
    assert torch.equal(signed_mean(unfold(psi, n, 0), m, 0).float(), psi)


@pytest.mark.parametrize("n, m", SIZES)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_gradients_are_those_of_the_formula_the_papers_divided_by_uses_and_scale_squared(
    n: int, m: int, scale: float
) -> None:
    place, sign = places_and_signs(n, m, 0)
    direction = torch.randn(n)
    grads = {}
    for kind in ("formula", "plain", "mean"):
        psi = torch.linspace(-1, 1, m).requires_grad_()
        if kind == "formula":
            flat = scale * sign * psi[place]
        else:
            flat = Unfolded.apply(psi, n, 0, scale, kind == "mean")
        (flat * direction).sum().backward()
        grads[kind] = psi.grad
    assert torch.allclose(grads["plain"], grads["formula"], atol=1e-5)
    factor = place.bincount(minlength=m) * scale**2
    assert torch.allclose(grads["mean"], grads["formula"] / factor, atol=1e-5)


def test_a_share_is_rounded_to_whole_values_and_leaves_one() -> None:
    assert [n_values(10, s) for s in (0.001, 0.5, 0.26, 1.0)] == [1, 5, 3, 10]
