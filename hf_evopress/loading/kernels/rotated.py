"""A trellis-coded matrix: its walks are read as they are, and the activations are rotated instead.

W = s Q_o^T Y Q_i (methods/trellis.py): W x is Q_o^T (Y (Q_i x)) s, and rotations take n log n.
Scales of rows and columns stand outside of the rotations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...methods.maths.rotation import parts, unrotate
from ...methods.maths.trellis_rounding import (
    block_of,
    rotate_inputs,
    rotate_outputs,
    unrotate_outputs,
)
from . import task as T
from .compiled import compiled
from .matrix import Matrix, Tensors
from .steps import Steps

MOST_THREADS = 2  # up to which one thread of ours rotates many tokens sooner than PyTorch


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
        own = x.float() if self.scale else x.float() * state[self.column_scales]
        own = self._turned(own, 2 * self.seed, is_back=False)
        chunk = self.summed if x.dtype == torch.bfloat16 else 0
        y = yield from self.summed_steps(state, own, torch.float32, chunk)
        y = self._turned(y, 2 * self.seed + 1, is_back=True) * state[self.scale or self.row_scales]
        for more in (start, bias):
            y = y if more is None else y + more
        return y.to(dtype)

    def _turned(self, x: Tensor, seed: int, *, is_back: bool) -> Tensor:
        """Return the rows of x (tokens, n) float32 rotated, or rotated back.

        As PyTorch does in a hundred small operations, which use many threads and move more bytes.
        """
        if self.rotation == "none":
            return x
        tokens, n = x.shape
        turned = parts(n, seed, block_of(self.rotation))
        matrix = 0 if turned.matrix is None else turned.matrix.data_ptr()
        own = x.clone(memory_format=torch.contiguous_format)
        y = torch.empty(tokens, n, dtype=torch.float32, device="cpu")
        signs, sizes = turned.signs.data_ptr(), (turned.q, turned.p)
        compiled().turn(own.data_ptr(), y.data_ptr(), signs, matrix, is_back, *sizes, tokens)
        return y

    def enter(self, x: Tensor, state: Tensors) -> Tensor:
        own = x if self.scale else x.float() * state[self.column_scales]
        if _in_few_threads(x):
            return self._turned(own.float(), 2 * self.seed, is_back=False).to(x.dtype)
        return rotate_inputs(own.T, self.rotation, self.seed).T.to(x.dtype)

    def leave(self, y: Tensor, state: Tensors) -> Tensor:
        if _in_few_threads(y):
            turned = self._turned(y.float(), 2 * self.seed + 1, is_back=True)
        else:
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


def _in_few_threads(x: Tensor) -> bool:
    """Return whether one thread of ours rotates sooner: 512 tokens at 0.9 to 2.6 times PyTorch's
    speed, of one thread and of two."""
    return x.is_cpu and torch.get_num_threads() <= MOST_THREADS
