"""A matrix whose rows are of two kinds, each stored by itself (methods/rows.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...methods.maths.packing import unpack
from .matrix import Matrix, Tensors
from .steps import Steps


@dataclass(frozen=True)
class Stacked(Matrix):
    """Rows that `codes`, a packed mask, says to be in `top`, in order, and the rest in `rest`."""

    top: Matrix | None = None
    rest: Matrix | None = None

    def steps(
        self,
        state: Tensors,
        x: Tensor,
        dtype: torch.dtype,
        *,
        bias: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Steps:
        is_top = self._is_top(state)
        y = torch.empty(len(x), self.shape[0], dtype=torch.float32, device="cpu")
        for part, rows in ((self.top, is_top), (self.rest, ~is_top)):
            assert part is not None  # terms.py gives both
            y[:, rows] = yield from part.steps(state, x, torch.float32)
        for more in (start, bias):
            y = y if more is None else y + more
        return y.to(dtype)

    def weights(
        self,
        state: Tensors,
        dtype: torch.dtype,
        *,
        first: int = 0,
        last: int | None = None,
        room: Tensor | None = None,
    ) -> Tensor:
        last = self.shape[0] if last is None else last
        return self.look_up(state, torch.arange(first, last, device="cpu"), dtype)

    def look_up(self, state: Tensors, ids: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.top is not None and self.rest is not None  # terms.py gives both
        is_top = self._is_top(state)
        before = is_top.long().cumsum(0)[ids]  # top rows up to and with this one
        out = torch.empty(len(ids), self.shape[1], dtype=dtype, device="cpu")
        own = is_top[ids]
        out[own] = self.top.look_up(state, before[own] - 1, dtype)
        out[~own] = self.rest.look_up(state, (ids - before)[~own], dtype)
        return out

    def _is_top(self, state: Tensors) -> Tensor:
        return unpack(state[self.codes], 1, self.shape[0]).bool()
