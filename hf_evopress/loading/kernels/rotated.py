"""A trellis-coded matrix: its walks are read as they are, and the activations are rotated instead.

W = s Q_o^T Y Q_i (methods/trellis.py): W x is Q_o^T (Y (Q_i x)) s, and rotations take n log n.
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
    scale: str = "scale"
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
        y = yield from super().steps(state, self.enter(x.float()).contiguous(), torch.float32)
        y = self.leave(y, state)
        for more in (start, bias):
            y = y if more is None else y + more
        return y.to(dtype)

    def enter(self, x: Tensor) -> Tensor:
        return rotate_inputs(x.T, self.rotation, self.seed).T.to(x.dtype)

    def leave(self, y: Tensor, state: Tensors) -> Tensor:
        turned = unrotate_outputs(y.T, self.rotation, self.seed).T
        return (turned * state[self.scale]).to(y.dtype)

    def enter_back(self, grad: Tensor, state: Tensors) -> Tensor:
        """Return grad (tokens, rows) as the stored rows are added up with."""
        turned = rotate_outputs(grad.T, self.rotation, self.seed).T
        return (turned * state[self.scale]).to(grad.dtype)

    def leave_back(self, total: Tensor) -> Tensor:
        """Return the gradient of x from the sum of the stored rows."""
        if self.rotation == "none":
            return total
        return unrotate(total.T, 2 * self.seed, block_of(self.rotation)).T.to(total.dtype)
