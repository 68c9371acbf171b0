"""The compiled kernels, and a call of them on the threads of PyTorch.

Compiled by numba at the first product, 15 seconds of one core once per machine: it keeps the
result beside this file or in the user's cache folder. Work is shared among threads by the OpenMP
library that PyTorch has loaded (GOMP_parallel): a pool of our own would compete with its threads
for cores. Where there is none (Windows, macOS), one thread does it all.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import zlib
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import lanes, memory, native, rows, vectors
from . import task as places
from .task import PARALLEL, ROOM, ROOM_SIZE, ROOMS, ROWS, SIZE, STEP, THREADS, WORK, N

logger = logging.getLogger(__name__)

LEAST = 2**17  # multiplications that are worth another thread
Task = ctypes.c_int64 * SIZE
_FAST = ("dot_floats", "dot_codes")  # sums in any order
_FUNCTIONS = (  # callees first
    *("to_float", "to_bfloat16", "unpack_range", "unpack_row", "read_mask", "read_grids"),
    *("read_codes", "weights_of", "read_walks", "read_weights", "count_kept", "dot_floats"),
    *("dot_codes", "spread", "write", "multiply_row", "expand_row", "prepare", "run", "part"),
)


def run(task: Any, work: int) -> None:
    """Do a task whose other values are set, worth `work` multiplications."""
    kernels = compiled()
    threads = min(torch.get_num_threads(), 1 + work // LEAST) if kernels.parallel else 1
    task[STEP] = max(1, min(64, task[ROWS] // (8 * threads)))
    task[THREADS], task[PARALLEL], task[WORK] = threads, kernels.parallel, kernels.work
    room = -(-task[N] // 64) * 64 + 64
    task[ROOM], task[ROOMS] = room, scratch("rows", threads * ROOM_SIZE * room)
    kernels.run(ctypes.addressof(task))


class _Scratch(threading.local):
    """Memory that kernels work in, kept by the thread that calls them: a layer takes 40 us."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}


_scratch = _Scratch()


def scratch(use: str, size: int) -> int:
    """Return the address of `size` bytes that are this thread's until it asks again."""
    held = _scratch.held.get(use)
    if held is None or held.numel() < size:
        with torch.inference_mode(False):
            held = torch.empty(size, dtype=torch.uint8, device="cpu")
        _scratch.held[use] = held
    return held.data_ptr()


class Kernels:
    """Addresses of the compiled functions, and `run`, which takes the address of a task."""

    def __init__(self, entries: dict[str, Any]) -> None:
        self._entries = entries  # which own the code
        self.work: int = entries["part"].address
        self.run: Callable[[int], None] = ctypes.CFUNCTYPE(None, ctypes.c_int64)(
            entries["run"].address
        )
        self.parallel = _openmp()


@lru_cache(maxsize=None)
def compiled() -> Kernels:
    """Return the kernels, compiled for this processor or as they were compiled before."""
    numba = import_module("numba")
    logger.info("CPU kernels: compiled by numba, or read from its cache")
    made = memory.intrinsics() | lanes.intrinsics()
    made |= vectors.intrinsics(has_avx2=has_avx2())
    for name, function in made.items():
        _put(name, function)
    for name in _FUNCTIONS:
        owner = rows if hasattr(rows, name) else native
        plain = vars(owner)[name]
        _put(name, numba.njit(plain, fastmath=name in _FAST, error_model="numpy"))
    entries = {name: _entry(numba, make) for name, make in _ENTRIES.items()}
    return Kernels(entries)


@lru_cache(maxsize=None)
def has_avx2() -> bool:
    """Return whether products of 16-bit integers are one instruction here."""
    llvm: Any = import_module("llvmlite.binding")
    is_x86 = llvm.get_process_triple().startswith(("x86_64", "i686", "amd64"))
    return bool(is_x86 and llvm.get_host_cpu_features().get("avx2"))


def chunk_of(size: int) -> int:
    """Return how many of `size` neighbours with one scale are summed as integers, 0 for none."""
    if not has_avx2():
        return 0
    return next((chunk for chunk in vectors.CHUNKS if size % chunk == 0), 0)


def _put(name: str, function: Any) -> None:
    for module in (rows, native):
        if hasattr(module, name):
            setattr(module, name, function)


# A cached function is known by its code and what it closes over: `version` stands for the rest.
def _run(version: int) -> Callable[..., Any]:
    def run_task(task):  # type: ignore[no-untyped-def]
        return native.run(task, version)

    return run_task


def _part(version: int) -> Callable[..., Any]:
    def part_task(task):  # type: ignore[no-untyped-def]
        return native.part(task, version)

    return part_task


_ENTRIES = {"run": _run, "part": _part}


def _version() -> int:
    total = zlib.crc32(str(has_avx2()).encode())
    for module in (memory, lanes, vectors, rows, native, places):
        total = zlib.crc32(_source(module), total)
    return total


def _source(module: ModuleType) -> bytes:
    assert module.__file__ is not None  # this package's own
    return Path(module.__file__).read_bytes()


def _entry(numba: Any, make: Callable[[int], Callable[..., Any]]) -> Any:
    function = make(_version())
    try:
        return numba.cfunc("void(int64)", cache=True)(function)
    except RuntimeError as error:  # no folder to keep it in
        logger.info("kernels are compiled in every process: %s", error)
        return numba.cfunc("void(int64)")(function)


def _openmp() -> int:
    """Return the address of GOMP_parallel in PyTorch's OpenMP library, 0 where it has none."""
    if os.name != "posix":
        return 0
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError):
        return 0
