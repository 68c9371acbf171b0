"""Triton: products with sparse weights, a mask and the kept values or codes, and their rows.

A program walks through its rows from left to right and counts the kept weights that it has
passed: with `starts`, before which kept weight each row begins, that says where a value lies.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_grids import code_at, grid_at
from .triton_tiles import finish, multiply, nothing, rows_of, write


@triton.jit
def kept_of(  # type: ignore[no-untyped-def]
    places, table, row, column, is_there, octets, M: tl.constexpr, NUMBER_BITS: tl.constexpr
):
    """Return 1 where a weight is kept, else 0, int32 (BN, BK).

    places: a packed mask, or with a table, packed numbers of the masks of M columns each.
    """
    base = places + row.to(tl.int64)[:, None] * (NUMBER_BITS * octets)
    if table is None:
        kept = code_at(base, column[None, :], is_there, octets, 1)
    else:
        number = code_at(base, (column // M)[None, :], is_there, octets, NUMBER_BITS)
        place = table + number * M + (column % M)[None, :]
        kept = tl.load(place, mask=is_there, other=0).to(tl.int32)
    return kept


@triton.jit
def passed_by(starts, row, is_row, row_kept):  # type: ignore[no-untyped-def]
    """Return before which kept weight rows begin: as many in each row, where starts is None."""
    if starts is None:
        passed = row * row_kept
    else:
        passed = tl.load(starts + row, mask=is_row, other=0)
    return passed


@triton.jit
def weights_of(  # type: ignore[no-untyped-def]
    values, scales, zeros, row, column, kept, index, code_octets, zero_octets, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Return the weights (BN, BK) float32 of which `kept` says that they are the index-th."""
    is_kept = kept != 0
    if BITS == 16:
        w = tl.load(values + index, mask=is_kept, other=0.0).to(tl.float32)
    else:
        q = code_at(values, index, is_kept, code_octets, BITS).to(tl.float32)
        at = row[:, None] * groups + (column // GROUP)[None, :]
        scale, zero = grid_at(scales, zeros, at, is_kept, zero_octets, BITS)
        w = tl.where(is_kept, (q - zero) * scale, 0.0)
    return w


@triton.jit
def add_up(  # type: ignore[no-untyped-def]
    x, places, table, starts, values, scales, zeros, row, is_row, token, tokens, n,
    octets, row_kept, code_octets, zero_octets, groups,
    M: tl.constexpr, NUMBER_BITS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return the sums of x W^T for BN rows of W and BM tokens, as `finish` takes them."""
    passed = passed_by(starts, row, is_row, row_kept)
    sums = nothing(ONE, BM, BN, BK)
    for j0 in range(0, n, BK):
        column = j0 + tl.arange(0, BK)
        is_there = is_row[:, None] & (column < n)[None, :]
        kept = kept_of(places, table, row, column, is_there, octets, M, NUMBER_BITS)
        index = passed[:, None] + tl.cumsum(kept, 1) - kept
        w = weights_of(
            values, scales, zeros, row, column, kept, index, code_octets, zero_octets, groups,
            BITS, GROUP,
        )  # fmt: skip
        passed += tl.sum(kept, 1)
        sums = multiply(sums, w, x, token, tokens, column, column < n, n, ONE, EXACT)
    return sums


@triton.jit
def product(  # type: ignore[no-untyped-def]
    x, places, table, starts, values, scales, zeros, start, bias, order, y,
    tokens, rows, n, width, octets, row_kept, code_octets, zero_octets, groups,
    M: tl.constexpr, NUMBER_BITS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write x W^T + start + bias to y for BN rows of W and BM tokens."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    sums = add_up(
        x, places, table, starts, values, scales, zeros, row, row < rows, token, tokens, n,
        octets, row_kept, code_octets, zero_octets, groups,
        M, NUMBER_BITS, BITS, GROUP, ONE, EXACT, BM, BN, BK,
    )  # fmt: skip
    finish(sums, y, start, bias, order, row, rows, token, tokens, width, ONE)


@triton.jit
def unpack(  # type: ignore[no-untyped-def]
    places, table, starts, values, scales, zeros, ids, y,
    first, rows, all_rows, n, octets, row_kept, code_octets, zero_octets, groups,
    M: tl.constexpr, NUMBER_BITS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write rows of W, those that ids names or from `first` on, to y (rows, n)."""
    out, row, is_row = rows_of(ids, first, rows, all_rows, BN)
    passed = passed_by(starts, row, is_row, row_kept)
    for j0 in range(0, n, BK):
        column = j0 + tl.arange(0, BK)
        is_there = is_row[:, None] & (column < n)[None, :]
        kept = kept_of(places, table, row, column, is_there, octets, M, NUMBER_BITS)
        index = passed[:, None] + tl.cumsum(kept, 1) - kept
        w = weights_of(
            values, scales, zeros, row, column, kept, index, code_octets, zero_octets, groups,
            BITS, GROUP,
        )  # fmt: skip
        passed += tl.sum(kept, 1)
        write(w, y, out, rows, is_row, column, column < n, n)


@triton.jit
def count_of(places, row, rows, width, BN: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return how many weights rows of a packed mask (rows, width) keep, int32 (BN,)."""
    base = places + row.to(tl.int64)[:, None] * width
    total = tl.zeros((BN, BK), dtype=tl.int32)
    for j0 in range(0, width, BK):
        column = j0 + tl.arange(0, BK)
        is_there = (row < rows)[:, None] & (column < width)[None, :]
        b = tl.load(base + column[None, :], mask=is_there, other=0).to(tl.int32)
        b -= (b >> 1) & 0x55
        b = (b & 0x33) + ((b >> 2) & 0x33)
        total += (b + (b >> 4)) & 0x0F
    return tl.sum(total, 1)


@triton.jit
def count(places, counts, rows, width, BN: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write how many weights each row of a packed mask (rows, width) keeps, int32."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(counts + row, count_of(places, row, rows, width, BN, BK), mask=row < rows)
