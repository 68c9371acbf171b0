"""Triton: rotations of activations (methods/maths/rotation.py), each in one launch.

Q = (O_q kron H_p) diag(signs). A program has SIDES parts of P numbers of one token: it multiplies
by scales, mixes the q parts where they mix, and goes through the butterflies of the Hadamard matrix
in the order of the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hadamard(x, SIZE: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return x (SIZE,) float32, each 2^STEPS of them times the Walsh-Hadamard matrix."""
    for S in tl.static_range(STEPS):
        pairs = tl.reshape(x, (SIZE // (2 << S), 2, 1 << S))
        a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (SIZE,))
    return x


@triton.jit
def scaled(x, scales, token, at, is_there, scale_token, scale_at):  # type: ignore[no-untyped-def]
    """Return x times its scales, which lie `scale_token` and `scale_at` apart (0: one for all)."""
    if scales is not None:
        place = scales + token.to(tl.int64) * scale_token + at * scale_at
        x = x * tl.load(place, mask=is_there, other=0.0).to(tl.float32)
    return x


@triton.jit
def turn(  # type: ignore[no-untyped-def]
    x, signs, scales, mix, start, bias, y, n, q, mix_to, mix_from,
    scale_token, scale_at, bias_token, factor,
    SIDES: tl.constexpr, P: tl.constexpr, STEPS: tl.constexpr, IS_BACK: tl.constexpr,
):  # fmt: skip
    """Write Q (scales x) to y (tokens, n), or with IS_BACK scales (Q^T x) + start + bias.

    mix: O (q, q), or its transpose by the strides mix_to and mix_from; None where parts do not mix
    here. factor: 1 / sqrt(p).
    """
    token, part = tl.program_id(0), tl.program_id(1)
    row = token.to(tl.int64) * n
    inner = tl.arange(0, SIDES * P)
    at = part * (SIDES * P) + inner
    is_there = at < n
    if mix is None:
        own = tl.load(x + row + at, mask=is_there, other=0.0).to(tl.float32)
        if not IS_BACK:
            own = scaled(own, scales, token, at, is_there, scale_token, scale_at)
            own = own * tl.load(signs + at, mask=is_there, other=0.0)
    else:
        own = tl.zeros((SIDES * P,), dtype=tl.float32)
        for j in range(q):
            other = j * P + inner
            some = tl.load(x + row + other).to(tl.float32)
            if not IS_BACK:
                some = scaled(some, scales, token, other, is_there, scale_token, scale_at)
                some = some * tl.load(signs + other)
            own += tl.load(mix + part * mix_to + j * mix_from) * some
    own = hadamard(own, SIDES * P, STEPS) * factor
    if IS_BACK:
        own = own * tl.load(signs + at, mask=is_there, other=0.0)
        own = scaled(own, scales, token, at, is_there, scale_token, scale_at)
        if start is not None:
            own += tl.load(start + row + at, mask=is_there, other=0.0)
        if bias is not None:
            place = bias + token.to(tl.int64) * bias_token + at
            own += tl.load(place, mask=is_there, other=0.0).to(tl.float32)
    tl.store(y + row + at, own.to(y.dtype.element_ty), mask=is_there)
