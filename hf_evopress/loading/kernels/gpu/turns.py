"""Rotations of activations on a GPU, one launch each: PyTorch needs three for each butterfly."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ....methods.maths.rotation import parts, rotate, unrotate
from .launch import launch
from .matrix import power_above

FAMILY = "turns"
SIZE, MOST = 2048, 2**15  # numbers of a program: of several short parts, and at most
MOST_MIXED = 64  # parts of all tokens that programs mix themselves; more are a product of matrices
OF_WARP = 512  # numbers


def turned(
    x: Tensor,
    seed: int,
    block: int,
    dtype: torch.dtype,
    *,
    is_back: bool,
    scales: Tensor | None = None,
    start: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the rows of x (tokens, n) rotated, or rotated back, in `dtype`.

    scales: of all tokens, (n,) or (1,), or of each, (tokens, n) or (tokens, 1): multiplied with
    before a rotation, and after one back. start (tokens, n) float32 and bias, (n,) or (tokens, n),
    are added after one back.
    """
    tokens, n = x.shape
    Q = parts(n, seed, block, x.device)
    if Q.p > MOST:
        turn = unrotate if is_back else rotate
        own = x if is_back or scales is None else x * scales
        own = turn(own.T, seed, block).T
        own = scaled(own, dtype, scales=scales if is_back else None, start=start, bias=bias)
        return own.contiguous()
    D, is_apart = Q.matrix, Q.q * tokens > MOST_MIXED
    if D is not None and is_apart and is_back:
        x = _mixed(D.T, x)
    mixes_after = D is not None and is_apart and not is_back
    x, y = x.contiguous(), x.new_empty(x.shape, dtype=torch.float32 if mixes_after else dtype)
    mix = None if is_apart else D
    sides = 1 if mix is not None else min(max(1, SIZE // Q.p), power_above(Q.q))
    given = {
        **{"x": x, "signs": Q.signs, "scales": scales, "mix": mix, "start": start, "bias": bias},
        **{"y": y, "n": n, "q": Q.q, "mix_to": 1 if is_back else Q.q},
        **{"mix_from": Q.q if is_back else 1, "factor": 1 / math.sqrt(Q.p)},
        "scale_token": 0 if scales is None or scales.dim() == 1 else scales.shape[1],
        "scale_at": 0 if scales is None or scales.shape[-1] == 1 else 1,
        "bias_token": 0 if bias is None or bias.dim() == 1 else n,
        **{"SIDES": sides, "P": Q.p, "STEPS": Q.p.bit_length() - 1, "IS_BACK": is_back},
        "num_warps": min(16, power_above(max(1, sides * Q.p // OF_WARP))),
    }
    if y.numel():
        launch(FAMILY, "turn", (tokens, -(-Q.q // sides)), x.device, given)  # the second: < 65536
    return _mixed(D, y).to(dtype) if D is not None and mixes_after else y


def scaled(
    x: Tensor,
    dtype: torch.dtype,
    *,
    scales: Tensor | None = None,
    start: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return x times scales, float32, + start + bias, in `dtype`: `turned` without a rotation."""
    y = x if scales is None else x.float() * scales
    for more in (start, bias):
        y = y if more is None else y + more
    return y.to(dtype)


def _mixed(D: Tensor, x: Tensor) -> Tensor:
    """Return (D kron I) x of each row, float32; D (q, q)."""
    return torch.matmul(D, x.float().view(len(x), len(D), -1)).view(x.shape)
