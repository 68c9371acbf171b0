"""Rotate rows of activations by the compiled kernel (turns.py)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ....methods.maths.rotation import Parts
from ..matrix import KINDS
from . import turns as J
from .compiled import compiled, scratch, threads_for

Job = ctypes.c_int64 * J.SIZE
WORK_OF_NUMBER = 16  # multiplications that take as long as one number's rotation


def rotate_rows(
    x: Tensor, parts: Parts, dtype: torch.dtype, scales: Tensor | None, is_back: bool
) -> Tensor:
    """Return the rows of x (tokens, n) on a CPU rotated, or rotated back, in `dtype`.

    scales: float32, of all or one per number, applied before a rotation and after one back.
    """
    tokens, n = x.shape
    x = x.contiguous()
    if scales is not None:
        scales = scales.float().contiguous()
        assert scales.shape in ((1,), (n,))
    out = torch.float32 if dtype == torch.float16 else dtype
    y = torch.empty(tokens, n, dtype=out, device="cpu")
    if not x.numel():
        return y.to(dtype)
    kernels, job = compiled(), Job()
    threads = min(tokens, threads_for(WORK_OF_NUMBER * tokens * n))
    job[J.TOKENS], job[J.Q], job[J.P] = tokens, parts.q, parts.p
    job[J.X], job[J.X_KIND] = x.data_ptr(), KINDS[x.dtype]
    job[J.Y], job[J.Y_KIND] = y.data_ptr(), KINDS[out]
    job[J.SIGNS], job[J.IS_BACK] = parts.signs.data_ptr(), is_back
    job[J.MATRIX] = 0 if parts.matrix is None else parts.matrix.data_ptr()
    if scales is not None:
        job[J.SCALES], job[J.N_SCALES] = scales.data_ptr(), scales.numel()
    job[J.THREADS], job[J.PARALLEL], job[J.WORK] = threads, kernels.parallel, kernels.turn_work
    job[J.OF_THREAD] = J.bytes_of_thread(n)
    job[J.ROOM] = scratch(threads * job[J.OF_THREAD])
    kernels.turn(ctypes.addressof(job))
    return y.to(dtype)
