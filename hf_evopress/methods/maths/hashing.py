"""Pseudo-random numbers with a formula, so that they are the same on every machine for ever."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: sets streams of one seed apart


def hash32(x: Tensor) -> Tensor:
    """Return a bijective hash of x, integers modulo 2^32, as int64 below 2^32.

    x ^= x >> 16; x *= 0x7FEB352D; x ^= x >> 15; x *= 0x846CA68B; x ^= x >> 16
    ("lowbias32" of C. Wellons' hash prospector).
    """
    x = x.to(torch.int64) & _MASK
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def hashes(index: Tensor, seed: int) -> Tensor:
    """Return hash32(index + 0x9E3779B9 * (seed + 1)), integers below 2^32 as int64."""
    return hash32(index + (_GOLDEN * (seed + 1) & _MASK))


def signs(n: int, seed: int, *, start: int = 0, device: torch.device | None = None) -> Tensor:
    """Return n signs, +1 or -1 float32: that of index i is the top bit of
    hash32(i + 0x9E3779B9 * (seed + 1)), i from `start` on."""
    index = torch.arange(start, start + n, dtype=torch.int64, device=device)
    return 1.0 - 2.0 * (hashes(index, seed) >> 31).float()


def permutation(n: int) -> Tensor:
    """Return the rank of hash32(i) among all i < n, (n,) int64: a fixed disorder of 0 .. n-1."""
    return hash32(torch.arange(n, dtype=torch.int64)).argsort().argsort()
