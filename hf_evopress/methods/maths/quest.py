"""QuEST's quantiser: the step of least squares for Gaussian rows, and a gradient that is trusted.

Rows are rotated (`rotation`), which makes them nearly Gaussian, and rounded to 2^b values that lie
symmetrically about 0 without being it (mid-rise),

    x_q = (floor(clip(x) / s) + 1/2) s,   s = 2 c_b rms(x) / (2^b - 1)

with c_b, in standard deviations, where the largest value lies. The gradient passes where |x_q - x|
<= s / 2 and is 0 elsewhere, so that clipped values do not see it. Panferov et al. 2025
(arXiv:2502.05003), section 3 and algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .grid import round_scale
from .rotation import rotate, unrotate

CLIP = {2: 1.494, 3: 2.051, 4: 2.514, 5: 2.916, 6: 3.277, 8: 3.885}


def step_of_rows(X: Tensor, bits: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return the step (..., 1) float32 of each row of X (..., n), exact in `dtype` where given."""
    rms = X.float().square().mean(-1, keepdim=True).sqrt()
    step = 2 * CLIP[bits] * rms / (2**bits - 1)
    if dtype is not None:
        return round_scale(step, dtype)
    return step.clamp(min=torch.finfo(torch.float32).tiny)


def codes_of(X: Tensor, step: Tensor, bits: int) -> Tensor:
    """Return the codes of X, whole float32 numbers in 0 .. 2^bits - 1."""
    half = 2 ** (bits - 1)
    return (X.float() / step).floor_().add_(half).clamp_(0, 2 * half - 1)


def values_of(q: Tensor, step: Tensor, bits: int) -> Tensor:
    """Return what codes stand for, float32."""
    return (q.float() - (2 ** (bits - 1) - 0.5)) * step


class Trusted(torch.autograd.Function):
    """X rounded by steps (..., 1); its gradient where the error is at most half a step."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, step: Tensor, bits: int) -> Tensor:
        made = values_of(codes_of(X, step, bits), step, bits)
        # a value in the middle of two has an error of s / 2, up to rounding
        ctx.save_for_backward((made - X.float()).abs() <= 0.5001 * step)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (trusted,) = ctx.saved_tensors
        return gradients[0] * trusted, None, None


class RotatedRows(torch.autograd.Function):
    """Q x for each row x of X (..., n), or Q^T x with `back`; float32, orthogonal, so its own
    gradient is the way back."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, seed: int, block: int, back: bool) -> Tensor:
        ctx.how, ctx.dtype = (seed, block, back), X.dtype
        return _turned(X, seed, block, back)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        seed, block, back = ctx.how
        return _turned(gradients[0], seed, block, not back).to(ctx.dtype), None, None, None


def _turned(X: Tensor, seed: int, block: int, back: bool) -> Tensor:
    turn = unrotate if back else rotate
    flat = X.reshape(-1, X.shape[-1])
    return turn(flat.T.contiguous(), seed, block).T.reshape(X.shape)
