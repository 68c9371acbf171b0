"""Scales and zero points of groups of weights: the grid that codes are rounded to.

w_hat = (q - zero) * scale with q in 0 .. maxq. Scales are rounded to the dtype they are stored
in before anything is quantised with them: what is scored is then exactly what ships.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rounding_loops

# Shrink grid and norm of the clip search. Where nothing is known of the inputs, 2.4 is a little
# better than 2 because it spares the large weights; a `weight` does that job itself.
CLIP_FACTORS = tuple(1.0 - 0.05 * k for k in range(11))
CLIP_NORM = 2.4


def find_grid(
    W: Tensor,
    maxq: float | Tensor,
    *,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    clip: bool = True,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (scale, zero), each (rows,) float32, of one group per row of W (rows, g).

    maxq is the largest code, 2**bits - 1: a number, or (rows,) to mix bit-widths. Asymmetric
    ranges include 0, so that the zero point is itself a code. With `clip` the range is the
    one of CLIP_FACTORS with the least sum of |w - w_hat|**2.4, or of weight * (w - w_hat)**2
    where a `weight` is given, which broadcasts against W. The scale is exact in `scale_dtype`
    and is neither 0 nor infinite.
    """
    low, high = W.amin(-1).clamp(max=0.0), W.amax(-1).clamp(min=0.0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    if not clip:
        return _grid(low, high, maxq, symmetric, scale_dtype)
    if weight is not None and weight.dim() == 1 and rounding_loops.serves(W.T):
        factors = torch.tensor(CLIP_FACTORS).unsqueeze(1)
        grids = _grid(low * factors, high * factors, maxq, symmetric, scale_dtype)
        limits = maxq if isinstance(maxq, Tensor) else torch.full_like(low, maxq)
        best = rounding_loops.least_error(W.T, *grids, limits, weight).unsqueeze(0)
        return grids[0].gather(0, best)[0], grids[1].gather(0, best)[0]
    work = torch.empty_like(W)
    scale, zero = _grid(low, high, maxq, symmetric, scale_dtype)
    least = _error(W, scale, zero, maxq, weight, work)
    for factor in CLIP_FACTORS[1:]:
        s, z = _grid(low * factor, high * factor, maxq, symmetric, scale_dtype)
        error = _error(W, s, z, maxq, weight, work)
        better = error < least  # ties keep the wider range
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def quantize(
    W: Tensor, scale: Tensor, zero: Tensor, maxq: float | Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Return the codes of W as whole float32 numbers in 0 .. maxq; arguments broadcast."""
    q = torch.div(W, scale, out=out).round_().add_(zero).clamp_(min=0.0)
    return q.clamp_(max=maxq) if isinstance(maxq, float) else torch.minimum(q, maxq, out=q)


def dequantize(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return (q - zero) * scale in float32; arguments broadcast."""
    return (q.float() - zero) * scale


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `scale` float32 rounded to `dtype`, kept off 0 and infinity.

    A scale below the smallest number of `dtype` becomes that number: its weights, smaller
    still, round to 0. One above the largest saturates.
    """
    info, single = torch.finfo(dtype), torch.finfo(torch.float32)
    smallest = max(info.smallest_normal * info.eps, single.smallest_normal)
    return scale.clamp(max=info.max).to(dtype).float().clamp(min=smallest)


def _grid(
    low: Tensor, high: Tensor, maxq: float | Tensor, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    span = high - low
    # An all-zero group takes scale 1: any scale gives back its zeros.
    scale = round_scale(torch.where(span > 0, span / maxq, torch.ones_like(span)), dtype)
    if symmetric:
        return scale, (torch.zeros_like(scale) + maxq + 1) / 2
    zero = torch.round(-low / scale).clamp(min=0.0)
    return scale, torch.minimum(zero, torch.zeros_like(zero) + maxq)


def _error(
    W: Tensor,
    scale: Tensor,
    zero: Tensor,
    maxq: float | Tensor,
    weight: Tensor | None,
    work: Tensor,
) -> Tensor:
    """Return the error (rows,) of one grid; `work` like W is overwritten (saves page faults)."""
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    limit = maxq if isinstance(maxq, float) else maxq.unsqueeze(-1)
    quantize(W, scale, zero, limit, out=work).sub_(zero).mul_(scale).sub_(W).abs_()
    return (work.pow_(CLIP_NORM) if weight is None else work.square_().mul_(weight)).sum(-1)
