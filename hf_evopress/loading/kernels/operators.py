"""The kernels as operators of PyTorch: for torch.compile, for gradients, and called directly.

`evopress::linear` and `evopress::look_up` take any level on any device: where there is no kernel
they compute the weight, so that a compiled model holds one opaque call per layer and
`fullgraph=True` works. Their gradient is that of the input (and bias), for which the weight is
computed again; the gradient of that is `linear` once more. torch.func goes another way
(transforms.py). Where nothing is traced and nothing has a gradient, `linear` and `look_up` skip
the operator, whose dispatch takes longer than a small layer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...methods import compose
from ...methods.base import Shape, State
from ...plans.level import Level
from .gpu.launch import KernelError
from .gpu.layer import TritonKernel, give_up, triton_kernel_of
from .layer import DTYPES, Kernel, kernel_of
from .tracing import has_tangents, in_functorch, is_exporting, is_traced
from .transforms import Product, whole_batches

logger = logging.getLogger(__name__)

_failed: list[Exception] = []  # the kernels' own failure, which switches them off
_worked: set[str] = set()  # levels whose kernels have given a product in this process


def usable(level: Level, shape: Shape) -> Kernel | None:
    """Return the kernel of a layer, None where there is none or kernels have failed here.

    They are compiled at the first product: a model that is only looked at does not wait for it.
    """
    return None if _failed else kernel_of(level, shape)


@lru_cache(maxsize=None)
def failures() -> tuple[type[Exception], ...]:
    """Return the errors that say that kernels do not work here: in compiling or in calling them."""
    known: tuple[type[Exception], ...] = (
        *(ImportError, OSError, RuntimeError, ValueError, TypeError, LookupError),
        *(AttributeError, ArithmeticError),
    )
    return (*known, *_of_numba())


@lru_cache(maxsize=None)
def _of_numba() -> tuple[type[Exception], ...]:
    try:
        return (import_module("numba.core.errors").NumbaError,)
    except ImportError:
        return ()


def _give_up(error: Exception) -> None:
    if not _failed:
        logger.warning(
            "the CPU kernels of hf_evopress do not work here (%s: %s): layers compute as with "
            "runtime 'packed', which is slower",
            type(error).__name__,
            str(error).strip().partition("\n")[0],
        )
    _failed.append(error)


def linear(
    kernel: Kernel, names: tuple[str, ...], tensors: Mapping[str, Tensor], x: Tensor
) -> Tensor | None:
    """Return x W^T + bias of a layer with these parameters; None if it is not for the kernels.

    The latter: a device without any, another dtype, packed tensors that are trained. Under autocast
    the result has the dtype that autocast gives a dense layer's.
    """
    if not isinstance(x, Tensor) or x.dtype not in DTYPES or x.layout != torch.strided:
        return None
    if has_tangents():
        return None
    # while torch.compile traces, the operator asks this later: the device is the same then
    here = kernel if torch.compiler.is_compiling() else kernel_on(kernel, x.device)
    if here is None:
        return None
    if torch.is_autocast_enabled(kind := x.device.type):
        with torch.autocast(kind, enabled=False):
            return linear(kernel, names, tensors, x.to(torch.get_autocast_dtype(kind)))
    if not x.dim() or x.shape[-1] != kernel.shape[1]:
        raise RuntimeError(
            f"an input of shape {tuple(x.shape)} for a layer of {kernel.shape[1]} inputs"
        )
    bias = tensors["bias"]
    if bias is not None and bias.dtype not in DTYPES:
        return None
    with_graph = torch.is_grad_enabled()
    if not are_plain(kernel, names, tensors, x, with_graph):
        return None
    if is_exporting():
        return None
    has_graph = with_graph and (x.requires_grad or (bias is not None and bias.requires_grad))
    if has_graph or type(x) is not Tensor or is_traced():
        state = [tensors[name] for name in names]
        how = kernel.text, kernel.shape[0], kernel.runtime
        if not torch.compiler.is_compiling() and in_functorch() is not None:
            return Product.apply(x, bias, how, *state)
        return torch.ops.evopress.linear(x, state, bias, *how)
    if not with_graph:
        return _product(here, tensors, x, bias)
    with torch.no_grad():
        return _product(here, tensors, x, bias)


def kernel_on(kernel: Kernel | None, device: torch.device) -> Kernel | None:
    """Return the kernel that does on a device what `kernel` says; None where there is none."""
    found = None if kernel is None else kernel.on(device)
    return None if _failed and not isinstance(found, TritonKernel) else found


def _product(
    kernel: Kernel, tensors: Mapping[str, Tensor], x: Tensor, bias: Tensor | None
) -> Tensor | None:
    """Return the kernel's product, or None, with one warning, where it fails."""
    try:
        y = kernel.linear(x, tensors, bias)
    except failures() as error:
        give_up_on(kernel, error)
        return None
    if kernel.text not in _worked and x.numel():
        _worked.add(kernel.text)
    return _no_view(y)


def _no_view(y: Tensor) -> Tensor:
    """Return y as a tensor of its own to autograd, which lets nobody change a view in place."""
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def give_up_on(kernel: Kernel, error: Exception) -> None:
    """Use kernels that do not work here no more; raise an error that is not their fault."""
    if isinstance(error, KernelError):
        give_up(error)
    elif isinstance(kernel, TritonKernel) or not _is_theirs(kernel, error):
        raise error
    else:
        _give_up(error)


def _is_theirs(kernel: Kernel, error: Exception) -> bool:
    """Return whether an error of a CPU kernel says that it cannot be compiled or loaded here.

    Before its first product any but a lack of memory does, after it those of compilers alone.
    """
    lacks_memory = ("allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or any(words in str(error) for words in lacks_memory):
        return False
    return kernel.text not in _worked or isinstance(error, (ImportError, OSError, *_of_numba()))


def why_failed() -> str:
    """Return why the CPU kernels cannot be used, or not any more; nothing where they are."""
    if _failed:
        return f"the CPU kernels failed: {type(_failed[0]).__name__}"
    return "" if _has_numba() else "numba is not installed"


@lru_cache(maxsize=None)
def _has_numba() -> bool:
    try:
        return find_spec("numba") is not None
    except ValueError:  # somebody forbade it: sys.modules["numba"] = None
        return False


def look_up(
    kernel: Kernel,
    names: tuple[str, ...],
    tensors: Mapping[str, Tensor],
    ids: Tensor,
    dtype: torch.dtype,
) -> Tensor | None:
    """Return the rows (..., in) for token ids (...); None if it is not for the kernels."""
    if not isinstance(ids, Tensor) or dtype not in DTYPES or ids.is_floating_point():
        return None
    here = kernel if torch.compiler.is_compiling() else kernel_on(kernel, ids.device)
    if here is None:
        return None
    if not are_plain(kernel, names, tensors, ids, torch.is_grad_enabled()) or is_exporting():
        return None
    if type(ids) is not Tensor or is_traced():
        state = [tensors[name] for name in names]
        options = kernel.text, [*kernel.shape], dtype, kernel.runtime
        return torch.ops.evopress.look_up(ids, state, *options)
    return _rows(here, tensors, ids, dtype)


def are_plain(
    kernel: Kernel,
    names: tuple[str, ...],
    tensors: Mapping[str, Tensor],
    x: Tensor,
    with_graph: bool,
) -> bool:
    """Return whether packed tensors are as and where kernels read them with x, and not trained.

    While scales and factors are trained, they are float32 (training/tunable.py).
    """
    on_cpu, dtypes = x.is_cpu, kernel.dtypes
    for name in names:
        tensor = tensors[name]
        if tensor.dtype is not dtypes[name]:
            return False
        if tensor.is_cpu != on_cpu or not tensor.is_contiguous():
            return False
        if not on_cpu and tensor.device != x.device:
            return False
        if with_graph and tensor.requires_grad:
            return False
    return True


def _rows(
    kernel: Kernel, tensors: Mapping[str, Tensor], ids: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Return rows (..., in); None, with one warning, where a kernel fails."""
    flat = ids.reshape(-1)
    if isinstance(kernel, TritonKernel):  # which asks nothing of a GPU: no row is a row of NaN
        try:
            rows = kernel.look_up(flat.to(torch.int64), tensors, dtype)
        except KernelError as error:
            give_up(error)
            return None
        return _no_view(rows.view(*ids.shape, kernel.shape[1]))
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < kernel.shape[0]:
        raise IndexError(
            f"token ids from {int(flat.min())} to {int(flat.max())} for an embedding of "
            f"{kernel.shape[0]} tokens"
        )
    try:
        rows = kernel.look_up(flat.to(torch.int64), tensors, dtype)
    except failures() as error:
        give_up_on(kernel, error)
        return None
    return _no_view(rows.view(*ids.shape, kernel.shape[1]))


# -- the operators ---------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def known_layer(
    level: str, shape: Shape, runtime: str
) -> tuple[Level, Kernel | None, tuple[str, ...]]:
    parsed = compose.normalize(level)
    names = tuple(sorted(compose.empty(parsed, shape, torch.float32)))
    find = triton_kernel_of if runtime == TritonKernel.runtime else kernel_of
    return parsed, find(parsed, shape), names


@torch.library.custom_op("evopress::linear", mutates_args=())
def _linear(
    x: Tensor,
    state: list[Tensor],
    bias: Tensor | None,
    level: str,
    rows: int,
    runtime: str,
) -> Tensor:
    shape = (rows, x.shape[-1])
    known, kernel, names = known_layer(level, shape, runtime)
    tensors = dict(zip(names, state, strict=True))
    kernel = kernel_on(kernel, x.device) if x.dtype in DTYPES else None
    if kernel is not None and kernel.reads(tensors):
        y = _product(kernel, tensors, x, bias)
        if y is not None:
            return y.contiguous()  # as the fake says, which compiled code relies on
    bias = None if bias is None else bias.to(x.dtype)
    return compose.operator(known, tensors, bias, shape, x.dtype)(x).contiguous()


@_linear.register_fake
def _(
    x: Tensor,
    state: list[Tensor],
    bias: Tensor | None,
    level: str,
    rows: int,
    runtime: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("evopress::linear_input_gradient", mutates_args=())
def _input_gradient(
    grad: Tensor, state: list[Tensor], level: str, columns: int, runtime: str
) -> Tensor:
    shape = (grad.shape[-1], columns)
    known, kernel, names = known_layer(level, shape, runtime)
    tensors: State = dict(zip(names, state, strict=True))
    kernel = kernel_on(kernel, grad.device) if grad.dtype in DTYPES else None
    if grad.dtype == torch.float16 and kernel is not None and not kernel.takes_half:
        kernel = None
    if kernel is not None and kernel.reads(tensors):
        try:
            return kernel.input_gradient(grad, tensors)
        except KernelError as error:
            give_up(error)
    return grad @ compose.decompress(known, tensors, shape, grad.dtype)


@_input_gradient.register_fake
def _(grad: Tensor, state: list[Tensor], level: str, columns: int, runtime: str) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], columns)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, state, bias, ctx.level, _, ctx.runtime = inputs
    ctx.save_for_backward(*state)
    ctx.columns = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    for_x = for_bias = None
    state = list(ctx.saved_tensors)  # under gradient checkpointing they can be had once only
    if ctx.needs_input_grad[0]:
        how = ctx.level, ctx.columns, ctx.runtime
        for_x = torch.ops.evopress.linear_input_gradient(grad, state, *how)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        for_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return for_x, [None] * len(state), for_bias, None, None, None


_linear.register_autograd(_backward, setup_context=_save)
_linear.register_vmap(whole_batches(_linear))


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, state, ctx.level, _, ctx.runtime = inputs
    ctx.save_for_backward(*state)
    ctx.rows = grad.shape[-1]


def _backward_of_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    state = list(ctx.saved_tensors)
    how = ctx.level, ctx.rows, ctx.runtime
    back = torch.ops.evopress.linear(grad, state, None, *how) if ctx.needs_input_grad[0] else None
    return back, [None] * len(state), None, None, None


_input_gradient.register_autograd(_backward_of_gradient, setup_context=_save_gradient)
_input_gradient.register_vmap(whole_batches(_input_gradient))


@torch.library.custom_op("evopress::look_up", mutates_args=())
def _look_up(
    ids: Tensor,
    state: list[Tensor],
    level: str,
    shape: list[int],
    dtype: torch.dtype,
    runtime: str,
) -> Tensor:
    size = (shape[0], shape[1])
    known, kernel, names = known_layer(level, size, runtime)
    tensors = dict(zip(names, state, strict=True))
    kernel = kernel_on(kernel, ids.device) if dtype in DTYPES else None
    found = None
    if kernel is not None and kernel.reads(tensors) and not ids.is_floating_point():
        found = _rows(kernel, tensors, ids, dtype)
    if found is not None:
        return found
    rows = compose.decompress_rows(known, tensors, size, ids.reshape(-1), dtype)
    return rows.view(*ids.shape, size[1])


@_look_up.register_fake
def _(
    ids: Tensor,
    state: list[Tensor],
    level: str,
    shape: list[int],
    dtype: torch.dtype,
    runtime: str,
) -> Tensor:
    return state[0].new_empty(*ids.shape, shape[1], dtype=dtype)


_look_up.register_vmap(whole_batches(_look_up))
