"""The factor that GPTQ and SparseGPT share, on Hessians good and bad."""

from __future__ import annotations

import pytest
import torch

from hf_evopress.methods.maths.linalg import DAMP, SINK, Stats

N = 48


def gram(seed=0, tokens=400):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, N, generator=g) @ torch.randn(N, N, generator=g)
    return X.T @ X / tokens


def test_the_factor_is_upper_and_squares_to_the_damped_inverse():
    H = gram()
    U = Stats(H).inverse_factor(damp=0.1)
    damped = H.double() + 0.1 * H.double().diagonal().mean() * torch.eye(N)
    assert torch.equal(U, U.triu()) and (U.diagonal() > 0).all()
    assert torch.allclose(U.T @ U, torch.linalg.inv(damped).float(), rtol=1e-3, atol=1e-7)


def test_the_factor_is_computed_once_per_sink_and_damp():
    stats = Stats(gram(), gram(1))
    assert stats.inverse_factor() is stats.inverse_factor(sink=SINK, damp=DAMP)
    assert stats.inverse_factor(damp=0.01) is not stats.inverse_factor(damp=0.1)
    assert stats.inverse_factor(sink=0.0) is not stats.inverse_factor()


def test_the_sink_moment_enters_with_its_share_of_the_trace():
    stats = Stats(gram(), 1000 * gram(1))
    H = stats.hessian(sink=0.05)
    assert float(H.trace()) == pytest.approx(1.05 * float(stats.gram.trace()), rel=1e-5)


@pytest.mark.parametrize("sink", [None, torch.zeros(N, N)])
def test_without_a_sink_moment_the_hessian_is_the_gram(sink):
    H = gram()
    assert torch.equal(Stats(H, sink).hessian(sink=0.05), H)


def test_a_gram_of_fewer_tokens_than_inputs_is_damped_until_it_factors():
    assert torch.isfinite(Stats(gram(tokens=3)).inverse_factor(damp=0.0)).all()


def test_inputs_that_are_never_on_stand_alone_in_the_factor():
    H = gram()
    H[5] = H[:, 5] = 0
    U = Stats(H).inverse_factor()
    off = U - torch.diag(U.diagonal())
    assert torch.isfinite(U).all()
    assert off[5].abs().max() == 0 and off[:, 5].abs().max() == 0


def test_inputs_that_are_all_off_still_factor():
    assert torch.isfinite(Stats(torch.zeros(N, N)).inverse_factor()).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_with_nan_are_named_as_the_cause(bad):
    H = gram()
    H[3] = H[:, 3] = bad
    with pytest.raises(ValueError, match="contain inf or NaN"):
        Stats(H).inverse_factor()
