"""Triton: one token times packed codes, four codes of a word at a time.

For codes of up to 7 bits, where rows are WHOLE (triton_codes.py) and activations have 16 bits.
A code becomes the number 1 + code / 2^BITS: it is put where a float32 has the first bits of its
mantissa, by a shift and one operation of logic. Activations are added up beside the products, and
what is not the code's, the one and the zero point, is taken off for four weights at once.

A program has BN rows, every eighth of them in another thread, and PARTS parts of BK places at
once, each for other threads: all read other bytes, and an activation serves BN / 8 weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_grids import row_grid


@triton.jit
def moved(word, BY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return words shifted to higher bits, or to lower ones for BY < 0."""
    if BY >= 0:
        word = word << BY
    else:
        word = word >> -BY
    return word


@triton.jit
def plane(base, number, j, words, FROM: tl.constexpr, TO: tl.constexpr, MASK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return bits MASK of words of a plane's eighth `number`, moved from bit FROM to TO."""
    part = tl.load(base + number * words + j)
    return moved(part, TO - FROM) & ((MASK << TO) & 0xFFFFFFFF)


@triton.jit
def codes_of(base, j, words, E: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes of words j of the eighth E of rows, the first of 7 bits in each byte."""
    TO: tl.constexpr = 7 - BITS
    code = tl.zeros_like(j).to(tl.uint32)
    if BITS & 4:
        code |= plane(base, E % 4, j, words, E // 4 * 4, TO + (BITS & 3), 0x0F0F0F0F)
    if BITS & 2:
        number = (BITS & 4) + E % 2
        code |= plane(base, number, j, words, E // 2 * 2, TO + (BITS & 1), 0x03030303)
    if BITS & 1:
        code |= plane(base, BITS & 6, j, words, E, TO, 0x01010101)
    return code


@triton.jit
def number_of(code, one, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return 1 + the byte B of words / 128, float32; `one` has the bits of 1."""
    return ((moved(code, 16 - 8 * B) & 0x007F0000) | one).to(tl.float32, bitcast=True)


@triton.jit
def two_of(pair, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the two numbers of 16 bits in words, float32."""
    if KIND.is_bf16():
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        low = pair.to(tl.uint16).to(KIND, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.uint16).to(KIND, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def add_up_fours(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, row, octets, zero_octets, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return the sums (BN, 1) of x W^T for rows of W that are all there."""
    WORDS: tl.constexpr = BK // 4
    words = octets // 4
    # of no number that the compiler knows: else it takes two operations for a mask and a one
    one = ((groups & -2147483648) | 0x3F800000).to(tl.uint32, bitcast=True)
    row = tl.reshape(row, (BN // 8, 1, 8))
    base = codes.to(tl.pointer_type(tl.uint32)) + row.to(tl.int64)[:, :, :, None] * (BITS * words)
    fours = x.to(tl.pointer_type(tl.uint64))
    sums = tl.zeros((BN // 8, PARTS, 8, WORDS), dtype=tl.float32)
    for i0 in range(0, octets, PARTS * BK):
        i = (i0 + BK * tl.arange(0, PARTS))[None, :, None]
        is_part = (i < octets)[:, :, :, None]
        i = tl.minimum(i, octets - BK)
        j = (i // 4)[:, :, :, None] + tl.arange(0, WORDS)[None, None, None, :]
        for E in tl.static_range(8):
            four = tl.load(fours + E * words + j, mask=is_part, other=0)
            v0, v1 = two_of(four.to(tl.uint32), x.dtype.element_ty)
            v2, v3 = two_of((four >> 32).to(tl.uint32), x.dtype.element_ty)
            code = codes_of(base, j, words, E, BITS)
            some = number_of(code, one, 0) * v0
            some += number_of(code, one, 1) * v1
            some += number_of(code, one, 2) * v2
            some += number_of(code, one, 3) * v3
            group = (E * octets + i) // GROUP
            scale, zero = row_grid(scales, zeros, row, group, zero_octets, groups, BITS)
            zero = ((zero.to(tl.uint32) << (23 - BITS)) | one).to(tl.float32, bitcast=True)
            sums += some * scale[:, :, :, None]
            sums -= ((v0 + v1) + (v2 + v3)) * (scale * zero)[:, :, :, None]
    return tl.reshape(tl.sum(tl.sum(sums, 3), 1), (BN, 1)) * (1 << BITS)
