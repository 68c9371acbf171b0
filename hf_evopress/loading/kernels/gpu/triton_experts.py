"""Triton: products with the matrices of many experts in one launch, each token with its own.

A program has BN rows of one expert's matrix and up to BM of its tokens. Where tensors lie is in
`addresses`, int64 (experts, 5): codes or values; scales; zero points; bias; the mask of sparse
weights, or the starts of walks. 0 stands for what there is not: all of an expert whose matrix is of
another kind. `tiles` int32 (programs, 3) says which expert a program has, and its tokens, from the
first to the last of the expert; expert -1 for none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import triton_codes, triton_floats, triton_sparse, triton_walks
from .triton_tiles import finish

codes_of, floats_of = triton_codes.add_up, triton_floats.add_up
sparse_of, walks_of = triton_sparse.add_up, triton_walks.add_up
count_of = triton_sparse.count_of


@triton.jit
def place_of(addresses, expert, which: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the address of an expert's tensor as a pointer to numbers of a kind, None: none."""
    if KIND is None:
        place = None
    else:
        address = tl.load(addresses + 5 * expert + which)
        place = tl.multiple_of(address, 16).to(tl.pointer_type(KIND))
    return place


@triton.jit
def tile_of(tiles, addresses):  # type: ignore[no-untyped-def]
    """Return this program's expert, -1 for none, its first token and the end of the expert's."""
    tile = tiles + 3 * tl.program_id(1)
    expert, first, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if tl.load(addresses + 5 * tl.maximum(expert, 0)) == 0:
        expert = -1
    return expert, first, end


@triton.jit
def row_of(table, token, width, ONE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return where the row of one token begins; for more tokens the table, None for None."""
    if ONE and table is not None:
        table += token.to(tl.int64) * width
    return table


@triton.jit
def finish_tile(  # type: ignore[no-untyped-def]
    sums, y, start, addresses, order, expert, row, rows, token, first, end, width,
    BIAS: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Write sums + start + bias to y (tokens, width); order (experts, rows) as in `finish`."""
    if order is not None:
        order += expert * rows
    y, start = row_of(y, first, width, ONE), row_of(start, first, width, ONE)
    bias = place_of(addresses, expert, 3, BIAS)
    finish(sums, y, start, bias, order, row, rows, token, end, width, ONE)


@triton.jit
def codes(  # type: ignore[no-untyped-def]
    x, addresses, tiles, start, order, y, rows, n, width, octets, zero_octets, groups,
    SCALE: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, PARTS: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write x W^T + start + bias to y (tokens, width), for matrices of codes."""
    expert, first, end = tile_of(tiles, addresses)
    if expert < 0:
        return
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = first + tl.arange(0, BM)
    sums = codes_of(
        row_of(x, first, n, ONE), place_of(addresses, expert, 0, tl.uint8),
        place_of(addresses, expert, 1, SCALE), place_of(addresses, expert, 2, ZERO),
        row, row < rows, token, end, n, octets, zero_octets, groups,
        BITS, GROUP, ALIGNED, WIDE, WHOLE, PARTS, ONE, EXACT, BM, BN, BK,
    )  # fmt: skip
    finish_tile(
        sums, y, start, addresses, order, expert, row, rows, token, first, end, width, BIAS, ONE
    )


@triton.jit
def floats(  # type: ignore[no-untyped-def]
    x, addresses, tiles, start, order, y, rows, n, width,
    VALUE: tl.constexpr, BIAS: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write x W^T + start + bias to y (tokens, width), for factors of low-rank terms."""
    expert, first, end = tile_of(tiles, addresses)
    if expert < 0:
        return
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = first + tl.arange(0, BM)
    sums = floats_of(
        row_of(x, first, n, ONE), place_of(addresses, expert, 0, VALUE),
        row, row < rows, token, end, n, ONE, EXACT, BM, BN, BK,
    )  # fmt: skip
    finish_tile(
        sums, y, start, addresses, order, expert, row, rows, token, first, end, width, BIAS, ONE
    )


@triton.jit
def sparse(  # type: ignore[no-untyped-def]
    x, addresses, tiles, table, starts, start, order, y, rows, n, width,
    octets, row_kept, code_octets, zero_octets, groups,
    VALUE: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr,
    M: tl.constexpr, NUMBER_BITS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write x W^T + start + bias to y (tokens, width), for sparse weights.

    starts (experts, rows) int32: before which kept weight each row begins, None where each row
    keeps as many.
    """
    expert, first, end = tile_of(tiles, addresses)
    if expert < 0:
        return
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = first + tl.arange(0, BM)
    if starts is not None:
        starts += expert * rows
    sums = sparse_of(
        row_of(x, first, n, ONE), place_of(addresses, expert, 4, tl.uint8), table, starts,
        place_of(addresses, expert, 0, VALUE), place_of(addresses, expert, 1, SCALE),
        place_of(addresses, expert, 2, ZERO), row, row < rows, token, end, n,
        octets, row_kept, code_octets, zero_octets, groups,
        M, NUMBER_BITS, BITS, GROUP, ONE, EXACT, BM, BN, BK,
    )  # fmt: skip
    finish_tile(
        sums, y, start, addresses, order, expert, row, rows, token, first, end, width, BIAS, ONE
    )


@triton.jit
def count(addresses, counts, rows, width, BN: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write how many weights each row of each expert's mask keeps, int32 (experts, rows)."""
    expert, row = tl.program_id(1), tl.program_id(0) * BN + tl.arange(0, BN)
    if tl.load(addresses + 5 * expert) == 0:
        return
    kept = count_of(place_of(addresses, expert, 4, tl.uint8), row, rows, width, BN, BK)
    tl.store(counts + expert * rows + row, kept, mask=row < rows)


@triton.jit
def walks(  # type: ignore[no-untyped-def]
    x, addresses, tiles, table, start, order, y, rows, n, width, wide,
    START: tl.constexpr, BIAS: tl.constexpr,
    PAIR: tl.constexpr, L: tl.constexpr, BOOK: tl.constexpr, FACTOR: tl.constexpr,
    HALF: tl.constexpr, MMA: tl.constexpr, RUN: tl.constexpr,
    ONE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write x Y^T + start + bias to y (tokens, width), for trellis codes in their basis."""
    expert, first, end = tile_of(tiles, addresses)
    if expert < 0:
        return
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = first + tl.arange(0, BM)
    sums = walks_of(
        row_of(x, first, n, ONE), place_of(addresses, expert, 0, tl.uint8),
        place_of(addresses, expert, 4, START), table, tl.program_id(0) * BN, rows, token, end, n,
        wide, PAIR, L, BOOK, FACTOR, HALF, MMA, RUN, ONE, EXACT, BM, BN, BK,
    )  # fmt: skip
    finish_tile(
        sums, y, start, addresses, order, expert, row, rows, token, first, end, width, BIAS, ONE
    )
