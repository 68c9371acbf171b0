"""Which devices there are, the one to compute on, and what it can do.

cpu, cuda, cuda:1, mps, xpu, ...      as PyTorch names them
auto                                  the one in use (`using`), else a GPU where there is one
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

OFFLOAD = ("auto", "none", "cpu", "disk")
KINDS = ("cuda", "xpu", "mps", "npu", "mlu", "musa", "hpu")  # in the order in which auto takes them

Made = TypeVar("Made")

_in_use: ContextVar[torch.device | None] = ContextVar("device", default=None)
_offload: ContextVar[str] = ContextVar("offload", default="auto")


def find_device(name: str | torch.device | None = "auto") -> torch.device:
    """Return the device called `name`; ValueError, which names those there are, if it is not.

    auto is the device in use, else the first GPU. A GPU without a number is that of LOCAL_RANK
    where several processes work together.
    """
    if name is None or name == "auto":
        if (device := _in_use.get()) is not None:
            return device
        name = next((kind for kind in KINDS if _count(kind)), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(_absent(str(name))) from error
    if device.type == "cpu":
        return torch.device("cpu")
    n = _count(device.type)
    if not n or (device.index or 0) >= n:
        raise ValueError(_absent(str(name)))
    if device.index is None:
        current = getattr(_module(device.type), "current_device", lambda: 0)
        local = os.environ.get("LOCAL_RANK")
        device = torch.device(device.type, current() if local is None else int(local) % n)
    return device


@contextmanager
def using(
    name: str | torch.device | None = "auto", *, offload: str = "auto"
) -> Iterator[torch.device]:
    """Make `name` the device that auto means, for a while: all steps compute on it.

    offload: what auto means of it (see `placement.decide`).
    """
    device = find_device(name)
    tokens = _in_use.set(device), _offload.set(find_offload(offload))
    try:
        yield device
    finally:
        _in_use.reset(tokens[0])
        _offload.reset(tokens[1])


def find_offload(words: str = "auto") -> str:
    """Return how weights are offloaded; of auto what is in use."""
    if words not in OFFLOAD:
        raise ValueError(f"offload is {', '.join(OFFLOAD[:-1])} or {OFFLOAD[-1]}, got {words!r}")
    return _offload.get() if words == "auto" else words


def on_device(function: Callable[..., Made]) -> Callable[..., Made]:
    """Return a function that takes device= and offload= as well, and computes there."""

    @functools.wraps(function)
    def run(*args: Any, device: Any = "auto", offload: str = "auto", **kwargs: Any) -> Made:
        with using(device, offload=offload):
            return function(*args, **kwargs)

    return run


def available() -> list[str]:
    """Return the names of the devices there are."""
    found = ["cpu"]
    for kind in dict.fromkeys((*KINDS, torch._C._get_privateuse1_backend_name())):
        n = _count(kind)
        found += [kind] if n == 1 else [f"{kind}:{i}" for i in range(n)]
    return found


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies in bfloat16, not only stores it."""
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    supported = getattr(_module(device.type), "is_bf16_supported", None)
    if supported is None:
        return True
    try:
        return bool(supported(including_emulation=False))
    except TypeError:
        return bool(supported())


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device, None where that is not known."""
    if device.type == "cpu":
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None
    info = getattr(_module(device.type), "mem_get_info", None)
    return None if info is None else int(info(device)[0])


def peak_bytes(device: torch.device) -> int | None:
    """Return the most memory that was in use at once on a device, None where it is not known."""
    peak = getattr(_module(device.type), "max_memory_allocated", None)
    return None if device.type == "cpu" or peak is None else int(peak(device))


def reset_peak(device: torch.device) -> None:
    """Let the peak of a device begin again."""
    reset = getattr(_module(device.type), "reset_peak_memory_stats", None)
    if device.type != "cpu" and reset is not None:
        reset(device)


def let_cache_go(device: torch.device) -> None:
    """Give memory that no tensor uses back to a device."""
    empty = getattr(_module(device.type), "empty_cache", None)
    if device.type != "cpu" and empty is not None:
        empty()


def wait_for(device: torch.device) -> None:
    """Return when what was asked of a device is done, so that a clock can be read."""
    wait = getattr(_module(device.type), "synchronize", None)
    if device.type != "cpu" and wait is not None:
        wait(device)


def name_of(device: torch.device) -> str:
    """Return what a device calls itself, or its kind where it does not say."""
    name = getattr(_module(device.type), "get_device_name", None)
    return str(device) if device.type == "cpu" or name is None else str(name(device))


def take_own_card() -> None:
    """Make the GPU of LOCAL_RANK this process's current one, where there are GPUs."""
    device = find_device()
    if device.index is not None:
        _module(device.type).set_device(device)


def _count(kind: str) -> int:
    """Return how many devices of a kind there are."""
    try:
        module = torch.get_device_module(kind)
    except (RuntimeError, AttributeError):
        return 0
    if not module.is_available():
        return 0
    return int(module.device_count()) if hasattr(module, "device_count") else 1


def _module(kind: str) -> Any:
    return torch.get_device_module(kind)


def _absent(name: str) -> str:
    return f"there is no device {name!r} on this machine; there is: {', '.join(available())}"


def capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA GPU, None of anything else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def is_captured() -> bool:
    """Return whether a CUDA graph is being made: launches are written down, nothing is run."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
