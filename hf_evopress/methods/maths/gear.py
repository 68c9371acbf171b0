"""Keys and values as codes, a low-rank term and outliers: X ~ Q_b(X - S) + L + S.

Kang et al. 2024 (arXiv:2403.05527). S, the largest and the smallest values of each vector (a
channel of keys over the tokens of a chunk, a token of values over all heads), is stored as it is;
its places take the vector's mean before rounding. Q_b is asymmetric rounding in groups: along
tokens for keys, whose channels differ in scale, and along channels for values. L is a term of low
rank, per head, near the best for what rounding left, by power iteration. The number of steps is
2^b - 1 for every b (the published code takes b^2 - 1, which is right for 2 and 4 bits only).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .packing import PLANES, pack, packed_bytes, unpack

State = dict[str, Tensor]

DENSE_BITS = 16  # and more: stored as they come
ITERATIONS = 2
HALF_BYTES = 2
_LARGE = 6e4  # beyond, float16 overflows


@dataclass(frozen=True)
class Gear:
    """How the keys and values of one layer are stored.

    bits: of a code; 16 stores them as they come. group_size: codes that share a scale and a
    minimum. rank: of the low-rank term, 0 for none. outliers: share of each vector that is kept,
    0 for none. buffer: tokens, a multiple of group_size, that wait until they are compressed.
    """

    bits: int = 4
    group_size: int = 64
    rank: int = 4
    outliers: float = 0.02
    buffer: int = 64

    def __post_init__(self) -> None:
        if self.bits not in PLANES and self.bits != DENSE_BITS:
            raise ValueError(
                f"a cache takes {min(PLANES)} to {max(PLANES)} bits, or {DENSE_BITS} for none "
                f"compressed; got bits={self.bits}"
            )
        if self.group_size < 8 or self.group_size % 8:
            raise ValueError(f"group_size is a multiple of 8, got {self.group_size}")
        if self.buffer < 1 or self.buffer % self.group_size:
            raise ValueError(
                f"buffer is a multiple of group_size={self.group_size}, got {self.buffer}"
            )
        if self.rank < 0:
            raise ValueError(f"rank is 0 or more, got {self.rank}")
        if not 0 <= self.outliers < 0.5:
            raise ValueError(f"outliers is a share from 0 to below 0.5, got {self.outliers}")

    @property
    def is_dense(self) -> bool:
        return self.bits >= DENSE_BITS


def compress(X: Tensor, gear: Gear, *, is_key: bool) -> State:
    """Return the state of a chunk X (batch, heads, tokens, channels); batch comes first in all.

    Of keys, tokens is a multiple of group_size. Rows are channels of keys and tokens of values.
    """
    rows = (X.mT if is_key else X).float()
    state: State = {}
    n_out = n_outliers(gear, rows.shape, is_key=is_key)
    if n_out:
        vectors = _vectors(rows, is_key)
        index = torch.cat(
            [vectors.topk(n_out, -1).indices, vectors.topk(n_out, -1, largest=False).indices], -1
        )
        half = X.dtype if X.element_size() == HALF_BYTES else _half(rows)
        state["outliers"] = vectors.gather(-1, index).to(half)
        mean = vectors.mean(-1, keepdim=True).expand(index.shape)
        rows = _rows(vectors.scatter(-1, index, mean), rows.shape, is_key)
        state["places"] = index.to(_index_dtype(vectors.shape[-1]))
    codes, scales, lows = _round(rows, gear)
    state |= {"codes": pack(codes, gear.bits), "scales": scales, "lows": lows}
    if rank := rank_of(gear, rows.shape):
        left = rows - _on_grid(codes, scales, lows)
        if n_out:
            vectors = _vectors(left, is_key).scatter(-1, index, 0.0)
            left = _rows(vectors, rows.shape, is_key)
        state["P"], state["Q"] = (t.to(_half(t)) for t in _low_rank(left, rank))
    return state


def decompress(
    state: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype, gear: Gear, *, is_key: bool
) -> Tensor:
    """Return the chunk (batch, heads, tokens, channels) that a state stands for."""
    n = shape[-2] if is_key else shape[-1]
    rows = _on_grid(unpack(state["codes"], gear.bits, n), state["scales"], state["lows"])
    if "P" in state:
        rows = rows + state["P"].float() @ state["Q"].float().mT
    if "places" in state:
        vectors = _vectors(rows, is_key)
        values = state["outliers"].to(vectors.dtype)
        vectors = vectors.scatter(-1, _places(state["places"]), values)
        rows = _rows(vectors, rows.shape, is_key)
    return (rows.mT if is_key else rows).to(dtype)


def chunk_bytes(shape: torch.Size | tuple[int, ...], gear: Gear, *, is_key: bool) -> int:
    """Return the bytes that the state of a chunk (batch, heads, tokens, channels) takes."""
    batch, heads, tokens, channels = shape
    n_rows, n = (channels, tokens) if is_key else (tokens, channels)
    rows = torch.Size((batch, heads, n_rows, n))
    per_row = packed_bytes(n, gear.bits) + 2 * HALF_BYTES * (n // group_of(gear, n))
    total = batch * heads * n_rows * per_row
    if n_out := n_outliers(gear, rows, is_key=is_key):
        length = n if is_key else heads * n
        n_vectors = batch * heads * n_rows * n // length
        total += n_vectors * 2 * n_out * (HALF_BYTES + _index_dtype(length).itemsize)
    return total + batch * heads * (n_rows + n) * rank_of(gear, rows) * HALF_BYTES


def group_of(gear: Gear, n: int) -> int:
    """Return the group size for rows of n: the largest divisor of n up to the one asked for."""
    return next(g for g in range(min(gear.group_size, n), 0, -1) if n % g == 0)


def rank_of(gear: Gear, rows: torch.Size) -> int:
    """Return the rank of the low-rank term; 0 where the matrix is too small for one."""
    return gear.rank if gear.rank < min(rows[-2:]) else 0


def n_outliers(gear: Gear, rows: torch.Size, *, is_key: bool) -> int:
    """Return how many of the largest, and of the smallest, values of each vector are kept."""
    if not gear.outliers:
        return 0
    length = rows[-1] if is_key else rows[1] * rows[-1]
    return min(max(1, round(gear.outliers * length / 2)), length // 4)


def _round(rows: Tensor, gear: Gear) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (..., n) uint8, scales and minima (..., groups); rounded with what is stored."""
    groups = rows.unflatten(-1, (-1, group_of(gear, rows.shape[-1])))
    half, steps = _half(rows), 2**gear.bits - 1
    lows = groups.amin(-1).to(half)
    scales = ((groups.amax(-1) - lows.float()) / steps).to(half)
    divisors = torch.where(scales > 0, scales.float(), 1.0)[..., None]
    codes = ((groups - lows.float()[..., None]) / divisors).round().clamp(0, steps)
    return codes.to(torch.uint8).flatten(-2), scales, lows


def _on_grid(codes: Tensor, scales: Tensor, lows: Tensor) -> Tensor:
    groups = codes.unflatten(-1, (scales.shape[-1], -1)).float()
    return torch.addcmul(lows.float()[..., None], groups, scales.float()[..., None]).flatten(-2)


def _low_rank(E: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return P (..., rows, rank) and Q (..., n, rank) with P Q^T near the best of that rank."""
    generator = torch.Generator().manual_seed(0)  # the same start for every chunk
    Q = (
        torch.randn(E.shape[-1], rank, generator=generator)
        .to(E.device)
        .expand(*E.shape[:-2], -1, -1)
    )
    for _ in range(ITERATIONS):
        P = torch.linalg.qr(E @ Q).Q
        Q = E.mT @ P
    return P, Q


def _vectors(rows: Tensor, is_key: bool) -> Tensor:
    """Return what outliers are sought along: channels of keys, tokens of values over all heads."""
    return rows if is_key else rows.transpose(1, 2).flatten(-2)


def _rows(vectors: Tensor, shape: torch.Size, is_key: bool) -> Tensor:
    return vectors if is_key else vectors.unflatten(-1, (shape[1], -1)).transpose(1, 2)


def _half(X: Tensor) -> torch.dtype:
    return torch.float16 if float(X.abs().amax()) < _LARGE else torch.bfloat16


def _index_dtype(length: int) -> torch.dtype:
    return torch.uint8 if length <= 2**8 else torch.int16 if length <= 2**15 else torch.int32


def _places(index: Tensor) -> Tensor:
    return index.to(torch.int64)
