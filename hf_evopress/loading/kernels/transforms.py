"""What the transforms of torch.func do with the operators of the kernels.

vmap: kernels take any number of tokens, so that a batch of inputs is only more of them: one call.
Where packed tensors have the batch (an ensemble of models), each of its members is a call.

grad, jvp and what is made of them: `Product` is the operator `evopress::linear` for them, as they
do not go through an operator of torch.library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def whole_batches(operator: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """Return the rule of an operator whose first argument has any leading dimensions."""
    apart = by_turns(operator)

    def rule(info: Any, in_dims: tuple[Any, ...], x: Tensor, *others: Any) -> tuple[Tensor, int]:
        if in_dims[0] is None or any(_has_batch(dims) for dims in in_dims[1:]):
            return apart(info, in_dims, x, *others)
        return operator(x.movedim(in_dims[0], 0), *others), 0

    return rule


def by_turns(operator: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """Return the rule that calls an operator for each member of the batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        calls = (
            [_member(x, dims, i) for x, dims in zip(arguments, in_dims, strict=True)]
            for i in range(info.batch_size)
        )
        return torch.stack([operator(*own) for own in calls]), 0

    return rule


def _has_batch(dims: Any) -> bool:
    if isinstance(dims, (list, tuple)):
        return any(map(_has_batch, dims))
    return dims is not None


def _member(x: Any, dims: Any, i: int) -> Any:
    """Return what an argument is for the i-th member: all of it where it has no batch."""
    if isinstance(dims, (list, tuple)):
        return type(x)(_member(part, own, i) for part, own in zip(x, dims, strict=True))
    return x if dims is None else x.select(dims, i).contiguous()


class Product(torch.autograd.Function):
    """x W^T + bias of a packed W, of any derivative: in x linear, and so is its gradient."""

    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, how: tuple[str, int, str], *state: Tensor
    ) -> Tensor:
        y: Tensor = torch.ops.evopress.linear(x, list(state), bias, *how)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.bias, ctx.how, *state = inputs
        ctx.columns = x.shape[-1]
        ctx.save_for_backward(*state)
        ctx.save_for_forward(*state)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,), state, for_bias = grads, ctx.saved_tensors, None
        text, _, runtime = ctx.how
        for_x = Gradient.apply(grad, (text, ctx.columns, runtime), *state)
        if ctx.bias is not None:
            for_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
            for_bias = for_bias.to(ctx.bias.dtype)
        return for_x, for_bias, None, *([None] * len(state))

    @staticmethod
    def jvp(ctx: Any, *moved: Any) -> Any:
        x, bias, *_ = moved
        y = Product.apply(x, None, ctx.how, *ctx.saved_tensors) if x is not None else None
        if bias is None:
            return y
        return bias if y is None else y + bias

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        return _PRODUCT_RULE(info, in_dims, *arguments)


class Gradient(torch.autograd.Function):
    """g W of a packed W: what `Product` gives its input."""

    @staticmethod
    def forward(grad: Tensor, how: tuple[str, int, str], *state: Tensor) -> Tensor:
        found: Tensor = torch.ops.evopress.linear_input_gradient(grad, list(state), *how)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, ctx.how, *state = inputs
        ctx.rows = grad.shape[-1]
        ctx.save_for_backward(*state)
        ctx.save_for_forward(*state)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        text, _, runtime = ctx.how
        back = Product.apply(grads[0], None, (text, ctx.rows, runtime), *ctx.saved_tensors)
        return back, None, *([None] * len(ctx.saved_tensors))

    @staticmethod
    def jvp(ctx: Any, *moved: Any) -> Any:
        return Gradient.apply(moved[0], ctx.how, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        return _GRADIENT_RULE(info, in_dims, *arguments)


_PRODUCT_RULE, _GRADIENT_RULE = whole_batches(Product.apply), whole_batches(Gradient.apply)
