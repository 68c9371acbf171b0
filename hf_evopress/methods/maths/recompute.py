"""A linear product whose backward pass decompresses the weight again instead of keeping it.

While an adapter is trained, autograd would keep every dequantised weight from forward to
backward, and training a compressed model would take the memory of a dense one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def forgetful_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, remake: Callable[[], Tensor]
) -> Tensor:
    """Return x W^T + bias, with a graph that holds `remake` (returns W again) in W's place.

    x (..., in), W (out, in), which gets no gradient, bias (out,). One more dequantisation per
    backward pass, which is a few percent of a training step. Under torch.func the graph holds W.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return F.linear(x, W, bias)
    return _ForgetfulLinear.apply(x, bias, W, remake)


class _ForgetfulLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, W: Tensor, remake: Callable[[], Tensor]
    ) -> Tensor:
        ctx.remake, ctx.dtype = remake, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        # PyTorch gives a view for more than two dimensions, which nobody may change in place
        y = F.linear(x, W, bias)
        return torch.ops.aten._unsafe_view(y, y.shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        for_x = for_bias = None
        if ctx.needs_input_grad[0]:
            # under autocast the product ran in another dtype than x
            for_x = (grad @ ctx.remake().to(grad.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            for_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return for_x, for_bias, None, None
