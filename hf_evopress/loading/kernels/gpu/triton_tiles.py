"""What every Triton kernel ends with: a tile of weights times activations, and the output.

One token is multiplied and added up in float32, element by element, and summed at the end. More
tokens are a matrix product of tiles (tl.dot): weights are rounded to the dtype of the
activations, as `packed` rounds them, and sums are in float32. With EXACT, for float32 and for
Triton's interpreter, which has no bfloat16 products, the product itself is in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nothing(ONE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the sums before the first tile: (BN, BK) for one token, (BM, BN) for more."""
    if ONE:
        sums = tl.zeros((BN, BK), dtype=tl.float32)
    else:
        sums = tl.zeros((BM, BN), dtype=tl.float32)
    return sums


@triton.jit
def multiply(  # type: ignore[no-untyped-def]
    sums, w, x, token, tokens, column, is_column, n, ONE: tl.constexpr, EXACT: tl.constexpr
):
    """Return sums + x W^T for weights w (BN, BK) float32 of these columns.

    x (tokens, n), contiguous. Where is_column is false, w may be any finite number.
    """
    if ONE:
        v = tl.load(x + column, mask=is_column, other=0.0).to(tl.float32)
        sums += w * v[None, :]
    else:
        at = x + token.to(tl.int64)[:, None] * n + column[None, :]
        v = tl.load(at, mask=(token < tokens)[:, None] & is_column[None, :], other=0.0)
        W = tl.trans(w.to(v.dtype))
        if EXACT:
            sums = tl.dot(v.to(tl.float32), W.to(tl.float32), sums, input_precision="ieee")
        else:
            sums = tl.dot(v, W, sums)
    return sums


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    sums, y, start, bias, order, row, rows, token, tokens, width, ONE: tl.constexpr
):
    """Write sums + start + bias to y (tokens, width), in the dtype of y.

    start (tokens, width) float32 and bias (width,) are None where there is none; order (rows,)
    int32 says which outputs these rows are, None: those of the same number.
    """
    is_row = row < rows
    place = row
    if order is not None:
        place = tl.load(order + row, mask=is_row, other=0)
    added = tl.zeros_like(row).to(tl.float32)
    if bias is not None:
        added = tl.load(bias + place, mask=is_row, other=0.0).to(tl.float32)
    if ONE:
        total = tl.sum(sums, 1)
        if start is not None:
            total += tl.load(start + place, mask=is_row, other=0.0)
        total += added
        tl.store(y + place, total.to(y.dtype.element_ty), mask=is_row)
    else:
        at = token.to(tl.int64)[:, None] * width + place[None, :]
        is_there = (token < tokens)[:, None] & is_row[None, :]
        if start is not None:
            sums += tl.load(start + at, mask=is_there, other=0.0)
        sums += added[None, :]
        tl.store(y + at, sums.to(y.dtype.element_ty), mask=is_there)


@triton.jit
def rows_of(ids, first, rows, all_rows, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return this program's outputs (BN,), the rows that they are, and which of those exist.

    ids (rows,) int64 are the rows asked for; None: those from `first` on. A number that is no
    row's makes the row NaN.
    """
    out = tl.program_id(0) * BN + tl.arange(0, BN)
    if ids is not None:
        asked = tl.load(ids + out, mask=out < rows, other=0)
        is_there = (asked >= 0) & (asked < all_rows)
        row = asked.to(tl.int32)
    else:
        row = out + first
        is_there = row < all_rows
    return out, row, is_there


@triton.jit
def write(w, y, out, rows, is_there, column, is_column, n):  # type: ignore[no-untyped-def]
    """Write weights w (BN, BK) float32 to y (rows, n), in the dtype of y."""
    w = tl.where(is_there[:, None], w, float("nan"))
    at = y + out.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(at, w.to(y.dtype.element_ty), mask=(out < rows)[:, None] & is_column[None, :])
