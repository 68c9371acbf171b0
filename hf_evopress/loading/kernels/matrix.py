"""One packed matrix and what is computed with it: products with few tokens, and its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...methods.base import Shape
from . import task as T
from .cpu.compiled import Task, run
from .steps import Steps, finish

KINDS = {torch.float32: T.FLOAT32, torch.bfloat16: T.BFLOAT16, torch.float16: T.FLOAT16}
Tensors = Mapping[str, Tensor]  # packed tensors of a layer by name, among others


@dataclass(frozen=True)
class Matrix:
    """A matrix (rows, n) whose tensors have these names in the state of its level.

    `fixed` is what a task says of it besides their addresses.
    """

    shape: Shape
    codes: str
    scales: str | None = None
    zeros: str | None = None
    places: str | None = None
    chunk: int = 0
    fixed: Mapping[str, int] = field(default_factory=dict)
    table: Tensor | None = None  # masks of an n:m pattern, values of a trellis' states
    is_rotated: ClassVar[bool] = False  # stored in another basis: enter() and leave() turn

    def __post_init__(self) -> None:
        rows, n = self.shape
        values = {"n": n, "all_rows": rows, "groups": 1, **self.fixed}
        task = Task()
        for name, value in values.items():
            task[T.PLACE[name]] = value
        if self.table is not None:
            task[T.TABLE], task[T.M] = self.table.data_ptr(), self.table.shape[-1]
        object.__setattr__(self, "_task", task)

    def product(self, state: Tensors, x: Tensor, dtype: torch.dtype, **added: Any) -> Tensor:
        """Return what `steps` does."""
        return finish(self.steps(state, x, dtype, **added))

    def steps(
        self,
        state: Tensors,
        x: Tensor,
        dtype: torch.dtype,
        *,
        bias: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Steps:
        """Return x W^T + bias + start in `dtype`, float32 or bfloat16, in steps.

        x (tokens, n) contiguous, float32, bfloat16 or float16; start (tokens, rows) float32.
        """
        chunk = self.chunk if x.dtype == torch.bfloat16 else 0
        return self.summed_steps(state, x, dtype, chunk, bias=bias, start=start)

    def summed_steps(
        self,
        state: Tensors,
        x: Tensor,
        dtype: torch.dtype,
        chunk: int,
        *,
        bias: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Steps:
        """Return the same with `chunk` inputs at a time summed as integers, 0 for none."""
        rows, tokens = self.shape[0], x.shape[0]
        y = torch.empty(tokens, rows, dtype=dtype, device="cpu")
        task, keep = self.filled(state)
        task[T.ROWS], task[T.TOKENS] = rows, tokens
        task[T.X], task[T.X_KIND] = x.data_ptr(), KINDS[x.dtype]
        task[T.Y], task[T.Y_KIND] = y.data_ptr(), KINDS[dtype]
        if bias is not None:
            task[T.BIAS], task[T.BIAS_KIND] = bias.data_ptr(), KINDS[bias.dtype]
        if start is not None:
            task[T.START] = start.data_ptr()
        task[T.CHUNK] = chunk
        yield task
        del keep
        return y

    def enter(self, x: Tensor, state: Tensors) -> Tensor:
        """Return x (tokens, n) as the stored rows are multiplied with, in its dtype."""
        return x

    def leave(self, y: Tensor, state: Tensors) -> Tensor:
        """Return the products y (tokens, rows) of the stored rows as those of the weight."""
        return y

    def enter_back(self, grad: Tensor, state: Tensors) -> Tensor:
        return grad

    def leave_back(self, total: Tensor, state: Tensors) -> Tensor:
        return total

    def weights(
        self,
        state: Tensors,
        dtype: torch.dtype,
        *,
        first: int = 0,
        last: int | None = None,
        room: Tensor | None = None,
    ) -> Tensor:
        """Return rows first .. last of the weight in `dtype`, float32 or bfloat16.

        room: memory for them, (at least as many, in) in `dtype`, where a matrix can use it: pages
        that are taken anew for each tile cost as much as unpacking.
        """
        last = self.shape[0] if last is None else last
        out = None if room is None else room[: last - first]
        return self._weights(state, dtype, last - first, first, None, out)

    def look_up(self, state: Tensors, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows (n,) int64 of the weight in `dtype`, float32 or bfloat16."""
        return self._weights(state, dtype, len(ids), 0, ids.contiguous())

    def _weights(
        self,
        state: Tensors,
        dtype: torch.dtype,
        count: int,
        first: int,
        ids: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        if out is None:
            out = torch.empty(count, self.shape[1], dtype=dtype, device="cpu")
        task, keep = self.filled(state)
        task[T.ROWS], task[T.FIRST] = count, first
        task[T.Y], task[T.Y_KIND] = out.data_ptr(), KINDS[dtype]
        if ids is not None:
            task[T.IDS] = ids.data_ptr()
        run([task])
        del keep
        return out

    def filled(self, state: Tensors) -> tuple[Any, Tensor | None]:
        """Return a task with the addresses of the packed tensors, and memory that it needs."""
        task: Any = Task.from_buffer_copy(self._task)  # type: ignore[attr-defined]
        task[T.CODES] = state[self.codes].data_ptr()
        if self.scales is not None:
            task[T.SCALES] = state[self.scales].data_ptr()
        if self.zeros is not None:
            task[T.ZEROS] = state[self.zeros].data_ptr()
        if self.places is None:
            return task, None
        task[T.PLACES] = state[self.places].data_ptr()
        starts = torch.empty(self.shape[0] + 1, dtype=torch.int64, device="cpu")
        task[T.STARTS] = starts.data_ptr()
        return task, starts
