"""Two-sided rounding: its factors, its order, and that it minimises what it says it does."""

from __future__ import annotations

import pytest
import torch

from hf_evopress.methods.maths.two_sided import TILE, Weight, block_factor, round_in_step

SIZES = [(48, 80), (16, 16), (20, 35), (3, 50), (40, 7)]


def moment(n, seed):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(3 * n, n, generator=g) @ (
        torch.randn(n, n, generator=g) / n**0.5 + 0.3 * torch.eye(n)
    )
    return X.T @ X / (3 * n)


def coarse(x):
    return (x * 2).round() / 2


def rounded(W, M, N):
    """Return W rounded to halves tile by tile."""
    weight, Y = Weight(W, M, N), None
    Y = torch.full((weight.rows, weight.columns, TILE, TILE), float("nan"))
    step = 0

    def rounder(targets):
        nonlocal step
        Y[weight.places(step)] = coarse(targets[0])
        step += 1
        return [coarse(targets[0])]

    round_in_step([weight], rounder)
    return Y.transpose(1, 2).reshape(weight.W.shape)[: W.shape[0], : W.shape[1]]


def one_by_one(W, M, N):
    """Return the same by the definition: a tile at a time, in float64."""
    rows, columns = (-(-n // TILE) * TILE for n in W.shape)
    full = torch.zeros(rows, columns, dtype=torch.float64)
    full[: W.shape[0], : W.shape[1]] = W
    M, N = M.double(), torch.eye(rows, dtype=torch.float64) if N is None else N.double()
    Y, T = torch.zeros_like(full), torch.zeros_like(full)
    for r in range(0, rows, TILE):
        own = slice(r, r + TILE)
        T[own] = full[own] + N.T[own, :r] @ (full[:r] - Y[:r])
        for c in range(columns - TILE, -1, -TILE):
            tile = slice(c, c + TILE)
            right = slice(c + TILE, columns)
            target = T[own, tile] + (T[own, right] - Y[own, right]) @ M[right, tile]
            Y[own, tile] = coarse(target)
    return Y[: W.shape[0], : W.shape[1]]


def loss(d, H, G):
    return float(((G @ d) * (d @ H)).sum())


@pytest.mark.parametrize("n", [5, 16, 40, 64])
@pytest.mark.parametrize("upper", [False, True])
def test_factors_multiply_to_the_damped_moment(n, upper):
    H = moment(n, 1)
    M = block_factor(H, 0.1, upper=upper).double()
    size = len(M)
    assert size == n + -n % TILE
    tiles = M.view(size // TILE, TILE, size // TILE, TILE).transpose(1, 2)
    for i in range(size // TILE):
        assert torch.allclose(tiles[i, i], torch.eye(TILE).double())
        for j in range(i):
            assert not (tiles[i, j] if upper else tiles[j, i]).any()
    damped = H.double() + 0.1 * H.double().diagonal().mean() * torch.eye(n)
    inverse = torch.linalg.inv(M[:n, :n])
    D = inverse @ damped @ inverse.T  # block-diagonal
    D = torch.nn.functional.pad(D, (0, size - n, 0, size - n))
    blocks = D.view(size // TILE, TILE, size // TILE, TILE).transpose(1, 2)
    for i in range(size // TILE):
        for j in range(size // TILE):
            assert i == j or blocks[i, j].abs().max() < 1e-4


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("sides", [1, 2])
def test_tiles_are_rounded_as_the_definition_says(shape, sides):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    M = block_factor(moment(shape[1], 1), 0.05)
    N = block_factor(moment(shape[0], 2), 0.05, upper=True) if sides == 2 else None
    got, expected = rounded(W, M, N), one_by_one(W, M, N)
    # float32 against float64 turns a tie now and then, and what follows
    assert (got == expected.float()).float().mean() > 0.9
    H, G = moment(shape[1], 1), moment(shape[0], 2)
    a, b = (loss(W - Y.float(), H, G) for Y in (got, expected))
    assert a == pytest.approx(b, rel=0.05)


def test_feedback_lowers_the_loss_it_is_for():
    W = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    H, G = moment(96, 1), moment(64, 2)
    M, N = block_factor(H, 0.01), block_factor(G, 0.01, upper=True)
    plain, one, two = W - coarse(W), W - rounded(W, M, None), W - rounded(W, M, N)
    identity = torch.eye(64)
    assert loss(one, H, identity) < 0.9 * loss(plain, H, identity)
    assert loss(two, H, G) < 0.95 * loss(one, H, G) < 0.9 * loss(plain, H, G)


def test_weights_in_step_are_rounded_as_if_alone():
    g = torch.Generator().manual_seed(0)
    M = block_factor(moment(40, 1), 0.05)
    N = block_factor(moment(48, 2), 0.05, upper=True)
    weights = [
        Weight(torch.randn(48, 40, generator=g), M, N),
        Weight(torch.randn(16, 40, generator=g), M, None),
    ]
    kept = [torch.zeros(w.rows, w.columns, TILE, TILE) for w in weights]
    step = 0

    def rounder(targets):
        nonlocal step
        for weight, Y, x in zip(weights, kept, targets, strict=True):
            if len(x):
                Y[weight.places(step)] = coarse(x)
        step += 1
        return [coarse(x) for x in targets]

    round_in_step(weights, rounder)
    for weight, Y, N_ in zip(weights, kept, (N, None), strict=True):
        whole = Y.transpose(1, 2).reshape(weight.W.shape)[:, :40]
        assert torch.equal(whole, rounded(weight.W[:, :40], M, N_))


def test_a_moment_of_one_token_is_damped_until_it_factorises():
    x = torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    assert block_factor(x.T @ x, 0.0).isfinite().all()
    assert torch.equal(block_factor(torch.zeros(20, 20), 0.03), torch.eye(32))


def test_a_moment_with_nan_is_refused():
    with pytest.raises(ValueError, match="probably contains inf or NaN"):
        block_factor(torch.full((16, 16), float("nan")), 0.03)
