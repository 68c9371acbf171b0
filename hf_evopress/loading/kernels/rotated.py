"""A trellis-coded matrix: its walks are read as they are, and the activations are rotated instead.

W = s Q_o^T Y Q_i (methods/trellis.py): W x is Q_o^T (Y (Q_i x)) s, and rotations take n log n.
Scales of rows and columns stand outside of the rotations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...methods.maths.rotation import unrotate
from ...methods.maths.trellis_rounding import (
    block_of,
    rotate_inputs,
    rotate_outputs,
    unrotate_outputs,
)
from .matrix import Matrix, Tensors
from .steps import Steps

MOST_BITS = 7  # the bits of eight weights lie in one int64


@dataclass(frozen=True)
class Rotated(Matrix):
    """A matrix whose stored rows, and `weights`, are those of Y."""

    rotation: str = "full"
    seed: int = 0
    scale: str | None = "scale"  # None: row_scales and column_scales instead
    row_scales: str = ""
    column_scales: str = ""
    codebook: str = "strata"
    is_rotated: ClassVar[bool] = True

    def steps(
        self,
        state: Tensors,
        x: Tensor,
        dtype: torch.dtype,
        *,
        bias: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Steps:
        y = yield from super().steps(
            state, self.enter(x.float(), state).contiguous(), torch.float32
        )
        y = self.leave(y, state)
        for more in (start, bias):
            y = y if more is None else y + more
        return y.to(dtype)

    def enter(self, x: Tensor, state: Tensors) -> Tensor:
        own = x if self.scale else x.float() * state[self.column_scales]
        return rotate_inputs(own.T, self.rotation, self.seed).T.to(x.dtype)

    def leave(self, y: Tensor, state: Tensors) -> Tensor:
        turned = unrotate_outputs(y.T, self.rotation, self.seed).T
        return (turned * state[self.scale or self.row_scales]).to(y.dtype)

    def enter_back(self, grad: Tensor, state: Tensors) -> Tensor:
        """Return grad (tokens, rows) as the stored rows are added up with."""
        own = grad.float() * state[self.scale or self.row_scales]
        return rotate_outputs(own.T, self.rotation, self.seed).T.to(grad.dtype)

    def leave_back(self, total: Tensor, state: Tensors) -> Tensor:
        """Return the gradient of x from the sum of the stored rows."""
        dtype = total.dtype
        if self.rotation != "none":
            total = unrotate(total.T, 2 * self.seed, block_of(self.rotation)).T
        return (total if self.scale else total * state[self.column_scales]).to(dtype)
