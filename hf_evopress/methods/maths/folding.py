"""RANDOMFOLD: n weights that share m values, each value used floor(n / m) or ceil(n / m) times.

A weight's flat index p lies in partition k = p div m, at place j = p mod m of it, and

    W.flat[p] = g(p) psi[f(p)],   f(p) = (j + o_k) mod m

so that each partition is psi, rotated by its own o_k = hash32(hashes(k, seed)) mod m, times signs
g(p), the top bit of hashes(p, seed) (`hashing`). Partition 0 is psi as it is: o_0 = 0, no signs.
With m = n that is all of W. STABLE-RPS (Desai and Shrivastava 2023, arXiv:2310.11611) maps
partitions by random hashes; rotations take no index per weight, and sums over a value's uses are
sums of slices, in the same order on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...base.lasting import lasting
from .hashing import hash32, hashes, signs

_PIECE = 2**20  # signs made at once: a hash needs tens of bytes per index


def n_values(n: int, share: float) -> int:
    """Return m, the number of values that n weights share: `share` of n, at least 1."""
    return min(n, max(1, round(share * n)))


class Unfolded(torch.autograd.Function):
    """scale * W.flat (n,) of psi (m,); its gradient is the sum over a value's uses.

    With `mean`, that of the paper: divided by uses * scale^2. Then a step of gradient descent moves
    a weight by the mean of its sharers' gradients, whatever m and scale are.
    """

    @staticmethod
    def forward(ctx: Any, psi: Tensor, n: int, seed: int, scale: float, mean: bool) -> Tensor:
        ctx.how = (len(psi), seed, scale, mean)
        return unfold(psi * scale, n, seed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        m, seed, scale, mean = ctx.how
        (G,) = gradients
        if mean:
            made = signed_mean(G, m, seed, torch.float32) / scale
        else:
            made = _signed_sum(G, m, seed, torch.float32) * scale
        return made.to(G.dtype), None, None, None, None


def unfold(psi: Tensor, n: int, seed: int) -> Tensor:
    """Return W.flat (n,) of psi (m,), in its dtype."""
    m = len(psi)
    flat = torch.cat([part for o in _offsets(n, m, seed) for part in (psi[o:], psi[:o])])[:n]
    return torch.cat([flat[:m], flat[m:] * _signs(n, seed, psi.device)[m:]]) if m < n else flat


def signed_mean(flat: Tensor, m: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return psi (m,) with the least squares of W.flat (n,) - unfold(psi), in `dtype`.

    In float64 the mean of equal numbers of 32 bits is that number.
    """
    return _signed_sum(flat, m, seed, dtype) / uses(len(flat), m, seed, flat.device)


def uses(n: int, m: int, seed: int, device: torch.device | None = None) -> Tensor:
    """Return how many of n weights use each value, (m,) float32: floor(n / m) or ceil(n / m)."""
    count = torch.full((m,), float(n // m), device=device)
    for _, start, into in _slices(n, m, seed):
        if start >= n - n % m:
            count[into] += 1
    return count


def _signed_sum(flat: Tensor, m: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Return the sum of g(p) W.flat[p] over the p of each value, (m,) in `dtype`."""
    total = torch.zeros(m, dtype=dtype, device=flat.device)
    for size, start, into in _slices(len(flat), m, seed):
        part = flat[start : start + size].to(dtype)
        if start >= m:
            part = part * _signs(len(flat), seed, flat.device)[start : start + size]
        total[into] += part
    return total


def _slices(n: int, m: int, seed: int) -> Iterator[tuple[int, int, slice]]:
    """Yield size and start of each slice of W.flat, and the slice of psi that it uses."""
    for k, offset in enumerate(_offsets(n, m, seed)):
        size = min(m, n - k * m)
        first = min(size, m - offset)
        yield first, k * m, slice(offset, offset + first)
        if size > first:
            yield size - first, k * m + first, slice(0, size - first)


@lru_cache(maxsize=256)
def _offsets(n: int, m: int, seed: int) -> list[int]:
    """Return o_k of all partitions."""
    k = torch.arange(-(-n // m), dtype=torch.int64, device="cpu")
    return [0, *(hash32(hashes(k, seed)) % m).tolist()[1:]]


@lru_cache(maxsize=16)
@lasting
def _signs(n: int, seed: int, device: torch.device) -> Tensor:
    """Return the signs of n indices, (n,) int8: a byte per weight, once for all layers of n."""
    cpu = torch.device("cpu")  # whatever device tensors are made on by default
    made = torch.empty(n, dtype=torch.int8, device=cpu)
    for start in range(0, n, _PIECE):
        size = min(_PIECE, n - start)
        made[start : start + size] = signs(size, seed, start=start, device=cpu).to(torch.int8)
    return made.to(device)
