"""One layer's product with little Python around it: of a small layer, that was a third of the time.

It does what operators.linear does for the commonest case alone: plain tensors on the CPU, without
gradients, at a level of one coded matrix. All else is left to that.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from . import task as T
from .cpu.compiled import bytes_of, bytes_of_thread, compiled, scratch, threads_for
from .layer import MOST_TOKENS, Kernel
from .matrix import KINDS, Matrix, Tensors
from .tracing import has_tangents, in_functorch

DTYPES = (torch.bfloat16, torch.float32)
_in_modes = torch._C._len_torch_dispatch_stack
_is_traced = torch._C._is_tracing


class Direct:
    """The product of a layer whose packed tensors are where they were; made anew if they move."""

    def __init__(self, matrix: Matrix, tensors: Tensors) -> None:
        self.rows, self.n = matrix.shape
        names = [n for n in (matrix.codes, matrix.scales, matrix.zeros, "bias") if n is not None]
        own = {name: tensors[name] for name in names if tensors[name] is not None}
        self.places = [(name, tensor, tensor.data_ptr()) for name, tensor in own.items()]
        self.tasks = {dtype: self._task(matrix, own, dtype) for dtype in DTYPES}
        self.addresses = {dtype: ctypes.addressof(task) for dtype, task in self.tasks.items()}
        self.multiply = compiled().multiply
        self.of_token, self.of_thread = bytes_of(1, self.n), bytes_of_thread(self.n)

    def _task(self, matrix: Matrix, tensors: Tensors, dtype: torch.dtype) -> Any:
        kernels, bias = compiled(), tensors.get("bias")
        task, _ = matrix.filled(tensors)
        task[T.ROWS], task[T.X_KIND], task[T.Y_KIND] = self.rows, KINDS[dtype], KINDS[dtype]
        task[T.CHUNK] = matrix.chunk if dtype == torch.bfloat16 else 0
        task[T.COUNT], task[T.PARALLEL], task[T.WORK] = 1, kernels.parallel, kernels.work
        if bias is not None:
            task[T.BIAS], task[T.BIAS_KIND] = bias.data_ptr(), KINDS[bias.dtype]
        return task

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy has other tensors: it makes its own

    def stands(self, tensors: Tensors) -> bool:
        """Return whether the packed tensors are where they were."""
        return all(tensors[n] is t and t.data_ptr() == at for n, t, at in self.places)

    def __call__(self, tensors: Tensors, x: Tensor) -> Tensor | None:
        """Return x W^T + bias, or None where that is not for this."""
        template = self.addresses.get(x.dtype)
        if template is None or type(x) is not Tensor or not x.is_cpu or torch.is_grad_enabled():
            return None
        tokens = x.numel() // self.n
        if not 0 < tokens <= MOST_TOKENS or x.size(-1) != self.n or not x.is_contiguous():
            return None
        if _in_modes() or in_functorch() is not None or _is_traced():
            return None
        if has_tangents():
            return None
        if torch.is_autocast_enabled("cpu"):
            return None
        for name, tensor, address in self.places:
            if tensors[name] is not tensor or tensor.data_ptr() != address:
                return None
        y = torch.empty((*x.shape[:-1], self.rows), dtype=x.dtype, device="cpu")
        threads = threads_for(tokens * self.n * self.rows)
        room = scratch(8 * T.SIZE + tokens * self.of_token + threads * self.of_thread)
        self.multiply(template, x.data_ptr(), y.data_ptr(), tokens, threads, room)
        return y


def direct(kernel: Kernel, tensors: Tensors, x: Tensor) -> Direct | None:
    """Return the product of a layer as it stands; None for layers that take another way."""
    matrix = kernel.matrix if type(kernel) is Kernel else None
    if matrix is None or not x.is_cpu or x.dtype not in DTYPES:
        return None
    if in_functorch() is not None:  # tensors without a place in memory
        return None
    bias = tensors["bias"]
    own = [t for t in tensors.values() if t is not None]
    if any(not t.is_cpu or not t.is_contiguous() for t in own):
        return None
    if bias is not None and bias.dtype not in KINDS:
        return None
    return Direct(matrix, tensors)
