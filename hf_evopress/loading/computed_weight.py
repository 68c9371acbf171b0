"""A dense weight computed on access, which raises where a change to it would be lost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

READ_ONLY = (
    "the weight of a compressed layer is computed from its packed tensors, so a change to it "
    "would be lost; call model.dequantize() first and change (or merge into) the dense model"
)


class ComputedWeight(Tensor):
    """A dense weight made for one look: like any tensor, but an in-place change raises.

    Without this, `layer.weight.data += delta`, which is how PEFT merges an adapter, would
    change a temporary and the adapter would be gone without a word. Views raise as well; a
    clone(), or anything computed, is a plain tensor.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args else kwargs.get("tensor")
        if isinstance(first, cls) and (_is_in_place(name) or func == Tensor.data.__set__):  # type: ignore[attr-defined]
            raise RuntimeError(READ_ONLY)
        if isinstance(kwargs.get("out"), cls):
            raise RuntimeError(READ_ONLY)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            if isinstance(first, cls) and isinstance(result, Tensor) and _shares(result, first):
                return result.as_subclass(cls)
        return result


def _is_in_place(name: str) -> bool:
    ends = name.endswith("_") and not name.endswith("__")
    return (ends and name != "requires_grad_") or name == "__setitem__"


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
