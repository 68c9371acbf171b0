"""Products with the matrices of many experts at once: each token with that of its expert.

Tokens come sorted by their expert, so that no shape depends on how they are routed. On a CPU all
experts are one call of the compiled kernels, whatever their levels; an expert with many tokens, and
one without a kernel, is a product by itself. On a GPU those of one level, dense ones too, are one
launch (gpu/experts.py), unless one of them has no kernel. `evopress::experts` is the operator: for
torch.compile and for gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...methods import compose
from ...methods.base import Shape
from ...plans.level import DENSE, Level
from .gpu.experts import FAMILY, FEW, Experts, can_group, grouped
from .gpu.layer import CHECKED, TritonKernel, dense_kernel, probe, tells
from .layer import DTYPES, Kernel
from .operators import failures, give_up_on, kernel_on, known_layer
from .steps import finish_all
from .transforms import by_turns

BETWEEN = " | "  # levels of experts in one text


@dataclass(frozen=True)
class Stored:
    """How the matrix of an expert is stored: its level, the kernel of that, names of tensors."""

    level: Level
    kernel: Kernel | None
    names: tuple[str, ...]


@dataclass
class Part:
    """One expert's share of the tokens, first .. last, and what they are multiplied with."""

    stored: Stored
    tensors: Mapping[str, Tensor]
    bias: Tensor | None
    first: int
    last: int


@lru_cache(maxsize=4096)
def stored_as(text: str, shape: Shape, runtime: str) -> Stored:
    """Return how a matrix (out, in) at a level, or a dense one, is stored."""
    if text == str(DENSE):
        return Stored(DENSE, None, ("weight",))
    return Stored(*known_layer(text, shape, runtime))


@lru_cache(maxsize=1024)
def experts_of(
    levels: str, which: tuple[int, ...], shape: Shape, runtime: str
) -> tuple[Stored, ...]:
    """Return how experts are stored whose levels `which` numbers among the texts in `levels`."""
    known = [stored_as(text, shape, runtime) for text in levels.split(BETWEEN)]
    return tuple(known[i] for i in which)


def spans(expert: Tensor, n_experts: int) -> list[tuple[int, int, int]]:
    """Return the experts that have tokens, with the first and the last (exclusive) of these."""
    counts = torch.bincount(expert, minlength=n_experts)[:n_experts].tolist()
    found, first = [], 0
    for e, count in enumerate(counts):
        if count:
            found.append((e, first, first + count))
        first += count
    return found


def multiply(x: Tensor, parts: Sequence[Part], rows: int) -> Tensor:
    """Return (tokens, rows), each token times the matrix of its part; 0 for tokens of none."""
    y = x.new_zeros(len(x), rows)
    for part, own in zip(parts, _by_kernels(x, parts), strict=True):
        mine = slice(part.first, part.last)
        y[mine] = _reference(x[mine], part, rows) if own is None else own
    return y


def _by_kernels(x: Tensor, parts: Sequence[Part]) -> list[Tensor | None]:
    """Return the products of those parts that have a kernel here, None for the others."""
    found: list[Tensor | None] = [None] * len(parts)
    known = x.dtype in DTYPES
    kernels = [_reading(part.stored, part.tensors, x) if known else None for part in parts]
    own = [(i, kernel) for i, kernel in enumerate(kernels) if kernel is not None]
    if not own:
        return found
    running = []
    for i, kernel in own:
        part = parts[i]
        running.append(kernel.steps(x[part.first : part.last], part.tensors, part.bias))
    try:
        for (i, _), result in zip(own, finish_all(running), strict=True):
            found[i] = result
    except failures() as error:
        give_up_on(own[0][1], error)
    return found


def _reference(x: Tensor, part: Part, rows: int) -> Tensor:
    bias = None if part.bias is None else part.bias.to(x.dtype)
    if part.stored.level.is_dense:
        return F.linear(x, part.tensors["weight"].to(x.dtype), bias)
    known = {name: part.tensors[name] for name in part.stored.names}
    shape = (rows, x.shape[-1])
    return compose.operator(part.stored.level, known, bias, shape, x.dtype)(x)


def _expected(x: Tensor, part: Part, rows: int) -> Tensor:
    """Return what `_reference` does for some tokens, in little memory."""
    if part.stored.level.is_dense:
        return _reference(x, part, rows)
    known = {name: part.tensors[name] for name in part.stored.names}
    return compose.product(part.stored.level, known, part.bias, (rows, x.shape[-1]), x).to(x.dtype)


def _check(
    kernel: TritonKernel,
    x: Tensor,
    expert: Tensor,
    y: Tensor,
    stored: Sequence[Stored],
    experts: Experts,
) -> None:
    """Compare the first result of a kind with the reference; raises KernelError if it is wrong.

    That is a token of each of some experts. Where none was sent to these, or only zeros, it is the
    result for tokens that are made up.
    """
    way = "one of experts" if len(x) <= FEW else "many of experts"
    if kernel.has_checked(x.device, way):
        return
    own = [e for e, state in enumerate(experts.states) if state is not None]
    first = {e: at for e, at, _ in spans(expert, len(stored)) if e in own}
    if not first or not tells(x[list(first.values())[:CHECKED]]):
        x, numbers = probe(x), torch.tensor(own, device=x.device)
        expert = numbers[torch.arange(len(x), device=x.device) * len(own) // len(x)]
        made = grouped(x, expert, kernel, experts)
        assert made is not None  # as y was made
        y, first = made, {e: at for e, at, _ in spans(expert, len(stored))}
    found, wanted = [], []
    for e, at in list(first.items())[:CHECKED]:
        state, bias = experts.states[e], experts.biases[e] if experts.biases else None
        assert state is not None  # of its own
        part = Part(stored[e], state, bias, at, at + 1)
        found.append(y[at : at + 1])
        wanted.append(_expected(x[at : at + 1], part, y.shape[1]))
    kernel.check(x.device, way, torch.cat(found), torch.cat(wanted), FAMILY)


# -- the operators ---------------------------------------------------------------------------


@torch.library.custom_op("evopress::experts", mutates_args=())
def _experts(
    x: Tensor,
    expert: Tensor,
    state: list[Tensor],
    biases: list[Tensor],
    levels: str,
    which: list[int],
    rows: int,
    runtime: str,
) -> Tensor:
    stored = experts_of(levels, tuple(which), (rows, x.shape[-1]), runtime)
    tensors = _by_name(stored, state)
    y = _by_level(x, expert, stored, tensors, biases)
    if y is None:
        y = multiply(x, _parts(expert, stored, tensors, biases), rows)
    return y


def _by_level(
    x: Tensor,
    expert: Tensor,
    stored: Sequence[Stored],
    tensors: Sequence[dict[str, Tensor]],
    biases: Sequence[Tensor],
) -> Tensor | None:
    """Return the products as one launch per level, None where that cannot be."""
    here = [_here(one, own, x) for one, own in zip(stored, tensors, strict=True)]
    kernels = [kernel for kernel in here if isinstance(kernel, TritonKernel) and can_group(kernel)]
    if len(kernels) < len(stored) or x.dtype not in DTYPES or not len(x):
        return None
    total: Tensor | None = None
    x = x.contiguous()
    for kernel in dict.fromkeys(kernels):
        states = [t if k is kernel else None for k, t in zip(kernels, tensors, strict=True)]
        own = Experts(states, biases)
        try:
            y = grouped(x, expert, kernel, own)
            if y is not None:
                _check(kernel, x, expert, y, stored, own)
        except failures() as error:
            give_up_on(kernel, error)
            return None
        if y is None:
            return None
        total = y if total is None else total + y
    return total


def _reading(stored: Stored, tensors: Mapping[str, Tensor], x: Tensor) -> Kernel | None:
    """Return the kernel of a level on the device of x, if it can read the tensors as they are."""
    kernel = kernel_on(stored.kernel, x.device)
    return kernel if kernel is not None and kernel.reads(tensors) else None


def _here(stored: Stored, tensors: Mapping[str, Tensor], x: Tensor) -> Kernel | None:
    """Return the kernel of an expert's matrix on the device of x; a dense one has one in Triton."""
    if not stored.level.is_dense:
        return _reading(stored, tensors, x)
    W = tensors["weight"]
    if W.dtype not in DTYPES or not W.is_contiguous():
        return None
    return kernel_on(dense_kernel((W.shape[0], W.shape[1]), W.dtype), x.device)


@_experts.register_fake
def _(
    x: Tensor,
    expert: Tensor,
    state: list[Tensor],
    biases: list[Tensor],
    levels: str,
    which: list[int],
    rows: int,
    runtime: str,
) -> Tensor:
    return x.new_empty(x.shape[0], rows)


@torch.library.custom_op("evopress::experts_input_gradient", mutates_args=())
def _input_gradient(
    grad: Tensor,
    expert: Tensor,
    state: list[Tensor],
    levels: str,
    which: list[int],
    columns: int,
    runtime: str,
) -> Tensor:
    shape = (grad.shape[-1], columns)
    stored = experts_of(levels, tuple(which), shape, runtime)
    total = grad.new_zeros(len(grad), columns)
    for part in _parts(expert, stored, _by_name(stored, state), []):
        own = grad[part.first : part.last]
        total[part.first : part.last] = _gradient(own, part, shape)
    return total


@_input_gradient.register_fake
def _(
    grad: Tensor,
    expert: Tensor,
    state: list[Tensor],
    levels: str,
    which: list[int],
    columns: int,
    runtime: str,
) -> Tensor:
    return grad.new_empty(grad.shape[0], columns)


def _gradient(grad: Tensor, part: Part, shape: Shape) -> Tensor:
    if part.stored.level.is_dense:
        return grad @ part.tensors["weight"].to(grad.dtype)
    own = [part.tensors[name] for name in part.stored.names]
    how = str(part.stored.level), shape[1], _runtime_of(part.stored)
    return torch.ops.evopress.linear_input_gradient(grad, own, *how)  # type: ignore[no-any-return]


def _runtime_of(stored: Stored) -> str:
    return Kernel.runtime if stored.kernel is None else stored.kernel.runtime


def _by_name(stored: Sequence[Stored], state: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Return the tensors of each expert by name; `state` holds those of all, one by one."""
    given = iter(state)
    return [{name: next(given) for name in one.names} for one in stored]


def _parts(
    expert: Tensor,
    stored: Sequence[Stored],
    tensors: Sequence[Mapping[str, Tensor]],
    biases: Sequence[Tensor],
) -> list[Part]:
    return [
        Part(stored[e], tensors[e], biases[e] if biases else None, first, last)
        for e, first, last in spans(expert, len(stored))
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, expert, state, biases, ctx.levels, ctx.which, _, ctx.runtime = inputs
    ctx.save_for_backward(expert, *state)
    ctx.columns, ctx.n_biases = x.shape[-1], len(biases)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    expert, *state = ctx.saved_tensors  # under gradient checkpointing they can be had once only
    for_x = None
    if ctx.needs_input_grad[0]:
        how = ctx.levels, ctx.which, ctx.columns, ctx.runtime
        for_x = torch.ops.evopress.experts_input_gradient(grad, expert, state, *how)
    for_tensors = [None] * len(state), [None] * ctx.n_biases
    return for_x, None, *for_tensors, None, None, None, None


_experts.register_autograd(_backward, setup_context=_save)
_experts.register_vmap(by_turns(_experts))


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, expert, state, ctx.levels, ctx.which, _, ctx.runtime = inputs
    ctx.save_for_backward(expert, *state)
    ctx.rows = grad.shape[-1]


def _backward_of_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    expert, *state = ctx.saved_tensors
    back = None
    if ctx.needs_input_grad[0]:
        how = ctx.levels, ctx.which, ctx.rows, ctx.runtime
        back = torch.ops.evopress.experts(grad, expert, state, [], *how)
    return back, None, [None] * len(state), None, None, None, None


_input_gradient.register_autograd(_backward_of_gradient, setup_context=_save_gradient)
_input_gradient.register_vmap(by_turns(_input_gradient))
