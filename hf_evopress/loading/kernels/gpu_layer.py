"""The kernels of a layer on a GPU, in Triton: those of layer.py with other matrices."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch

from ...methods.base import Shape
from ...plans.level import Level
from .gpu import on_gpu
from .launch import KernelError, why_not
from .layer import Kernel, kernel_of

logger = logging.getLogger(__name__)

MOST_TOKENS = 64  # up to which weights are unpacked in the kernel that multiplies them
TILE = 2**24  # weights that are unpacked at once for a matmul after: 32 MB in bfloat16

_failed: dict[str, KernelError] = {}  # by the kernel's name


class TritonKernel(Kernel):
    """Products of activations with a packed weight on a GPU; see Kernel.

    Up to MOST_TOKENS tokens one kernel unpacks and multiplies: for one token in float32, for more
    with weights in the dtype of x. For more tokens, tiles of rows are unpacked for a matmul.
    """

    runtime = "triton"
    most_tokens = MOST_TOKENS
    tile = TILE
    takes_half = True

    def __init__(self, level: Level, shape: Shape, own: Kernel) -> None:
        terms = [[on_gpu(matrix) for matrix in matrices] for matrices in own._terms]
        super().__init__(level, shape, terms)
        self.families = frozenset().union(*(m.families for t in terms for m in t))

    def on(self, device: torch.device) -> Kernel | None:
        return None if why_not(device) or self.failure() is not None else self

    def failure(self) -> KernelError | None:
        """Return why one of the kernels that this needs is not used any more."""
        return next((_failed[name] for name in self.families if name in _failed), None)

    def __reduce__(self) -> Any:
        return triton_kernel_of, (self.level, self.shape)


@lru_cache(maxsize=4096)
def triton_kernel_of(level: Level, shape: Shape) -> TritonKernel | None:
    """Return the kernel of a level on a GPU, None where there is none for one of its terms."""
    own = kernel_of(level, shape)
    return None if own is None else TritonKernel(level, shape, own)


def for_device(level: Level, shape: Shape, device: torch.device) -> Kernel | None:
    """Return the kernel that a device other than the CPU can use now."""
    if device.type == "cpu" or why_not(device) is not None:
        return None
    kernel = triton_kernel_of(level, shape)
    return None if kernel is None else kernel.on(device)


def give_up(error: KernelError) -> None:
    """Use a kernel that has failed no more, and warn once."""
    if error.family not in _failed:
        logger.warning(
            "the Triton kernel '%s' of hf_evopress does not work here (%s): layers that need it "
            "compute as with runtime 'packed', which is slower",
            error.family,
            error,
        )
    _failed[error.family] = error
