"""Triton: scales and zero points of groups, and single codes of packed rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def code_in(base, e, i, is_there, octets, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes int32 at place i of the eighth e of one packed row of 8 * octets codes."""
    if BITS == 8:
        code = tl.load(base + e * octets + i, mask=is_there, other=0).to(tl.int32)
    else:
        code = tl.zeros_like(i).to(tl.int32)
        if BITS & 4:
            place = base + (e & 3) * octets + i
            part = tl.load(place, mask=is_there, other=0).to(tl.int32)
            code += ((part >> (4 * (e >> 2))) & 15) << (BITS & 3)
        if BITS & 2:
            place = base + ((BITS & 4) + (e & 1)) * octets + i
            part = tl.load(place, mask=is_there, other=0).to(tl.int32)
            code += ((part >> (2 * (e >> 1))) & 3) << (BITS & 1)
        if BITS & 1:
            place = base + (BITS & 6) * octets + i
            part = tl.load(place, mask=is_there, other=0).to(tl.int32)
            code += (part >> e) & 1
    return code


@triton.jit
def code_at(base, index, is_there, octets, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes int32 at any places of one packed row of 8 * octets codes."""
    e = index // octets
    return code_in(base, e, index - e * octets, is_there, octets, BITS)


@triton.jit
def grid_at(scales, zeros, index, is_there, zero_octets, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return scale and zero point, float32, of groups numbered over all rows; 0 where masked."""
    scale = tl.load(scales + index, mask=is_there, other=0.0).to(tl.float32)
    if zeros is not None:
        zero = code_at(zeros, index, is_there, zero_octets, BITS).to(tl.float32)
    else:
        zero = tl.zeros_like(scale) + (1 << (BITS - 1))
    return scale, zero


@triton.jit
def row_grid(scales, zeros, row, group, zero_octets, groups, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return scale float32 and zero point int32 of groups of rows that are there.

    The zero points of a row are in one eighth: the number of rows is a multiple of 8.
    """
    first = row * groups
    scale = tl.load(scales + first + group).to(tl.float32)
    zero = tl.zeros_like(first + group) + (1 << (BITS - 1))
    if zeros is not None:
        e = first // zero_octets
        i = first - e * zero_octets + group
        zero = code_in(zeros, e, i, i >= 0, zero_octets, BITS)
    return scale, zero
