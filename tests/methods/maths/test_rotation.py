"""Rotations: orthogonal, undone exactly enough, and the same numbers wherever they are made."""

from __future__ import annotations

import math

import pytest
import torch

from hf_evopress.methods.maths.hashing import signs
from hf_evopress.methods.maths.rotation import rotate, rotate_moment, unrotate

SIZES = [1, 2, 3, 7, 16, 24, 45, 96, 128, 576]


def matrix(n, seed):
    """Return (O_q kron H_p) diag(s) in float64, from its definition."""
    p = n & -n
    q = n // p
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < p:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    rows = [
        [math.cos(math.pi * (2 * k + 1) * j / (2 * q)) * math.sqrt((2 if j else 1) / q)]
        for j in range(q)
        for k in range(q)
    ]
    O = torch.tensor(rows, dtype=torch.float64).view(q, q)  # noqa: E741  the letter of the formula
    return torch.kron(O, H / math.sqrt(p)) * signs(n, seed).double()


@pytest.mark.parametrize("n", SIZES)
def test_a_rotation_is_its_formula(n):
    X = torch.randn(n, 5, generator=torch.Generator().manual_seed(n))
    expected = matrix(n, 3) @ X.double()
    assert torch.allclose(rotate(X, 3).double(), expected, atol=1e-5)


@pytest.mark.parametrize("n", SIZES)
def test_a_rotation_is_undone(n):
    X = torch.randn(n, 9, generator=torch.Generator().manual_seed(n))
    assert torch.allclose(unrotate(rotate(X, 1), 1), X, atol=3e-6)
    assert torch.allclose(rotate(unrotate(X, 1), 1), X, atol=3e-6)


def test_blocks_do_not_mix():
    X = torch.zeros(96, 1)
    X[40] = 1.0
    Y = rotate(X, 0, block=32)
    assert Y[32:64].abs().min() > 0.1 and Y.abs().sum() == Y[32:64].abs().sum()
    assert torch.allclose(unrotate(Y, 0, block=32), X, atol=1e-6)


def test_the_sums_do_not_depend_on_how_many_columns_there_are():
    """Bit for bit: a library's matrix product would sum in another order."""
    X = torch.randn(72, 400, generator=torch.Generator().manual_seed(0))
    whole = unrotate(X, 5)
    assert torch.equal(unrotate(X[:, 17:18], 5), whole[:, 17:18])
    assert torch.equal(unrotate(X[:, :33].T.contiguous().T, 5), whole[:, :33])


def test_a_second_moment_is_that_of_rotated_inputs():
    X = torch.randn(500, 24, generator=torch.Generator().manual_seed(0))
    turned = rotate(X.T.contiguous(), 2)
    assert torch.allclose(rotate_moment(X.T @ X, 2), turned @ turned.T, atol=2e-3)


def test_a_block_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="blocks of 32 does not fit 48"):
        rotate(torch.zeros(48, 1), 0, block=32)
