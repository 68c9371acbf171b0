"""The kernels of a layer: x W^T + bias, and rows of W, at any level that they know."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...methods import compose
from ...methods.base import Shape
from ...plans.level import Level
from .cpu.compiled import most_by_integers
from .matrix import Matrix, Tensors
from .steps import Steps, finish
from .terms import factors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of activations
MOST_TOKENS = 16  # up to which unpacking a row for a dot product beats unpacking it for a matmul
SLICE = 64  # tokens whose integers the second-level cache holds
TILE = 2**21  # weights that are unpacked at once for a matmul, for each thread: 4 MB in bfloat16
MOST_TILES, FEW_TOKENS = 4, 128  # tiles at once of many tokens, whose products take longest


class Kernel:
    """Products of activations with a packed weight (out, in), which is nowhere as a whole.

    Up to MOST_TOKENS tokens, or most_by_integers(), a row is unpacked in the cache and multiplied
    at once; for more, tiles of rows are unpacked for a matmul. The former sums in float32 and
    rounds once; the latter multiplies the weight in the dtype of x, as `packed` does.
    """

    runtime = "auto"  # what an operator of PyTorch finds the kernel again by
    most_tokens = MOST_TOKENS
    takes_half = False  # float16 is float32 on the way

    def __init__(self, level: Level, shape: Shape, terms: Sequence[Sequence[Any]]) -> None:
        self.level, self.shape, self.text = level, shape, str(level)
        # whole matrices last, so that the bias and all else come in before the one rounding
        self._terms = sorted(terms, key=lambda t: len(t) == 1)
        self._is_one = len(terms) == 1 and len(terms[0]) == 1
        stored = compose.empty(level, shape, torch.float32)
        self._has_fix = "bias_fix" in stored
        self.dtypes = {name: tensor.dtype for name, tensor in stored.items()}

    def reads(self, state: Tensors) -> bool:
        """Return whether tensors have the dtypes that the level stores: memory is read as those."""
        return all(state[name].dtype is dtype for name, dtype in self.dtypes.items())

    @property
    def matrix(self) -> Matrix | None:
        """The coded matrix that this level is, None for levels that are more."""
        if not self._is_one or self._has_fix:
            return None
        matrix = self._terms[0][0]
        return matrix if type(matrix) is Matrix and matrix.places is None else None

    def on(self, device: torch.device) -> Kernel | None:
        """Return the kernel that does this on a device, None where there is none."""
        return self if device.type == "cpu" else _elsewhere(self.level, self.shape, device)

    def linear(self, x: Tensor, state: Tensors, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias for x (..., in) in one of DTYPES, without a graph for gradients."""
        return finish(self.steps(x, state, bias))

    def steps(self, x: Tensor, state: Tensors, bias: Tensor | None) -> Steps:
        """Return what `linear` does, in steps."""
        if self._has_fix and (fix := compose.bias_fix(self.level, dict(state))) is not None:
            bias = fix if bias is None else bias + fix
        rows, n = self.shape
        flat = (x if x.is_contiguous() else x.contiguous()).view(-1, n)
        if bias is not None and not bias.is_contiguous():
            bias = bias.contiguous()
        tokens = flat.shape[0]
        if tokens > self.most_of(x.dtype):
            y = self._by_tiles(flat, state, bias)
        elif tokens > SLICE:
            parts = []
            for part in flat.split(SLICE):
                parts.append((yield from self._by_rows(part, state, bias)))
            y = torch.cat(parts)
        elif tokens:
            y = yield from self._by_rows(flat, state, bias)
        else:
            y = x.new_empty(0, rows)
        return y.view(*x.shape[:-1], rows)

    def most_of(self, dtype: torch.dtype) -> int:
        """Return up to how many tokens a row is multiplied as soon as it is unpacked."""
        whole = [matrices[0] for matrices in self._terms if len(matrices) == 1]
        if dtype == torch.bfloat16 and whole and all(matrix.chunk for matrix in whole):
            return most_by_integers()
        return self.most_tokens

    def _by_rows(self, x: Tensor, state: Tensors, bias: Tensor | None) -> Steps:
        out = torch.float32 if x.dtype == torch.float16 and not self.takes_half else x.dtype
        if self._is_one and out is x.dtype:
            return (yield from self._terms[0][0].steps(state, x, out, bias=bias))
        y: Tensor | None = None
        for i, matrices in enumerate(self._terms):
            is_last = i == len(self._terms) - 1
            own = x
            if len(matrices) == 2:
                own = yield from matrices[0].steps(state, x, torch.float32)
            y = yield from matrices[-1].steps(
                state,
                own,
                out if is_last else torch.float32,
                bias=bias if is_last else None,
                start=y,
            )
        assert y is not None  # a level has a term
        return y.to(x.dtype)

    def _by_tiles(self, x: Tensor, state: Tensors, bias: Tensor | None) -> Tensor:
        if x.dtype == torch.float16 and not self.takes_half:
            wide = None if bias is None else bias.float()
            return self._by_tiles(x.float(), state, wide).half()
        if bias is not None:
            bias = bias.to(x.dtype)
        total: Tensor | None = None
        for matrices in self._terms:
            last = matrices[-1]
            own = x if len(matrices) == 1 else F.linear(x, matrices[0].weights(state, x.dtype))
            # a bias is rounded together with the product, where that is the output's already
            added = bias if total is None and not last.is_rotated else None
            y = last.leave(self._tiles(last, last.enter(own, state), state, added), state)
            if added is None and bias is not None and total is None:
                y = y + bias
            total = y if total is None else total + y
        assert total is not None  # a level has a term
        return total

    def _tiles(self, matrix: Any, x: Tensor, state: Tensors, bias: Tensor | None) -> Tensor:
        rows = matrix.shape[0]
        y = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
        step = self._rows_of_tile(len(x))
        room = x.new_empty(min(step, rows), matrix.shape[1]) if x.is_cpu else None
        for first in range(0, rows, step):
            last = min(first + step, rows)
            W = matrix.weights(state, x.dtype, first=first, last=last, room=room)
            y[:, first:last] = F.linear(x, W, None if bias is None else bias[first:last])
        return y

    def tile(self, tokens: int) -> int:
        """Return how many weights are unpacked at once: few enough for the caches of cores."""
        return TILE * (min(MOST_TILES, torch.get_num_threads()) if tokens > FEW_TOKENS else 1)

    def _rows_of_tile(self, tokens: int) -> int:
        step = self.tile(tokens) // self.shape[1]
        return step - step % 16 if step > 16 else max(1, step)  # strips of trellis codes have 16

    def __reduce__(self) -> Any:
        return kernel_of, (self.level, self.shape)  # it holds addresses of this process

    def input_gradient(self, grad: Tensor, state: Tensors) -> Tensor:
        """Return grad W, (..., in), for grad (..., out) float32 or bfloat16."""
        rows, n = self.shape
        flat = grad.reshape(-1, rows)
        total = flat.new_zeros(len(flat), n)
        step = self._rows_of_tile(len(flat))
        for matrices in self._terms:
            if len(matrices) == 2:
                A, B = (m.weights(state, flat.dtype) for m in matrices)
                total += (flat @ B) @ A
                continue
            own, part = matrices[0].enter_back(flat, state), torch.zeros_like(total)
            room = flat.new_empty(min(step, rows), n) if flat.is_cpu else None
            for first in range(0, rows, step):
                last = min(first + step, rows)
                W = matrices[0].weights(state, flat.dtype, first=first, last=last, room=room)
                part.addmm_(own[:, first:last], W)
            total += matrices[0].leave_back(part, state)
        return total.view(*grad.shape[:-1], n)

    def look_up(self, ids: Tensor, state: Tensors, dtype: torch.dtype) -> Tensor:
        """Return rows ids (n,) int64 of the weight, (n, in) in `dtype`."""
        one = len(self._terms) == 1 and len(self._terms[0]) == 1
        has_dtype = dtype != torch.float16 or self.takes_half
        if one and has_dtype and not self._terms[0][0].is_rotated:
            return self._terms[0][0].look_up(state, ids, dtype)
        if any(t[0].is_rotated for t in self._terms):
            known = {name: state[name] for name in state if name not in ("like", "bias")}
            return compose.decompress_rows(self.level, known, self.shape, ids, dtype)
        total = torch.zeros(len(ids), self.shape[1], dtype=torch.float32, device=ids.device)
        for matrices in self._terms:
            own = matrices[-1].look_up(state, ids, torch.float32)
            total += own if len(matrices) == 1 else own @ matrices[0].weights(state, torch.float32)
        return total.to(dtype)


def _elsewhere(level: Level, shape: Shape, device: torch.device) -> Kernel | None:
    # there, the kernels of this file are the base class
    return import_module(".gpu.layer", __package__).for_device(level, shape, device)  # type: ignore[no-any-return]


@lru_cache(maxsize=4096)
def kernel_of(level: Level, shape: Shape) -> Kernel | None:
    """Return the kernel of a level, None where there is none for one of its terms."""
    made = []
    for part, params, suffix in compose.parts(level):
        own = factors(part, params, suffix, shape)
        if own is None:
            return None
        made.append(own)
    return Kernel(level, shape, tuple(made))
