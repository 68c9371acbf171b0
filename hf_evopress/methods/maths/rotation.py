"""Rotations that make weights look Gaussian: random signs, Hadamard, and a DCT for odd factors.

Q = (O_q kron H_p) diag(s) for n = q p, p a power of two: s random signs, H_p the Walsh-Hadamard
matrix / sqrt(p), O_q the orthonormal DCT-II. Over a whole side p is the largest power of two in
n. In blocks of B, p is B and O_q the identity: blocks do not mix.

Everything runs along the first axis in O(n (log p + q)) per column, in float32, as sums of two
numbers in a fixed order and products of two: IEEE arithmetic leaves no choice, so the result is
the same, bit for bit, on every device (where a compiler does not fuse a product and a sum).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from .hashing import signs

WHOLE = 0  # block size that stands for the whole side
_CHUNK = 2**16  # numbers worked on at once: they stay in a CPU's cache


def rotate(X: Tensor, seed: int, block: int = WHOLE) -> Tensor:
    """Return Q X in float32, X (n, m)."""
    n, m = X.shape
    p, q = factors(n, block)
    Y = (X.float() * _signs(n, seed, X.device).unsqueeze(1)).contiguous()
    _hadamard_(Y.view(q, p, m))
    return _mix(Y, _dct(q, X.device)) if q > 1 and block == WHOLE else Y


def unrotate(X: Tensor, seed: int, block: int = WHOLE) -> Tensor:
    """Return Q^T X in float32, X (n, m): what undoes `rotate`."""
    n, m = X.shape
    p, q = factors(n, block)
    mixes = q > 1 and block == WHOLE
    Y = (
        _mix(X.float(), _dct(q, X.device).T)
        if mixes
        else X.float().clone(memory_format=torch.contiguous_format)
    )
    _hadamard_(Y.view(q, p, m))
    return Y.mul_(_signs(n, seed, X.device).unsqueeze(1))


def rotate_moment(H: Tensor, seed: int, block: int = WHOLE) -> Tensor:
    """Return Q H Q^T, symmetric (n, n) float32: a second moment in the rotated basis."""
    H = rotate(rotate(H, seed, block).T.contiguous(), seed, block)
    return (H + H.T) / 2


def factors(n: int, block: int = WHOLE) -> tuple[int, int]:
    """Return (p, q) with n = p q: the Hadamard's size, and the odd factor or number of blocks."""
    if block == WHOLE:
        p = n & -n
        return p, n // p
    if block & (block - 1) or n % block:
        raise ValueError(f"a rotation in blocks of {block} does not fit {n}")
    return block, n // block


def _hadamard_(X: Tensor) -> None:
    """Multiply X (q, p, m), contiguous, by H_p along its second axis, in place."""
    q, p, m = X.shape
    for columns in X.split(max(1, _CHUNK // (p * m)) if X.device.type == "cpu" else q):
        size = 1
        while size < p:
            pairs = columns.view(-1, 2, size * m)
            a, b = pairs[:, 0], pairs[:, 1]
            difference = a - b
            a.add_(b)
            b.copy_(difference)
            size *= 2
        columns.mul_(1 / math.sqrt(p))


def _mix(X: Tensor, D: Tensor) -> Tensor:
    """Return (D kron I) X for X (q p, m), D (q, q): sums in the order of D's columns."""
    q = D.shape[0]
    flat = X.reshape(q, -1)
    result = torch.empty_like(flat)
    width = max(1, _CHUNK // q) if X.device.type == "cpu" else flat.shape[1]
    for part, total in zip(flat.split(width, 1), result.split(width, 1), strict=True):
        torch.mul(D[:, :1], part[:1], out=total)
        product = torch.empty_like(total)
        for k in range(1, q):
            torch.mul(D[:, k : k + 1], part[k : k + 1], out=product)
            total.add_(product)
    return result.view(X.shape)


@lru_cache(maxsize=64)
def _signs(n: int, seed: int, device: torch.device) -> Tensor:
    return signs(n, seed).to(device)


@lru_cache(maxsize=64)
def _dct(q: int, device: torch.device) -> Tensor:
    """Return the orthonormal DCT-II, (q, q): sqrt((1 + [j > 0]) / q) cos(pi (2 k + 1) j / 2q)."""
    j = torch.arange(q, dtype=torch.float64).unsqueeze(1)
    k = torch.arange(q, dtype=torch.float64)
    D = torch.cos(math.pi * (2 * k + 1) * j / (2 * q)) * math.sqrt(2 / q)
    D[0] = 1 / math.sqrt(q)
    return D.float().to(device)
