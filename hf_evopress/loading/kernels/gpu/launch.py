"""Launch Triton kernels: find them, say where they can run, and name one that fails.

Triton comes with PyTorch for GPUs on Linux. With TRITON_INTERPRET=1 set before it is imported,
kernels run on a CPU, in Python, which is for tests.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from ....base.devices import capability, is_captured
from ....base.triton_errors import failures

DEVICES = ("cuda", "xpu")
LEAST_CAPABILITY = (8, 0)  # of NVIDIA's GPUs, for products of bfloat16


class KernelError(RuntimeError):
    """A Triton kernel failed before it ran: `family` is its name."""

    def __init__(self, family: str, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        self.family = family


def launch(
    family: str, name: str, grid: tuple[int, ...], device: torch.device, given: Mapping[str, Any]
) -> None:
    """Run kernel `name` of a family on `device`; raises KernelError where it cannot be run.

    `given` are its arguments by name.
    """
    try:
        with _on(device):
            kernel = getattr(import_module(f".triton_{family}", __package__), name)
            kernel[grid](**given)
    except torch.OutOfMemoryError:
        raise
    except failures() as error:
        if is_captured():  # what a graph may not hold works outside of it
            raise
        raise KernelError(family, error) from error


def why_not(device: torch.device) -> str | None:
    """Return why kernels in Triton cannot run on a device, None where they can."""
    if device.type == "cpu":
        return None if is_interpreting() else "Triton is for GPUs"
    if device.type not in DEVICES:
        return f"no kernels for {device.type}"
    return _why_not(device)


def is_interpreting() -> bool:
    """Return whether Triton runs kernels on the CPU, in Python."""
    return os.environ.get("TRITON_INTERPRET") == "1" and _missing() is None


def needs_exact(device: torch.device) -> bool:
    """Return whether tl.dot has no bfloat16 here: the interpreter takes it for integers."""
    return device.type == "cpu"


@lru_cache(maxsize=None)
def _why_not(device: torch.device) -> str | None:
    if (missing := _missing()) is not None:
        return missing
    found = capability(device)
    if found is not None and found < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return f"compute capability {found[0]}.{found[1]} is below {least}"
    return None


@lru_cache(maxsize=None)
def _missing() -> str | None:
    try:
        import_module("triton")
    except (ImportError, OSError, RuntimeError) as error:
        return f"Triton cannot be imported: {str(error).strip().partition(chr(10))[0]}"
    return None


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which `device`, where Triton launches, is the current one."""
    if device.type == "cpu" or device.index is None:
        return nullcontext()
    return torch.accelerator.device_index(device.index)
