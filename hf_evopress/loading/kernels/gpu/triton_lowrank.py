"""Triton: a packed matrix and a low-rank term beside it, x W^T + (x A^T) B^T, in one kernel.

x A^T comes from a kernel of its own, as every program needs all of it; its product with B is added
up where that with W is, and nothing of the sum goes through memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_codes import add_up as codes_up
from .triton_floats import add_up as floats_up
from .triton_sparse import add_up as sparse_up
from .triton_tiles import finish


@triton.jit
def factor_up(  # type: ignore[no-untyped-def]
    narrow, factor, factor_scales, factor_zeros, row, is_row, token, tokens, rank,
    factor_octets, factor_zero_octets, factor_groups,
    FACTOR_BITS: tl.constexpr, FACTOR_GROUP: tl.constexpr, FACTOR_WIDE: tl.constexpr,
    ONE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return the sums of (x A^T) B^T, narrow (tokens, rank) float32 being x A^T."""
    if FACTOR_BITS == 16:
        sums = floats_up(narrow, factor, row, is_row, token, tokens, rank, ONE, True, BM, BN, BK)
    else:
        sums = codes_up(
            narrow, factor, factor_scales, factor_zeros, row, is_row, token, tokens, rank,
            factor_octets, factor_zero_octets, factor_groups,
            FACTOR_BITS, FACTOR_GROUP, False, FACTOR_WIDE, False, 1, ONE, True, BM, BN, BK,
        )  # fmt: skip
    return sums


@triton.jit
def both(sums, term, ONE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the sums of both; those of one token may be of different widths."""
    if ONE:
        sums, term = tl.sum(sums, 1)[:, None], tl.sum(term, 1)[:, None]
    return sums + term


@triton.jit
def product_codes(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, narrow, factor, factor_scales, factor_zeros, bias, y,
    tokens, rows, n, octets, zero_octets, groups,
    rank, factor_octets, factor_zero_octets, factor_groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, PARTS: tl.constexpr,
    FACTOR_BITS: tl.constexpr, FACTOR_GROUP: tl.constexpr, FACTOR_WIDE: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write x W^T + (x A^T) B^T + bias to y (tokens, rows), W of codes."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    sums = codes_up(
        x, codes, scales, zeros, row, row < rows, token, tokens, n, octets, zero_octets, groups,
        BITS, GROUP, ALIGNED, WIDE, WHOLE, PARTS, ONE, EXACT, BM, BN, BK,
    )  # fmt: skip
    term = factor_up(
        narrow, factor, factor_scales, factor_zeros, row, row < rows, token, tokens, rank,
        factor_octets, factor_zero_octets, factor_groups,
        FACTOR_BITS, FACTOR_GROUP, FACTOR_WIDE, ONE, BM, BN, BK,
    )  # fmt: skip
    sums = both(sums, term, ONE)
    finish(sums, y, None, bias, None, row, rows, token, tokens, rows, ONE)


@triton.jit
def product_sparse(  # type: ignore[no-untyped-def]
    x, places, table, starts, values, scales, zeros,
    narrow, factor, factor_scales, factor_zeros, bias, y,
    tokens, rows, n, octets, row_kept, code_octets, zero_octets, groups,
    rank, factor_octets, factor_zero_octets, factor_groups,
    M: tl.constexpr, NUMBER_BITS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    FACTOR_BITS: tl.constexpr, FACTOR_GROUP: tl.constexpr, FACTOR_WIDE: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write x W^T + (x A^T) B^T + bias to y (tokens, rows), W sparse."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    sums = sparse_up(
        x, places, table, starts, values, scales, zeros, row, row < rows, token, tokens, n,
        octets, row_kept, code_octets, zero_octets, groups,
        M, NUMBER_BITS, BITS, GROUP, ONE, EXACT, BM, BN, BK,
    )  # fmt: skip
    term = factor_up(
        narrow, factor, factor_scales, factor_zeros, row, row < rows, token, tokens, rank,
        factor_octets, factor_zero_octets, factor_groups,
        FACTOR_BITS, FACTOR_GROUP, FACTOR_WIDE, ONE, BM, BN, BK,
    )  # fmt: skip
    sums = both(sums, term, ONE)
    finish(sums, y, None, bias, None, row, rows, token, tokens, rows, ONE)
