"""Triton: products with the factors of a low-rank term in 16 bits, and their rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import finish, multiply, nothing, rows_of, write


@triton.jit
def add_up(  # type: ignore[no-untyped-def]
    x, values, row, is_row, token, tokens, n,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return the sums of x W^T for BN rows of W and BM tokens, as `finish` takes them."""
    base = values + row.to(tl.int64)[:, None] * n
    sums = nothing(ONE, BM, BN, BK)
    for j0 in range(0, n, BK):
        column = j0 + tl.arange(0, BK)
        is_there = is_row[:, None] & (column < n)[None, :]
        w = tl.load(base + column[None, :], mask=is_there, other=0.0).to(tl.float32)
        sums = multiply(sums, w, x, token, tokens, column, column < n, n, ONE, EXACT)
    return sums


@triton.jit
def product(  # type: ignore[no-untyped-def]
    x, values, start, bias, order, y, tokens, rows, n, width,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write x W^T + start + bias to y for BN rows of W and BM tokens."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    sums = add_up(x, values, row, row < rows, token, tokens, n, ONE, EXACT, BM, BN, BK)
    finish(sums, y, start, bias, order, row, rows, token, tokens, width, ONE)


@triton.jit
def unpack(  # type: ignore[no-untyped-def]
    values, ids, y, first, rows, all_rows, n, BN: tl.constexpr, BK: tl.constexpr
):
    """Write rows of W, those that ids names or from `first` on, to y (rows, n)."""
    out, row, is_there = rows_of(ids, first, rows, all_rows, BN)
    column = tl.program_id(1) * BK + tl.arange(0, BK)
    at = values + row.to(tl.int64)[:, None] * n + column[None, :]
    w = tl.load(at, mask=is_there[:, None] & (column < n)[None, :], other=0.0).to(tl.float32)
    write(w, y, out, rows, is_there, column, column < n, n)
