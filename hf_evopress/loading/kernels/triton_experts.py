"""Triton: products with the matrices of many experts in one launch, each token with its own.

A program has BN rows of one expert's matrix and up to BM of its tokens. Where tensors lie is in
`addresses`, int64 (experts, 4): codes or values, scales, zero points, bias; 0 for an expert whose
matrix is of another kind. `tiles` int32 (programs, 3) says which expert a program has, and its
tokens, from the first to the last of the expert; expert -1 for none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import triton_codes, triton_floats
from .triton_tiles import finish

codes_of, floats_of = triton_codes.add_up, triton_floats.add_up


@triton.jit
def place_of(addresses, expert, which: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the address of an expert's tensor as a pointer to numbers of a kind."""
    return tl.multiple_of(tl.load(addresses + 4 * expert + which), 16).to(tl.pointer_type(KIND))


@triton.jit
def bias_of(addresses, expert, BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    if BIAS is None:
        bias = None
    else:
        bias = place_of(addresses, expert, 3, BIAS)
    return bias


@triton.jit
def codes(  # type: ignore[no-untyped-def]
    x, addresses, tiles, start, y, rows, n, octets, zero_octets, groups,
    SCALE: tl.constexpr, HAS_ZEROS: tl.constexpr, BIAS: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write x W^T + start + bias to y (tokens, rows), for matrices of codes."""
    tile = tiles + 3 * tl.program_id(1)
    expert, first, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if expert < 0:
        return
    if tl.load(addresses + 4 * expert) == 0:
        return
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = first + tl.arange(0, BM)
    if ONE:
        x += first.to(tl.int64) * n
        y += first.to(tl.int64) * rows
        if start is not None:
            start += first.to(tl.int64) * rows
    if HAS_ZEROS:
        zeros = place_of(addresses, expert, 2, tl.uint8)
    else:
        zeros = None
    sums = codes_of(
        x, place_of(addresses, expert, 0, tl.uint8), place_of(addresses, expert, 1, SCALE), zeros,
        row, row < rows, token, end, n, octets, zero_octets, groups,
        BITS, GROUP, ALIGNED, ONE, EXACT, BM, BN, BK,
    )  # fmt: skip
    bias = bias_of(addresses, expert, BIAS)
    finish(sums, y, start, bias, None, row, rows, token, end, rows, ONE)


@triton.jit
def floats(  # type: ignore[no-untyped-def]
    x, addresses, tiles, start, y, rows, n, VALUE: tl.constexpr, BIAS: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write x W^T + start + bias to y (tokens, rows), for factors of low-rank terms."""
    tile = tiles + 3 * tl.program_id(1)
    expert, first, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if expert < 0:
        return
    if tl.load(addresses + 4 * expert) == 0:
        return
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = first + tl.arange(0, BM)
    if ONE:
        x += first.to(tl.int64) * n
        y += first.to(tl.int64) * rows
        if start is not None:
            start += first.to(tl.int64) * rows
    values = place_of(addresses, expert, 0, VALUE)
    sums = floats_of(x, values, row, row < rows, token, end, n, ONE, EXACT, BM, BN, BK)
    bias = bias_of(addresses, expert, BIAS)
    finish(sums, y, start, bias, None, row, rows, token, end, rows, ONE)
