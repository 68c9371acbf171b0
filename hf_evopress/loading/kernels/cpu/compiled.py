"""The compiled kernels, and a call of them on the threads of PyTorch.

Compiled by numba at the first product, 20 to 40 seconds of one core once per machine: the result is
kept beside this file or in the user's cache folder (`machine_code`). Work is shared among threads
by the OpenMP library that PyTorch has loaded (GOMP_parallel): a pool of our own would compete with
its threads for cores. Where there is none (Windows, macOS), one thread does it all.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ....base.progress import saying
from ....methods.maths import codebook
from .. import task as task_places
from ..task import (
    CHUNK,
    COUNT,
    LEAST_ROOM,
    PARALLEL,
    ROOM_SIZE,
    ROWS,
    SAME,
    SIZE,
    THREADS,
    TOKENS,
    WORK,
    X_KIND,
    N,
    X,
)
from . import (
    blocks,
    butterflies,
    computed,
    dots,
    floats,
    inputs,
    lanes,
    machine_code,
    memory,
    native,
    places,
    rows,
    strips,
    turns,
    vectors,
    walk_rows,
    walks,
    weyl,
)

logger = logging.getLogger(__name__)

# What numba raises of a cache that it cannot read or write: its files are pickled, and a damaged
# one can raise any of these. What is wrong with our code raises once more without the cache.
_OF_CACHES: tuple[type[Exception], ...] = (
    *(RuntimeError, OSError, EOFError, AttributeError, ImportError, LookupError),
    *(ValueError, TypeError, zlib.error, import_module("pickle").PickleError),
)
_PATIENCE = 3.0  # seconds; from the cache they take one
_COMPILING = (
    "the first product with compressed layers compiles kernels for this processor, "
    "20 to 40 seconds once per machine"
)
LEAST = 2**17  # multiplications that are worth another thread
Task = ctypes.c_int64 * SIZE
_FAST = ("dot_floats",)  # sums in any order
# Put into their one caller: else LLVM optimises all that they call once more for each.
_INLINE = ("take_rows", "part", "sum_strip", "turn_token", "turn_part", "multiply")
_OWNERS = (rows, walk_rows, inputs, blocks, native, computed, strips, turns)
_FUNCTIONS = (  # callees first
    *("to_float", "round_bfloat16", "to_bfloat16", "unpack_range", "unpack_row", "read_mask"),
    *("put_codes", "put_floats"),
    *("past_of", "read_walks"),
    *("read_grids", "read_codes", "weights_of", "expand_codes"),
    *("read_weights", "count_kept", "prepare", "place", "share", "write", "spread"),
    *("dot_row", "dot", "dots", "add_rest", "write_sums", "multiply_block", "multiply_codes"),
    *("dot_floats", "multiply_row", "expand_row", "is_in_strips", "run", "multiply"),
    *("weyl_half", "words_of", "sum_chunks", "sum_computed", "decode", "sum_strip"),
    *("multiply_strip", "expand_strip", "take_rows", "part"),
    *("scale_row", "transform", "mix", "turn_token", "turn_part", "turn_all"),
)


# As they are written: in the modules stands what numba made of them when it was last tried.
_PLAIN = {
    name: next(f for owner in _OWNERS if (f := vars(owner).get(name)) is not None)
    for name in _FUNCTIONS
}
_at_work = threading.Lock()


def run(tasks: Sequence[Any]) -> None:
    """Do tasks that say what is read, multiplied and written, all in one call."""
    kernels, n, known = compiled(), len(tasks), dict[tuple[int, ...], int]()
    work = size = widest = 0
    for i, task in enumerate(tasks):
        tokens, inputs = task[TOKENS], task[N]
        work += task[ROWS] * inputs * (tokens or 1)
        widest = max(widest, inputs)
        if task[X] and n > 1:
            same = known.setdefault((task[X], task[X_KIND], task[CHUNK]), i)
            task[SAME] = same + 1 if same != i else 0
        if task[X] and not task[SAME]:
            size += bytes_of(tokens, inputs)
    threads = threads_for(work)
    one = tasks[0] if n == 1 else (Task * n)(*tasks)
    first = tasks[0] if n == 1 else one[0]
    first[COUNT], first[THREADS] = n, threads
    first[PARALLEL], first[WORK] = kernels.parallel, kernels.work
    kernels.run(ctypes.addressof(one), scratch(size + threads * bytes_of_thread(widest)))


def threads_for(work: int) -> int:
    """Return on how many threads to do `work` multiplications."""
    return min(torch.get_num_threads(), 1 + work // LEAST) if compiled().parallel else 1


def bytes_of(tokens: int, inputs: int) -> int:
    """Return the most memory that activations take as float32 and integers with scales."""
    return 7 * tokens * inputs + 128


def bytes_of_thread(inputs: int) -> int:
    return ROOM_SIZE * max(inputs + 127, LEAST_ROOM)


class _Scratch(threading.local):
    """Memory that kernels work in, kept by the thread that calls them: a layer takes 40 us."""

    def __init__(self) -> None:
        self.size = self.address = 0


_scratch = _Scratch()


def scratch(size: int) -> int:
    """Return the address of `size` bytes that are this thread's until it asks again."""
    held = _scratch
    if held.size < size:
        with torch.inference_mode(False):
            held.memory = torch.empty(size + 64, dtype=torch.uint8, device="cpu")
        held.size, held.address = size, -(-held.memory.data_ptr() // 64) * 64
    return held.address


class Kernels:
    """Addresses of the compiled functions, and `run`, which takes the address of a task."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._entries = entries  # which own the code
        self.work: int = entries["part"].address
        self.run: Callable[[int, int], None] = _callable(entries["run"], 2)
        self.multiply: Callable[..., None] = _callable(entries["multiply"], 6)
        self.turn_work: int = entries["turn_part"].address
        self.turn: Callable[[int], None] = _callable(entries["turn"], 1)
        self.parallel = _openmp()


def _callable(entry: Any, arguments: int) -> Callable[..., None]:
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(entry.address)


@lru_cache(maxsize=None)
def compiled() -> Kernels:
    """Return the kernels, compiled for this processor or as they were compiled before."""
    with _at_work:  # a second thread waits, and finds what the first has made
        return _compiled()


@lru_cache(maxsize=None)
def _compiled() -> Kernels:
    version = _version()
    if (kept := machine_code.load(version)) is None:
        with saying(logger, _COMPILING, after=_PATIENCE), machine_code.one_at_a_time(version):
            kept = machine_code.load(version)  # another process may have made them meanwhile
            if kept is None:
                return Kernels(_by_numba(version))
    logger.info("CPU kernels: as they were compiled before")
    return Kernels(kept)


def _by_numba(version: int) -> Mapping[str, Any]:
    """Return the functions that others call, compiled for this processor."""
    numba = import_module("numba")
    logger.info("CPU kernels: compiled by numba, or read from its cache")
    made = memory.intrinsics() | lanes.intrinsics() | floats.intrinsics() | vectors.intrinsics()
    made |= dots.intrinsics(width=vector_bytes()) | walks.intrinsics(has_bmi=has_bmi())
    made |= weyl.intrinsics(width=weyl_bytes()) | butterflies.intrinsics()
    made |= places.intrinsics(width=vector_bytes(), has_vbmi2=has_vbmi2())
    made["AT_ONCE"] = dots.AT_ONCE[vector_bytes()]
    for name, value in made.items():
        _put(name, value)
    for name, plain in _PLAIN.items():
        inline = "always" if name in _INLINE else "never"
        options = {"fastmath": name in _FAST, "error_model": "numpy", "inline": inline}
        _put(name, numba.njit(plain, **options))
    entries = {name: _entry(numba, *how) for name, how in _ENTRIES.items()}
    return machine_code.keep(entries, version) or entries


@lru_cache(maxsize=None)
def vector_bytes() -> int:
    """Return the bytes of vectors whose 16-bit integers one instruction multiplies, 0 for none."""
    if has_feature("avx512bw") and has_feature("avx512vl"):
        return 64
    return 32 if has_feature("avx2") else 0


def weyl_bytes() -> int:
    """Return the bytes of vectors in which values of states are computed, 0 for none."""
    return 64 if vector_bytes() == 64 and has_feature("avx512vbmi") else min(vector_bytes(), 32)


def has_vbmi2() -> bool:
    """Return whether one instruction puts 64 bytes to their places here."""
    return vector_bytes() == 64 and has_feature("avx512vbmi2")


def has_bmi() -> bool:
    """Return whether bits are cut out of a word by one instruction here."""
    return has_feature("bmi") and sys.maxsize > 2**32


@lru_cache(maxsize=None)
def has_feature(name: str) -> bool:
    """Return whether numba compiles for an x86 processor with a feature, by LLVM's name for it."""
    try:
        llvm: Any = import_module("llvmlite.binding")
    except (ImportError, OSError, RuntimeError):  # nor does numba compile then
        return False
    if not llvm.get_process_triple().startswith(("x86_64", "i686", "amd64")):
        return False
    told = os.environ.get("NUMBA_CPU_FEATURES")
    if told is not None:  # numba then compiles for another processor than this one
        return f"+{name}" in told.split(",")
    return bool(llvm.get_host_cpu_features().get(name))


def chunk_of(size: int) -> int:
    """Return how many of `size` neighbours with one scale are summed as integers, 0 for none."""
    if not vector_bytes():
        return 0
    return next((chunk for chunk in dots.CHUNKS if size % chunk == 0), 0)


@lru_cache(maxsize=None)
def most_by_integers() -> int:
    """Return up to how many tokens codes times integers beat PyTorch's matmul of bfloat16.

    Measured, 4096 x 4096, groups of 128 (64), ms per token: integers 0.21 (0.26) with AVX-512 and
    0.3 with AVX2; PyTorch 0.15 with bfloat16 instructions, and 2 to 3 at once for unpacking, so
    they meet at 64 (32) tokens, at 20 where a weight is small; 0.9 to 1.4 without. With AMX, groups
    of 64 and a product that takes next to nothing, they meet between 24 and 32 tokens: 8 to 13 ms
    against 9 to 18 for unpacking at 24, 15 against 13 to 15 at 32.
    """
    if has_feature("amx-bf16"):
        return 24
    return 32 if has_feature("avx512bf16") else sys.maxsize


def _put(name: str, value: Any) -> None:
    for module in _OWNERS:
        if hasattr(module, name):
            setattr(module, name, value)


# A cached function is known by its code and what it closes over: `version` stands for the rest.
def _run(version: int) -> Callable[..., Any]:
    def run_tasks(tasks, memory):  # type: ignore[no-untyped-def]
        return native.run(tasks, memory, version)

    return run_tasks


def _multiply(version: int) -> Callable[..., Any]:
    def multiply_by(template, x, y, tokens, threads, memory):  # type: ignore[no-untyped-def]
        return native.multiply(template, x, y, tokens, threads, memory, version)

    return multiply_by


def _part(version: int) -> Callable[..., Any]:
    def part_task(task):  # type: ignore[no-untyped-def]
        return native.part(task, version)

    return part_task


def _turn(version: int) -> Callable[..., Any]:
    def turn_rows(job):  # type: ignore[no-untyped-def]
        return turns.turn_all(job, version)

    return turn_rows


def _turn_part(version: int) -> Callable[..., Any]:
    def turn_some(job):  # type: ignore[no-untyped-def]
        return turns.turn_part(job, version)

    return turn_some


_ENTRIES = {
    "run": (_run, 2),
    "multiply": (_multiply, 6),
    "part": (_part, 1),
    "turn": (_turn, 1),
    "turn_part": (_turn_part, 1),
}


def _version() -> int:
    total = zlib.crc32(str((vector_bytes(), has_bmi(), weyl_bytes(), has_vbmi2())).encode())
    emitters = (memory, lanes, floats, vectors, dots, places, walks, weyl, butterflies)
    here = sys.modules[__name__]
    for module in (*emitters, codebook, *_OWNERS, task_places, machine_code, here):
        total = zlib.crc32(_source(module), total)
    return total


def _source(module: ModuleType) -> bytes:
    assert module.__file__ is not None  # this package's own
    return Path(module.__file__).read_bytes()


def _entry(numba: Any, make: Callable[[int], Callable[..., Any]], arguments: int) -> Any:
    function, kind = make(_version()), f"void({', '.join(['int64'] * arguments)})"
    try:
        return numba.cfunc(kind, cache=True)(function)
    except _OF_CACHES as error:  # no folder to keep it in, a full disk, or a damaged file
        logger.info("kernels are compiled in this process (%s: %s)", type(error).__name__, error)
    with suppress(*_OF_CACHES):  # what is there is forgotten: the next process finds no fault
        import_module("numba.core.caching").FunctionCache(function).flush()
    return numba.cfunc(kind)(function)


def _openmp() -> int:
    """Return the address of GOMP_parallel in PyTorch's OpenMP library, 0 where it has none."""
    if os.name != "posix":
        return 0
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError):
        return 0
