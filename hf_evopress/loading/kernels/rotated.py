"""A trellis-coded matrix: its walks are read as they are, and the activations are rotated instead.

W = s Q_o^T Y Q_i (methods/trellis.py): W x is Q_o^T (Y (Q_i x)) s, and rotations take n log n.
Scales of rows and columns stand outside of the rotations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...methods.maths.rotation import parts
from ...methods.maths.trellis_rounding import block_of
from . import task as T
from .cpu.turning import rotate_rows
from .matrix import Matrix, Tensors
from .steps import Steps


@dataclass(frozen=True)
class Rotated(Matrix):
    """A matrix whose stored rows, and `weights`, are those of Y."""

    rotation: str = "full"
    seed: int = 0
    scale: str | None = "scale"  # None: row_scales and column_scales instead
    row_scales: str = ""
    column_scales: str = ""
    codebook: str = "strata"
    starts: str | None = None  # where walks do not bite their tails
    summed: int = 0  # inputs in bfloat16 that are summed as integers
    is_rotated: ClassVar[bool] = True

    def filled(self, state: Tensors) -> tuple[Any, Tensor | None]:
        task, memory = super().filled(state)
        if self.starts is not None:
            task[T.PLACES] = state[self.starts].data_ptr()
        return task, memory

    def steps(
        self,
        state: Tensors,
        x: Tensor,
        dtype: torch.dtype,
        *,
        bias: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Steps:
        own = self._entered(x, state, torch.float32)
        chunk = self.summed if x.dtype == torch.bfloat16 else 0
        y = yield from self.summed_steps(state, own, torch.float32, chunk)
        more = [added for added in (start, bias) if added is not None]
        y = self._left(y, state, torch.float32 if more else dtype)
        for added in more:
            y = y + added
        return y.to(dtype)

    def _entered(self, x: Tensor, state: Tensors, dtype: torch.dtype) -> Tensor:
        scales = None if self.scale else state[self.column_scales]
        return self._turned(x, 2 * self.seed, dtype, scales, is_back=False)

    def _left(self, y: Tensor, state: Tensors, dtype: torch.dtype) -> Tensor:
        scales = state[self.scale or self.row_scales]
        return self._turned(y, 2 * self.seed + 1, dtype, scales, is_back=True)

    def _turned(
        self, x: Tensor, seed: int, dtype: torch.dtype, scales: Tensor | None, *, is_back: bool
    ) -> Tensor:
        """Return the rows of x (tokens, n) rotated, or rotated back, with scales outside of that.

        As PyTorch does in a hundred small operations, which move more bytes. scales: of all rows,
        (n,) or (1,), or of each of them.
        """
        is_given = scales is not None and scales.dim() == 1 and self.rotation != "none"
        apart = None if is_given else scales
        if apart is not None and not is_back:
            x = x.float() * apart
        if self.rotation != "none":
            turned = parts(x.shape[1], seed, block_of(self.rotation))
            kind = dtype if apart is None else torch.float32
            x = rotate_rows(x, turned, kind, scales if is_given else None, is_back)
        if apart is not None and is_back:
            x = x.float() * apart
        return x.to(dtype)

    def enter(self, x: Tensor, state: Tensors) -> Tensor:
        return self._entered(x, state, x.dtype)

    def leave(self, y: Tensor, state: Tensors) -> Tensor:
        return self._left(y, state, y.dtype)

    def enter_back(self, grad: Tensor, state: Tensors) -> Tensor:
        """Return grad (tokens, rows) as the stored rows are added up with."""
        scales = state[self.scale or self.row_scales]
        return self._turned(grad, 2 * self.seed + 1, grad.dtype, scales, is_back=False)

    def leave_back(self, total: Tensor, state: Tensors) -> Tensor:
        """Return the gradient of x from the sum of the stored rows."""
        scales = None if self.scale else state[self.column_scales]
        return self._turned(total, 2 * self.seed, total.dtype, scales, is_back=True)
