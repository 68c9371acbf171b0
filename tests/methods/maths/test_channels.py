"""Columns that a weight can spare: the least-squares fit to the outputs of all."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from hf_evopress.methods.maths.channels import fewer_columns


def problem(n: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    X = torch.randn(300, n) @ torch.randn(n, n)
    return torch.randn(7, n), X, X.T @ X / len(X)


def error(W: Tensor, X: Tensor, kept: Tensor, values: Tensor) -> float:
    return float((X @ W.T - X[:, kept] @ values.T).square().mean())


def test_the_values_are_the_least_squares_fit() -> None:
    W, X, H = problem()
    kept, values = fewer_columns(W, H, 8, damp=0)
    best = torch.linalg.lstsq(X[:, kept], X @ W.T).solution.T
    assert torch.allclose(values, best, atol=1e-4)


def test_one_column_less_is_the_best_of_all() -> None:
    W, X, H = problem()
    errors = {}
    for some in combinations(range(12), 11):
        values = torch.linalg.lstsq(X[:, list(some)], X @ W.T).solution.T
        errors[some] = error(W, X, torch.tensor(some), values)
    kept, _ = fewer_columns(W, H, 11, damp=0)
    assert tuple(kept.tolist()) == min(errors, key=errors.__getitem__)


def test_columns_go_one_after_the_other_and_not_by_their_first_cost() -> None:
    W, X, H = problem(64)
    kept, values = fewer_columns(W, H, 32, damp=0)
    cost = W.square().sum(0) / torch.linalg.inv(H).diagonal()
    at_once = cost.topk(32).indices.sort().values
    fitted = torch.linalg.lstsq(X[:, at_once], X @ W.T).solution.T
    assert error(W, X, kept, values) < 0.95 * error(W, X, at_once, fitted)


def test_inputs_that_are_never_on_go_first() -> None:
    W, X, _ = problem()
    X[:, ::2] = 0
    kept, values = fewer_columns(W, X.T @ X / len(X), 6)
    assert kept.tolist() == [1, 3, 5, 7, 9, 11]
    assert error(W, X, kept, values) < 1e-2
    kept, values = fewer_columns(W, torch.zeros(12, 12), 6)
    assert torch.isfinite(values).all()


@pytest.mark.parametrize("keep", [0, 13])
def test_a_number_of_columns_that_is_none_is_refused(keep: int) -> None:
    W, _, H = problem()
    with pytest.raises(ValueError, match=f"keeps 1 to 12 of them, got {keep}"):
        fewer_columns(W, H, keep)
