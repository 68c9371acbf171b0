"""The loops of error feedback on a CPU: what `grid.py` and `obs.py` say, compiled by numba.

Inputs are rounded one after another, each a dozen small operations of PyTorch: of the time that
GPTQ took nine tenths went into calling them. Numbers are float32 in the same order but for sums
over a group and updates within it, so a code here and there differs from another device's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .threads import pool

TILE = 128  # weights of one input that are worked on at once: a group of 128 stays in the cache
LEAST = 2**21  # steps of a loop that are worth another thread
MOST = np.float32(1024.0)  # beyond any code, zero point included


def serves(W: Tensor) -> bool:
    """Return whether the loops work on W."""
    return W.device.type == "cpu" and W.dtype == torch.float32 and W.is_contiguous()


def least_error(W: Tensor, scales: Tensor, zeros: Tensor, maxq: Tensor, weight: Tensor) -> Tensor:
    """Return which of the grids (k, n) loses least of W (g, n): the first of equals, (n,) int64.

    Losses are sums of weight (g,) * (w - w_hat)^2.
    """
    best = torch.empty(W.shape[1], dtype=torch.int64)
    arrays = [x.contiguous().numpy() for x in (W, scales, zeros, maxq, weight.float(), best)]
    _shared(_compiled("choose_grids"), arrays, W.shape[1], len(scales) * W.shape[0])
    return best


def round_strip(
    W: Tensor, U: Tensor, scale: Tensor, zero: Tensor, maxq: Tensor, codes: Tensor, errors: Tensor
) -> None:
    """Round the inputs of W (g, n) to their grids (n,), one after another.

    The inputs not yet rounded absorb the error by U (g, g). W is consumed; codes (g, n) uint8 and
    errors (g, n) float32, those over U_ii, are written.
    """
    given = (W, U.contiguous(), scale.contiguous(), zero.contiguous(), maxq.contiguous())
    arrays = [x.numpy() for x in (*given, codes, errors)]
    _shared(_compiled("round_inputs"), arrays, W.shape[1], W.shape[0] ** 2)


def _shared(loop: Callable[..., None], arrays: list[Any], n: int, work: int) -> None:
    """Call loop(*arrays, first, last) for 0 .. n, on the threads that PyTorch would take."""
    threads = min(torch.get_num_threads(), 1 + n * work // LEAST)
    if threads == 1:
        loop(*arrays, 0, n)
        return
    step = -(-n // (threads * TILE)) * TILE
    parts = range(0, n, step)
    list(pool(threads).map(lambda low: loop(*arrays, low, min(low + step, n)), parts))


@lru_cache(maxsize=None)
def _compiled(name: str) -> Any:
    from numba import njit

    plain, options = _LOOPS[name], {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(plain)
    except RuntimeError:  # no folder to keep it in
        return njit(**options)(plain)


def _choose_grids(W, scales, zeros, maxq, weight, best, first, last):  # type: ignore[no-untyped-def]
    error, least = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for low in range(first, last, TILE):
        n = min(TILE, last - low)
        top, which = maxq[low : low + n], best[low : low + n]
        for k in range(scales.shape[0]):
            scale, zero = scales[k, low : low + n], zeros[k, low : low + n]
            for r in range(n):
                error[r] = np.float32(0.0)
            for i in range(W.shape[0]):
                w, factor = W[i, low : low + n], weight[i]
                for r in range(n):
                    q = np.rint(min(max(w[r] / scale[r], -MOST), MOST)) + zero[r]
                    q = min(max(q, np.float32(0.0)), top[r])
                    d = (q - zero[r]) * scale[r] - w[r]
                    error[r] += d * d * factor
            for r in range(n):
                if k == 0 or error[r] < least[r]:
                    least[r] = error[r]
                    which[r] = k


def _round_inputs(W, U, scales, zeros, maxq, codes, errors, first, last):  # type: ignore[no-untyped-def]
    for low in range(first, last, TILE):
        n = min(TILE, last - low)
        scale, zero, top = scales[low : low + n], zeros[low : low + n], maxq[low : low + n]
        for i in range(W.shape[0]):
            w, error, code = W[i, low : low + n], errors[i, low : low + n], codes[i, low : low + n]
            own = U[i, i]
            for r in range(n):
                q = np.rint(min(max(w[r] / scale[r], -MOST), MOST)) + zero[r]
                q = min(max(q, np.float32(0.0)), top[r])
                code[r] = np.uint8(q)
                error[r] = (w[r] - (q - zero[r]) * scale[r]) / own
            for k in range(i + 1, W.shape[0]):
                later, factor = W[k, low : low + n], U[i, k]
                for r in range(n):
                    later[r] -= factor * error[r]


_LOOPS = {"choose_grids": _choose_grids, "round_inputs": _round_inputs}
