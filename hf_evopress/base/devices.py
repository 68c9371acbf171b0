"""What a device can do; models cast to another dtype for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies in bfloat16, not only stores it."""
    if device.type != "cpu":
        return True
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype of each parameter and buffer."""
    return {n: t.dtype for n, t in chain(model.named_parameters(), model.named_buffers())}


@contextmanager
def computing_in(
    model: nn.Module, dtype: torch.dtype, *, dtypes: Mapping[str, torch.dtype] | None = None
) -> Iterator[None]:
    """Have `model` in `dtype`, one that its weights are exact in, until the context ends.

    dtypes: those of its tensors when it is loaded in `dtype`, where not all are cast: rotary
    frequencies stay in float32.
    """
    own = dtypes_of(model)
    if dtype != next(iter(own.values())):
        _cast(model, dtypes or dict.fromkeys(own, dtype))
    try:
        yield
    finally:
        _cast(model, own)


def _cast(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes[name])
