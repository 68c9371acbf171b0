"""Sparse dictionaries: what fits into the bits, and that each step lowers the output's error."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hf_evopress.methods import compose
from hf_evopress.methods.maths.dictionary import (
    atoms_for,
    fit,
    learn,
    pursue,
    round_values,
    seen,
    spread,
)
from hf_evopress.methods.maths.factors import pack_factor, unpack_factor
from hf_evopress.methods.maths.linalg import Stats
from hf_evopress.methods.maths.packing import unpack

SHAPE = (48, 64)


def make(shape: tuple[int, int] = SHAPE, seed: int = 0) -> tuple[Tensor, Stats]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(shape[1], shape[1], generator=g)
    X = torch.randn(500, shape[1], generator=g) * torch.logspace(0, -1.5, shape[1]) @ mix
    # rows of a few directions out of many, which a dictionary finds and a basis does not
    atoms = torch.randn(40, shape[1], generator=g)
    Z = torch.randn(shape[0], 40, generator=g) * (torch.rand(shape[0], 40, generator=g) < 0.2)
    W = Z @ atoms + 0.1 * torch.randn(shape, generator=g)
    return W, Stats(X.T @ X / 500, n_tokens=500)


def error(level: str, W: Tensor, stats: Stats) -> float:
    known = compose.normalize(level)
    state = compose.compress(known, W, stats)
    d = W - compose.decompress(known, state, tuple(W.shape), torch.float32)
    return float(((d @ stats.gram) * d).sum())


def loss(W: Tensor, stats: Stats, A: Tensor, places: Tensor, z: Tensor) -> float:
    d = W - spread(places, z, len(A)) @ A
    return float(((d @ stats.gram) * d).sum())


def test_as_many_coefficients_are_kept_as_the_bits_hold() -> None:
    for bits in (2.0, 3.0, 4.0, 6.0):
        level = compose.normalize(f"dict:bits={bits}")
        W, stats = make()
        state = compose.compress(level, W, stats)
        kept = unpack(state["mask"], 1, state["atoms_codes"].shape[0]).sum(1)
        assert int(kept.min()) == int(kept.max())
        used = compose.cost_bits(level, SHAPE) / (SHAPE[0] * SHAPE[1])
        assert 0.8 * bits < used <= bits


def test_atoms_stop_at_the_rank_of_the_weight() -> None:
    level = compose.normalize("dict:bits=32")
    state = compose.empty(level, SHAPE, torch.float32)
    assert state["atoms_codes"].shape[0] == min(SHAPE)


def test_more_bits_never_lose_more() -> None:
    W, stats = make()
    errors = [error(f"dict:bits={bits}", W, stats) for bits in (2, 3, 4, 5)]
    assert all(more < less for less, more in pairwise(errors))


def test_each_sweep_lowers_the_error_of_the_output() -> None:
    W, stats = make()
    U = torch.linalg.svd(W)[0][:, :24]
    losses = []
    for sweeps in (0, 1, 4):
        A = learn(W, stats.gram, U.T @ W, 8, sweeps)
        losses.append(loss(W, stats, A, *pursue(*seen(W, stats.gram, A), 8)))
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("step", ["coefficients", "atoms"])
def test_a_step_is_the_least_squares_solution(step: str) -> None:
    W, stats = make()
    A = torch.linalg.svd(W)[0][:, :24].T @ W
    B, G = seen(W, stats.gram, A)
    places, z = pursue(B, G, 8)
    if step == "atoms":
        A = atoms_for(W, spread(places, z, 24), A)
    best = loss(W, stats, A, places, z)
    for seed in range(3):
        noise = torch.Generator().manual_seed(seed)
        if step == "atoms":
            moved = A + 0.02 * A.std() * torch.randn(A.shape, generator=noise)
            assert loss(W, stats, moved, places, z) > best
        else:
            moved = z + 0.02 * z.std() * torch.randn(z.shape, generator=noise)
            assert loss(W, stats, A, places, moved) > best


def test_the_largest_coefficients_are_the_best_of_orthogonal_atoms() -> None:
    B = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    places, z = pursue(B, torch.eye(16), 5)
    expected = B.abs().topk(5, dim=1).indices.sort(dim=1).values
    assert torch.equal(places, expected)
    assert torch.allclose(z, B.gather(1, places), rtol=1e-4)


def test_conjugate_gradients_find_what_the_normal_equations_do() -> None:
    g = torch.Generator().manual_seed(0)
    X, B = torch.randn(60, 12, generator=g), torch.randn(20, 12, generator=g)
    G = X.T @ X / 60
    mask = (torch.rand(20, 12, generator=g) < 0.5).float()
    Z = fit(B, G, mask, torch.zeros_like(B), 16)
    for row, b, own in zip(Z, B, mask.bool(), strict=True):
        expected = torch.linalg.solve(G[own][:, own], b[own])
        assert torch.allclose(row[own], expected, atol=1e-4) and not row[~own].any()


@pytest.mark.parametrize("apart", [0.0, 1e-5, 1e-4, 1e-3])
def test_coefficients_of_two_atoms_that_are_nearly_one_stay_finite(apart: float) -> None:
    g = torch.Generator().manual_seed(0)
    A, W = torch.randn(8, 24, generator=g), torch.randn(4000, 24, generator=g)
    twins = torch.cat([A, A[:1] + apart * torch.randn(1, 24, generator=g)])
    X = torch.randn(24, 24, generator=g) * torch.logspace(0, -3, 24)
    stats, losses = Stats(X @ X.T), []
    for atoms in (twins, A):
        places, z = pursue(*seen(W, stats.gram, atoms), len(atoms))
        assert bool(z.isfinite().all())
        losses.append(loss(W, stats, atoms, places, z))
    assert losses[0] <= losses[1] * (1 + 1e-5)  # one atom more is no worse


def test_unused_atoms_stay_as_they_were() -> None:
    W, _ = make()
    A, Z = torch.randn(6, 64), torch.randn(48, 6)
    Z[:, 2] = 0
    made = atoms_for(W, Z, A)
    assert torch.equal(made[2], A[2]) and not torch.equal(made[1], A[1])


def test_a_dictionary_loses_less_than_a_basis_of_the_same_bytes() -> None:
    W, stats = make((96, 64))
    level = "dict:bits=8,atoms=float16,values=float16"
    rank = int(compose.cost_bits(compose.normalize(level), (96, 64)) // (16 * (96 + 64)))
    assert error(level, W, stats) < 0.8 * error(f"lowrank:rank={rank}", W, stats)


def test_rounding_with_feedback_beats_rounding_each_value_by_itself() -> None:
    W, stats = make()
    A = learn(W, stats.gram, torch.linalg.svd(W)[0][:, :24].T @ W, 10, 2)
    B, G = seen(W, stats.gram, A)
    places, z = pursue(B, G, 10)
    codes, scales = round_values(G, places, z, 3)
    fed_back = loss(W, stats, A, places, (codes - 4) * scales[:, None])
    alone = unpack_factor("z", pack_factor("z", z, "int3"), 10, "int3")
    assert fed_back < 0.9 * loss(W, stats, A, places, alone)


def test_too_few_bits_name_those_that_suffice() -> None:
    with pytest.raises(ValueError, match=r"not one coefficient per row .* takes \d+\.\d\d bits"):
        compose.check_shape(compose.normalize("dict:bits=0.05"), (8, 16))
