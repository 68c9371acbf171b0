"""Decompositions on a matrix's own device, and on the CPU in float64 where one fails there.

A GPU's solvers give up on matrices that LAPACK takes, where values do not converge or rounding has
made a pivot negative. One line says where that happened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def eigh(M: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (n,), ascending, and eigenvectors (n, n) of a symmetric M."""
    values, vectors = _safely(lambda M: tuple(torch.linalg.eigh(M)), M)
    return values, vectors


def svd(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, k), S (k,) and Vt (k, n) of M (m, n), k the smaller of both."""
    U, S, Vt = _safely(lambda M: tuple(torch.linalg.svd(M, full_matrices=False)), M)
    return U, S, Vt


def singular_values(M: Tensor) -> Tensor:
    """Return the singular values of M, largest first."""
    return _safely(lambda M: (torch.linalg.svdvals(M),), M)[0]


def qr(M: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q and R of M."""
    Q, R = _safely(lambda M: tuple(torch.linalg.qr(M)), M)
    return Q, R


def least_squares(A: Tensor, B: Tensor) -> Tensor:
    """Return the X with the least |A X - B|."""
    return _safely(lambda A, B: (torch.linalg.lstsq(A, B).solution,), A, B)[0]


def cholesky(M: Tensor) -> Tensor:
    """Return lower L with L L^T = M, of one matrix or of a batch of them."""
    return _safely(lambda M: (torch.linalg.cholesky(M),), M)[0]


def cholesky_or_none(M: Tensor) -> Tensor | None:
    """Return lower L with L L^T = M, None where M is not positive definite."""
    try:
        return cholesky(M)
    except torch.linalg.LinAlgError:
        return None


def _safely(decompose: Callable[..., tuple[Tensor, ...]], *matrices: Tensor) -> tuple[Tensor, ...]:
    """Return what `decompose` makes of matrices, in their dtype and on their device."""
    first = matrices[0]
    try:
        return decompose(*matrices)
    except torch.linalg.LinAlgError as error:
        if first.device.type == "cpu" and first.dtype == torch.float64:
            raise
        why = str(error).partition("\n")[0]
        logger.warning("on the CPU in float64, as it failed on %s: %s", first.device, why)
    made = decompose(*(matrix.detach().cpu().double() for matrix in matrices))
    return tuple(tensor.to(first.device, first.dtype) for tensor in made)
