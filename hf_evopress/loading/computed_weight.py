"""A dense weight that is computed when its values are first used; a change to it raises.

Models of transformers ask `layer.weight.dtype` in each forward (T5, Mamba): that costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..methods import compose
from ..methods.base import Shape
from .kernels.operators import known_layer
from .runtimes import AUTO

READ_ONLY = (
    "the weight of a compressed layer is computed from its packed tensors, so a change to it "
    "would be lost; call model.dequantize() first and change (or merge into) the dense model, or "
    "leave dense in the plan what the model itself changes"
)


def _reads(*properties: str) -> set[Any]:
    """Return what __torch_function__ is given where these properties of a tensor are read."""
    return {getattr(Tensor, name).__get__ for name in properties}


# what is known of a weight without its values
_FACTS = {
    *_reads("dtype", "shape", "device", "layout", "ndim", "itemsize", "nbytes", "requires_grad"),
    *_reads("is_meta", "is_cpu", "is_cuda", "is_xpu", "is_mps", "is_sparse", "is_quantized"),
    *(Tensor.size, Tensor.numel, Tensor.nelement, Tensor.dim, Tensor.ndimension, Tensor.__len__),
    *(Tensor.element_size, Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device),
    *(torch.numel, torch.is_floating_point, torch.is_complex),
}
_META = torch.device("meta")
_DEVICE: Any = Tensor.device.__get__  # type: ignore[attr-defined]
_OF_GRAPHS = _reads("grad", "grad_fn", "is_leaf")
_DETACH = {Tensor.detach, torch.detach, *_reads("data")}
_SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]
_SET_REQUIRES_GRAD = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]


class ComputedWeight(Tensor):
    """A dense weight made for one look: like any tensor, but an in-place change raises.

    Without this, `layer.weight.data += delta`, which is how PEFT merges an adapter, would
    change a temporary and the adapter would be gone without a word. Views raise as well; a clone(),
    or anything computed, is a plain tensor, and what `other.data = ` takes.

    It has no storage: `values`, called once at most, returns the tensor that all but questions
    for dtype, shape and the like are answered by.
    """

    _is_hf_initialized = True  # transformers must not draw a new random weight
    _compute: Callable[[], Tensor]
    _made: Tensor | None = None
    _device: torch.device

    @staticmethod
    def __new__(
        cls: type[ComputedWeight],
        values: Callable[[], Tensor],
        shape: Shape | torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        requires_grad: bool = False,
    ) -> ComputedWeight:
        # meta but for its name: PyTorch then refuses `linear.weight.data = W`, of which it tells
        # no subclass, where a tensor of the CPU without storage would crash later
        W: ComputedWeight = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=_META, requires_grad=requires_grad,
            dispatch_device=True,
        )  # fmt: skip
        W._device, W._compute = device, values
        return W

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _FACTS:  # first, as models ask in each forward
            if func == _DEVICE:
                return args[0]._device
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("input", kwargs.get("tensor"))
        if isinstance(first, cls):
            if func in _SET_REQUIRES_GRAD:
                return first._set_requires_grad(*args[1:], **kwargs)
            if _is_in_place(getattr(func, "__name__", "")) or func == _SET_DATA:
                raise RuntimeError(READ_ONLY)
        if isinstance(kwargs.get("out"), cls):
            raise RuntimeError(READ_ONLY)
        with torch._C.DisableTorchFunctionSubclass():
            if isinstance(first, cls):
                if func in _OF_GRAPHS and not first.requires_grad:
                    return func(*args, **kwargs)
                if func in _DETACH:
                    return first._detached()
            if isinstance(first, cls) and func is Tensor.__iter__:
                return iter(first._guarded(first._values().unbind(0)))
            result = func(*_computed(args), **_computed(kwargs))
            return first._guarded(result) if isinstance(first, cls) else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0]._device
        changes = isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable
        if changes and any(isinstance(value, cls) for value in (*args[:1], kwargs.get("out"))):
            raise RuntimeError(READ_ONLY)
        return func(*_computed(args), **_computed(kwargs))

    def _values(self) -> Tensor:
        if self._made is None:
            self._made = self._compute()
        return self._made

    def _guarded(self, result: Any) -> Any:
        """Return `result` with all that shares this weight's values as a weight of this kind."""
        if isinstance(result, (tuple, list)):
            parts = [self._guarded(part) for part in result]
            is_same = all(new is old for new, old in zip(parts, result, strict=True))
            return result if is_same else type(result)(parts)
        if not isinstance(result, Tensor):
            return result
        values = self._values()
        if result is values:
            return self
        if not _shares(result, values):
            return result
        about = result.shape, result.dtype, result.device, result.requires_grad
        return ComputedWeight(lambda: result, *about)

    def _detached(self) -> ComputedWeight:
        return ComputedWeight(lambda: self._values().detach(), self.shape, self.dtype, self.device)

    def _set_requires_grad(self, requires_grad: bool = True) -> ComputedWeight:
        with torch._C.DisableTorchFunctionSubclass():
            if requires_grad != self.requires_grad:
                self._values().requires_grad_(requires_grad)
                self.requires_grad_(requires_grad)
        return self


def _computed(values: Any) -> Any:
    """Return arguments of an operation with the values of each weight among them."""
    return tree_map_only(ComputedWeight, lambda W: W._values(), values)


def _is_in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"


def _shares(a: Tensor, b: Tensor) -> bool:
    # no pointers to data: while a model is exported, tensors have none
    return a.layout == b.layout == torch.strided and bool(torch._C._is_alias_of(a, b))  # type: ignore[attr-defined]


# -- in graphs -------------------------------------------------------------------------------


@torch.library.custom_op("evopress::weight", mutates_args=())
def _weight(state: list[Tensor], level: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    size = (shape[0], shape[1])
    known, _, names = known_layer(level, size, AUTO)
    W = compose.decompress(known, dict(zip(names, state, strict=True)), size, dtype)
    return W.clone(memory_format=torch.contiguous_format)  # as the fake says, and no alias


@_weight.register_fake
def _(state: list[Tensor], level: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    return state[0].new_empty(shape, dtype=dtype)


def traced_weight(state: list[Tensor], level: str, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Return the weight as one operator of a graph, which drops it where its values are unused."""
    W: Tensor = torch.ops.evopress.weight(state, level, [*shape], dtype)
    return W
