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
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...base.lasting import lasting
from .hashing import signs

CPU = torch.device("cpu")
WHOLE = 0  # block size that stands for the whole side
_CHUNK = 2**17  # numbers worked on at once: they stay in a CPU's cache


def rotate(X: Tensor, seed: int, block: int = WHOLE) -> Tensor:
    """Return Q X in float32, X (n, m)."""
    p, q = factors(len(X), block)
    sign = _signs(len(X), seed, X.device).unsqueeze(1)

    def turned(X: Tensor) -> Tensor:
        Y = (X.float() * sign).contiguous()
        _hadamard_(Y.view(q, p, -1))
        return _mix(Y, _dct(q, X.device)) if q > 1 and block == WHOLE else Y

    return _by_columns(X, turned)


def unrotate(X: Tensor, seed: int, block: int = WHOLE) -> Tensor:
    """Return Q^T X in float32, X (n, m): what undoes `rotate`."""
    p, q = factors(len(X), block)
    sign = _signs(len(X), seed, X.device).unsqueeze(1)

    def turned(X: Tensor) -> Tensor:
        mixes = q > 1 and block == WHOLE
        # a copy in any case: the rest works in place
        Y = _mix(X.float(), _dct(q, X.device).T) if mixes else torch.mul(X, 1.0).float()
        Y = Y.contiguous()
        _hadamard_(Y.view(q, p, -1))
        return Y.mul_(sign)

    return _by_columns(X, turned)


def rotate_moment(H: Tensor, seed: int, block: int = WHOLE) -> Tensor:
    """Return Q H Q^T, symmetric (n, n) float32: a second moment in the rotated basis."""
    H = rotate(rotate(H, seed, block).T.contiguous(), seed, block)
    return (H + H.T) / 2


@dataclass(frozen=True)
class Parts:
    """What Q (n, n) is made of, n = q p: signs (n,), and what mixes its q parts, if any.

    matrix: the DCT-II (q, q). Its tensors are kept for this process.
    """

    p: int
    q: int
    signs: Tensor
    matrix: Tensor | None


@lru_cache(maxsize=64)
def parts(n: int, seed: int, block: int = WHOLE, device: torch.device = CPU) -> Parts:
    """Return the parts of Q, for kernels that rotate by themselves."""
    p, q = factors(n, block)
    mixes = q > 1 and block == WHOLE
    return Parts(p, q, _signs(n, seed, device), _dct(q, device) if mixes else None)


def factors(n: int, block: int = WHOLE) -> tuple[int, int]:
    """Return (p, q) with n = p q: the Hadamard's size, and the odd factor or number of blocks."""
    if block == WHOLE:
        p = n & -n
        return p, n // p
    if block & (block - 1) or n % block:
        raise ValueError(f"a rotation in blocks of {block} does not fit {n}")
    return block, n // block


def _by_columns(X: Tensor, turned: Callable[[Tensor], Tensor]) -> Tensor:
    """Return turned(X), on a CPU made of as many columns at a time as stay in its cache."""
    width = max(16, _CHUNK // len(X))
    if X.device.type != "cpu" or X.shape[1] <= width:
        return turned(X)
    result = torch.empty(X.shape, dtype=torch.float32)
    for part, into in zip(X.split(width, 1), result.split(width, 1), strict=True):
        into.copy_(turned(part))
    return result


def _hadamard_(X: Tensor) -> None:
    """Multiply X (q, p, m), contiguous, by H_p along its second axis, in place."""
    _, p, m = X.shape
    size = 1
    while size < p:
        pairs = X.view(-1, 2, size * m)
        a, b = pairs[:, 0], pairs[:, 1]
        difference = a - b
        a.add_(b)
        b.copy_(difference)
        size *= 2
    X.mul_(1 / math.sqrt(p))


def _mix(X: Tensor, D: Tensor) -> Tensor:
    """Return (D kron I) X for X (q p, m), D (q, q): sums in the order of D's columns."""
    q = len(D)
    flat = X.reshape(q, -1)
    total = D[:, :1] * flat[:1]
    product = torch.empty_like(total)
    for k in range(1, q):
        torch.mul(D[:, k : k + 1], flat[k : k + 1], out=product)
        total.add_(product)
    return total.view(X.shape)


@lru_cache(maxsize=None)  # a CUDA graph reads them where they were
@lasting
def _signs(n: int, seed: int, device: torch.device) -> Tensor:
    return signs(n, seed).to(device)


@lru_cache(maxsize=None)
@lasting
def _dct(q: int, device: torch.device) -> Tensor:
    """Return the orthonormal DCT-II, (q, q): sqrt((1 + [j > 0]) / q) cos(pi (2 k + 1) j / 2q)."""
    j = torch.arange(q, dtype=torch.float64).unsqueeze(1)
    k = torch.arange(q, dtype=torch.float64)
    D = torch.cos(math.pi * (2 * k + 1) * j / (2 * q)) * math.sqrt(2 / q)
    D[0] = 1 / math.sqrt(q)
    return D.float().contiguous().to(device)
